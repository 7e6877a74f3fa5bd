"""A training job of a toy that writes down the rows of every step: quick, with all that a checkpoint must bring back.

The toy has frozen weights, weights outside the exported model, and a buffer that every step changes and a loss reads.
`config`: `rows`, where to `record`; `slow` = {from, seconds, until}: steps are slow until a file is there; `hang` =
{rank, step, mark}: it hangs once, if the file is not there yet.
"""

import json
import os
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tenfold.platform.training.module import TrainedModule
from tenfold.platform.training.trainer import Trainer, perplexity_metrics
from torch import nn

VOCABULARY, WIDTH, LENGTH = 16, 8, 6


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(hidden_size=WIDTH)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.table.requires_grad_(False)
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        return torch.tanh(self.body(self.table(ids)))

    def save_pretrained(self, folder, state_dict):
        save_file(
            {name: weight.contiguous() for name, weight in state_dict.items()}, Path(folder) / "model.safetensors"
        )


class ToyModule(TrainedModule):
    def __init__(self):
        super().__init__(Toy())
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, input_ids, labels, attention_mask, rows, num_items_in_batch=None):
        logits = self.head(self.exported(input_ids))[:, :-1] * (1 + self.drift)
        wanted = labels[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), wanted, reduction="none")
        count = (wanted != -100).sum()
        total = losses.sum()
        found = {"loss": total / (count if num_items_in_batch is None else num_items_in_batch)}
        found["statistics"] = {"nll": (total.detach(), count)}
        if not self.training:
            found |= {"nll": losses.sum(1), "num_labels": (wanted != -100).sum(1)}
        return found


def collate(rows):
    ids = torch.stack([torch.randint(VOCABULARY, (LENGTH,), generator=seeded(row["row"])) for row in rows])
    labels = ids.clone()
    for place, row in enumerate(rows):  # of unequal lengths
        labels[place, LENGTH - row["row"] % 3 :] = -100
    numbers = torch.tensor([row["row"] for row in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "rows": numbers}


def seeded(number):
    return torch.Generator().manual_seed(number)


class ToyTrainer(Trainer):
    plan: dict

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step + 1
        if batches:
            record = Path(self.plan["record"])
            record.mkdir(parents=True, exist_ok=True)
            rows = [batch["rows"].tolist() for batch in batches]
            line = {"attempt": attempt(), "ranks": self.args.world_size, "step": step, "rows": rows}
            (record / f"{time.time_ns()}-{os.getpid()}.jsonl").write_text(json.dumps(line) + "\n")
            self.model.drift += 0.05
        slow, hang = self.plan.get("slow"), self.plan.get("hang")
        if slow and step >= slow["from"] and not Path(slow["until"]).exists():
            time.sleep(slow["seconds"])
        if (
            hang
            and (hang["rank"], hang["step"]) == (self.args.process_index, step)
            and not Path(hang["mark"]).exists()
        ):
            Path(hang["mark"]).touch()
            while True:
                time.sleep(60)
        return batches, items


def attempt():
    """Return the start of the job that this process belongs to; empty without Ray."""
    import ray
    import ray.train

    return ray.train.get_context().get_experiment_name() if ray.is_initialized() else ""


def build(context, trainer_class=ToyTrainer):
    """Return a worker's Trainer, whose `plan` is the configuration."""
    from tenfold.platform.models.randomness import seeded as drawn

    with drawn(context.seed):
        module = ToyModule()
    rows = [{"row": number} for number in range(context.config["rows"])]
    trainer = trainer_class(
        model=module,
        args=context.arguments,
        train_dataset=rows,
        eval_dataset=rows[:3],
        data_collator=collate,
        compute_metrics=perplexity_metrics,
        projector_learning_rate=3e-2,
    )
    trainer.plan = context.config
    return trainer


def recorded(folder):
    """Return attempt -> step -> sorted rows of all workers, of every step that they have begun."""
    found = {}
    for line in _lines(folder):
        steps = found.setdefault(line["attempt"], {})
        steps.setdefault(line["step"], []).extend(row for batch in line["rows"] for row in batch)
    return {name: {step: sorted(rows) for step, rows in steps.items()} for name, steps in found.items()}


def sizes(folder):
    """Return attempt -> number of workers, of those that have begun a step, in their order."""
    return dict(sorted((line["attempt"], line["ranks"]) for line in _lines(folder)))


def _lines(folder):
    # a file has no line yet while it is written
    return [json.loads(line) for file in Path(folder).glob("*.jsonl") for line in file.read_text().splitlines()]

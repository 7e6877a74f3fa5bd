"""DPO and KTO beside trl's own trainers: the same loss and gradients for the same batch, policy and reference.

trl's IPO takes means over tokens and its `sigmoid` loss ignores label smoothing, so that these two are not compared.
"""

import copy
import warnings

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.kto_module import KTOModule
from tenfold.methods.aligndistil.preference_module import PreferenceModule

# said by trl and transformers about each other
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


@pytest.fixture(scope="module")
def models(tiny_llama):
    """Return policy and reference, far enough from each other and from uniform."""
    made = [tiny_llama(320, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for model in made:
            for weight in model.parameters():
                weight.mul_(3)
    return made


@pytest.fixture(scope="module")
def trl(models, tiny_tokenizer, tmp_path_factory):
    """Return trl's trainers on copies of the models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

        settings = {
            "output_dir": str(tmp_path_factory.mktemp("trl")),
            "beta": 0.3,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 2,
        }
        pairs = Dataset.from_list([{"prompt": "Edit", "chosen": " this", "rejected": " that"}] * 2)
        singles = Dataset.from_list([{"prompt": "Edit", "completion": " this", "label": bool(i)} for i in range(2)])
        kinds = {"dpo": (DPOTrainer, DPOConfig, pairs, {}), "kto": (KTOTrainer, KTOConfig, singles, WEIGHTS)}
        return {
            name: trainer(
                model=copy.deepcopy(models[0]),
                ref_model=copy.deepcopy(models[1]),
                args=config(**settings, **more),
                train_dataset=rows,
                processing_class=tiny_tokenizer,
            )
            for name, (trainer, config, rows, more) in kinds.items()
        }


def rows(prompts, answers, seed):
    generator = torch.Generator().manual_seed(seed)
    width = max(start + size for start, size in zip(prompts, answers, strict=True))
    ids = torch.randint(3, 320, (len(prompts), width), generator=generator)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (start, size) in enumerate(zip(prompts, answers, strict=True)):
        labels[row, start : start + size] = ids[row, start : start + size]
        mask[row, : start + size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def theirs(batch, prefix=""):
    return {
        f"{prefix}input_ids": batch["input_ids"],
        f"{prefix}attention_mask": batch["attention_mask"],
        f"{prefix}completion_mask": (batch["labels"] != -100).long(),
    }


def ours(kind, models, **options):
    config = AlignDistilConfig(
        model={"model": "a"}, data={"train": [{"path": "c.json"}]}, beta=0.3, loss_chunk_rows=4, **options
    )
    policy, reference = copy.deepcopy(models[0]), models[1]
    return kind(policy, config, {"reference": reference.eval()}, num_columns=320).train()


def assert_same_gradients(module, trainer, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    trainer.model.zero_grad()
    found.backward()
    expected.backward()
    other = dict(trainer.model.named_parameters())
    for name, weight in module.exported.named_parameters():
        largest = other[name].grad.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(weight.grad, other[name].grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_dpo_is_trls(trl, models):
    batch = rows([4, 2, 3, 4, 2, 3], [5, 7, 1, 3, 6, 4], 0)
    expected = trl["dpo"].compute_loss(trl["dpo"].model.train(), theirs(batch))
    module = ours(PreferenceModule, models, objective="dpo")
    assert_same_gradients(module, trl["dpo"], module(**batch)["loss"], expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_kto_is_trls(trl, models, seed):
    batch, crossed = rows([4, 2, 3], [5, 7, 2], seed), rows([4, 2, 3], [7, 2, 5], seed + 10)
    desirable = torch.tensor([True, False, True])
    given = theirs(batch) | theirs(crossed, "KL_") | {"label": desirable}
    expected = trl["kto"].compute_loss(trl["kto"].model.train(), given)
    module = ours(KTOModule, models, objective="kto", kto=WEIGHTS)
    own = {f"mismatched_{name}": value for name, value in crossed.items()}
    out = module(**batch, **own, desirable=desirable)
    assert_same_gradients(module, trl["kto"], out["loss"], expected)

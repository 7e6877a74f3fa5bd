"""On-policy training: some forward passes compare student and teacher on what the student writes itself (v2).

Objective (DSKDv2, arXiv 2504.11426): the mean divergence over the tokens of y ~ q_theta(. | x), without a gradient
through the sampling; the cross entropy stays on the data. Generation is in eval mode with a cache, by the current
weights. An EOS that ends a response is a label, a response that was cut has none; masks come from lengths. (The
official code samples with dropout and never learns EOS.)
"""

from __future__ import annotations

from typing import Any

import torch
from tenfold.methods.dskd.alignment import byte_span
from tenfold.methods.dskd.collator import TeachingCollator
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.step_trainer import DistillationTrainer
from tenfold.methods.dskd.token_bytes import token_bytes
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.models.generation import generate_tokens
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.vllm_rollout import Engine, VllmEngine
from tenfold.platform.training.step_trainer import Batches
from torch import Tensor


class Rollout:
    """Turns a batch of the data into one that the student has written.

    Args:
        config: DSKD's options, `on_policy` among them.
        tokenizer: the student's.
        teacher_tokenizer: the teacher's where it differs; its tokens are then aligned with the student's by bytes.
        collator: of the training data.
        seed: of the run.

    Attributes:
        engine: what generates in the place of transformers; None: transformers.
    """

    engine: Engine | None = None

    def __init__(
        self, config: DSKDConfig, tokenizer: Any, teacher_tokenizer: Any, collator: TeachingCollator, seed: int
    ):
        assert config.on_policy is not None
        self._options, self._data = config.on_policy, config.data
        self._tokenizer, self._teacher_tokenizer = tokenizer, teacher_tokenizer
        self._collator, self._seed = collator, seed
        if teacher_tokenizer is not None:
            self._bytes = token_bytes(tokenizer), token_bytes(teacher_tokenizer)
        self._generation = GenerationOptions(
            max_new_tokens=self._options.max_new_tokens or self._data.max_length - self._data.max_prompt_length,
            temperature=self._options.temperature,
            top_p=self._options.top_p,
            top_k=self._options.top_k,
        )

    def start_engine(self, model: Any, accelerator: Any) -> None:
        """Start what generates, where it is not transformers; once, on every rank, before training."""
        if self._options.engine == "vllm":
            self.engine = VllmEngine(
                self._generation,
                model,
                accelerator,
                self._tokenizer,
                memory=self._options.vllm_memory,
                max_prompt_length=self._data.max_prompt_length,
            )

    def chosen(self, step: int, epoch: float, passes: int) -> list[int]:
        """Return which forward passes of a step generate: drawn from (seed, step), so that all ranks agree.

        (The official code draws on each rank by itself; sharded weights need one decision.)
        """
        if int(epoch) < self._options.after_epochs:
            return []
        drawn = torch.rand(passes, generator=torch.Generator().manual_seed(hash((self._seed, step)) % 2**63))
        return (drawn < self._options.ratio).nonzero().flatten().tolist()

    def generate(self, model: Any, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return the batch that the student writes for the prompts of `batch`, as the collator gives it."""
        prompts = _prompts(batch["input_ids"], batch["attention_mask"], batch["labels"])
        if self.engine is None:
            answers = generate_tokens(model, self._tokenizer, prompts, self._generation, seed=seed)
        else:
            answers = self.engine.generate(prompts, seed)
        # what the row keeps of it: pairs count these label positions
        room = [self._data.max_length - len(prompt) for prompt in prompts]
        answers = [answer[: max(size, 0)] for answer, size in zip(answers, room, strict=True)]
        rows = [self._row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        if self._teacher_tokenizer is not None:
            theirs = _prompts(*(batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "labels")))
            for row, prompt, answer in zip(rows, theirs, answers, strict=True):
                row |= self._teacher_row(prompt, answer)
        return self._collator(rows)

    def _row(self, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        length = self._data.max_length
        return {
            "input_ids": (prompt + answer)[:length],
            "labels": ([IGNORED] * len(prompt) + answer)[:length],
        }

    def _teacher_row(self, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        ended = bool(answer) and answer[-1] == self._tokenizer.eos_token_id
        text = self._tokenizer.decode(answer[:-1] if ended else answer, clean_up_tokenization_spaces=False)
        theirs = self._teacher_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        theirs = theirs + [self._teacher_tokenizer.eos_token_id] * ended
        row = self._row(prompt, theirs)
        pairs = byte_span(
            answer,
            row["labels"][len(prompt) :],
            *self._bytes,
            self._tokenizer.eos_token_id,
            self._teacher_tokenizer.eos_token_id,
        )
        return {
            "teacher_input_ids": row["input_ids"],
            "teacher_labels": row["labels"],
            "student_pairs": torch.as_tensor(pairs.student, dtype=torch.int64),
            "teacher_pairs": torch.as_tensor(pairs.teacher, dtype=torch.int64),
        }


class OnPolicyTrainer(DistillationTrainer):
    """Generates for the chosen forward passes of a step before its first one.

    Args:
        rollout: what generates.
    """

    def __init__(self, *args: Any, rollout: Rollout, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rollout = rollout
        rollout.start_engine(self.model.exported, self.accelerator)

    def prepare_step(self, batches: Batches) -> Batches:
        """Add `generated` to some of the batches, then the counts."""
        step = self.state.global_step
        generated = {
            number: self._rollout.generate(
                self.model.exported,
                batches[number],
                seed=hash((self.args.seed, step, number, self.args.process_index)) % 2**63,
            )
            for number in self._rollout.chosen(step, self.state.epoch or 0.0, len(batches))
        }
        if generated:
            own = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in generated.values())
            total = self.accelerator.reduce(torch.tensor(float(own), device=self.args.device), reduction="sum")
            for number, batch in generated.items():
                batches[number] = {**batches[number], "generated": {**batch, "num_items": total.clamp(min=1.0)}}
        return super().prepare_step(batches)


def _prompts(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[list[int]]:
    """Return the tokens before the first label of each row."""
    first = torch.where(labels != IGNORED, 1, 0).argmax(dim=1)
    sizes = torch.where((labels != IGNORED).any(dim=1), first, attention_mask.sum(dim=1))
    return [ids[:size] for ids, size in zip(input_ids.tolist(), sizes.tolist(), strict=True)]

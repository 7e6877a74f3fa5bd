"""AlignDistil for benchmarks/training.py: its loss against full logits, and what an off-policy step costs.

Policy, DPO model and reverse DPO model are SmolLM2-135M-Instruct in float32, the latter two with noise on their
weights, with a vocabulary as large as Qwen's: the values mean nothing, the work and the memory are real. Every token
of the samples' answers carries a label but a row's first, so that the loss gains nothing from prompts or padding.

`plain` is the paper's loss with full logits and autograd, `tenfold` the one that AlignDistil trains with, both from
hidden states and heads with the gradient of the student's; they are counted as in losses.py. The step is that of the
module that AlignDistil trains, with clipping and AdamW; it is held against both frozen models' forward passes with
transformers and a step of supervised fine-tuning, whose loss is tenfold's too.
"""

import copy
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from losses import PeakMemory, free_bytes
from reporting import Target, median
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.distillation_module import DistillationModule
from tenfold.methods.aligndistil.extrapolation import Contrast, contrast_of
from tenfold.methods.aligndistil.fused import fused_alignment_loss
from tenfold.platform.data.examples import load_examples
from tenfold.platform.data.positions import next_labels
from tenfold.platform.losses.chunked_rows import Side
from tenfold.platform.losses.fused_linear import fused_linear_cross_entropy
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.training.label_rows import label_rows
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax
from training_steps import MAX_NORM, SEED, demo_config

VOCABULARY, TOKENS = 151936, 2048
ROW_TOKENS, STEP_ROWS = 128, 4
HIDDEN = 576
# Peak of the plain form in units of tokens * vocabulary * 4 bytes, to refuse what would not fit.
PLAIN_UNITS = 7


def options() -> AlignDistilConfig:
    """Return the paper's options, for models of the demo's size."""
    demo = demo_config("kl")
    model = {"model": demo.teacher.model, "sha256": demo.teacher.sha256}
    return AlignDistilConfig.model_validate({"model": model, "data": {"train": [{"path": "not read"}]}})


def plain_loss(student: Side, dpo: Side, other: Side, contrast: Contrast, row_weight: Tensor) -> Tensor:
    """sum_r row_weight[r] beta_t KL(pi_theta || pi*) with full logits; the loss of arXiv 2503.02832."""
    student_logits = student.hidden @ student.head.T
    with torch.no_grad():
        dpo_logits, other_logits = (side.hidden @ side.head.T for side in (dpo, other))
        distance = 0.5 * (softmax(dpo_logits, -1) - softmax(other_logits, -1)).abs().sum(-1)
        alpha = contrast.scale * distance + contrast.epsilon
        target = log_softmax(dpo_logits + alpha[:, None] * (dpo_logits - other_logits), -1)
        del dpo_logits, other_logits
    log_q = log_softmax(student_logits, -1)
    kl = (log_q.exp() * (log_q - target)).sum(-1)
    return (row_weight * contrast.beta / alpha * kl).sum()


class LossCase:
    """Hidden states of three models at TOKENS label positions, and the two forms of the loss that reads them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)

        def side(noise: float = 0.0, near: Side | None = None) -> Side:
            hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
            head = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 1.5 / HIDDEN**0.5
            if near is None:
                return Side(hidden, head, None)
            return Side(near.hidden + noise * hidden, near.head, None)

        self.dpo = side()
        self.other, self.student = side(0.3, self.dpo), side(0.2, self.dpo)
        self.other = Side(self.other.hidden, self.dpo.head.clone(), None)
        self.student = Side(self.student.hidden.requires_grad_(), self.dpo.head.clone().requires_grad_(), None)
        self.weight = torch.full((TOKENS,), 1 / TOKENS)
        self.contrast = contrast_of(options())

    def plain(self) -> Tensor:
        """Full logits."""
        return plain_loss(self.student, self.dpo, self.other, self.contrast, self.weight)

    def tenfold(self) -> Tensor:
        """What AlignDistil trains with."""
        sides = (self.student, self.dpo, self.other)
        return fused_alignment_loss(*sides, self.contrast, self.weight, num_columns=VOCABULARY).total

    def backward(self, loss: Callable[[], Tensor]) -> float:
        """Compute a loss and its gradients, which are thrown away."""
        value = loss()
        value.backward()
        self.student.hidden.grad = self.student.head.grad = None
        return value.item()

    def peak(self, loss: Callable[[], Tensor]) -> tuple[float, float]:
        """Return the loss, and the peak GiB that it and its gradients create."""
        gc.collect()
        kept = [tensor for side in (self.student, self.dpo, self.other) for tensor in (side.hidden, side.head)]
        with PeakMemory(kept) as memory:
            value = self.backward(loss)
        return value, memory.peak / 2**30


class StepCase:
    """The three models, one batch, and the steps that are compared."""

    def __init__(self) -> None:
        config = options()
        self.policy = load_causal_lm(config.model, seed=SEED, dtype="float32")
        torch.manual_seed(SEED)
        self.policy.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        self.frozen = {name: self._disturbed() for name in ("dpo", "reverse")}
        self.module = DistillationModule(self.policy, config, self.frozen, num_columns=VOCABULARY).train()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, weight_decay=0.0)
        examples, tokenizer = load_examples(demo_config("kl").data).train, load_tokenizer(config.model)
        text = "\n".join(example.responses[0] for example in examples)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: STEP_ROWS * ROW_TOKENS]
        input_ids = torch.tensor(ids).view(STEP_ROWS, ROW_TOKENS)
        self.batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}

    @torch.no_grad()
    def _disturbed(self) -> Any:
        model = copy.deepcopy(self.policy).requires_grad_(False).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 * parameter.std().item())
        return model

    def _step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def align(self) -> None:
        """Do one optimizer step of AlignDistil."""
        self._step(self.module(**self.batch)["loss"])

    def sft(self) -> None:
        """Do one optimizer step of the policy on the same tokens without frozen models."""
        side, targets = label_rows(self.policy, **self.batch), next_labels(self.batch["labels"])
        self._step(fused_linear_cross_entropy(side.hidden, side.head, targets) / len(targets))

    @torch.no_grad()
    def teachers(self) -> None:
        """Let both frozen models read the batch as transformers has it, logits included."""
        inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        for model in self.frozen.values():
            model(**inputs, use_cache=False)


def medians(work: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Return the median seconds of each work; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repetitions):
        for name, do in work.items():
            start = time.perf_counter()
            do()
            times[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in times.items()}


def measure_align(threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Return the rows of loss and step, each measured in a process of its own."""
    rows = []
    for name, function in (("loss", measure_loss), ("step", measure_step)):
        print(f"AlignDistil, {name} ...", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(function, threads, repetitions).result()
    return rows


def measure_loss(threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Return a row per form of the loss; the plain one only where it fits into the free memory."""
    torch.set_num_threads(threads)
    case, note = LossCase(), ""
    forms: dict[str, Callable[[], Tensor]] = {"plain": case.plain, "tenfold": case.tenfold}
    needed, free = PLAIN_UNITS * TOKENS * VOCABULARY * 4, free_bytes("cpu")
    if needed > free:
        note = f"plain needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free: not measured"
        del forms["plain"]
    found = {form: case.peak(loss) for form, loss in forms.items()}  # warms up, too
    losses = {form: value for form, (value, _) in found.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4 * abs(losses["tenfold"]):
        raise SystemExit(f"AlignDistil: losses {losses}: not the same, nothing to compare")
    taken = medians({form: partial(case.backward, loss) for form, loss in forms.items()}, repetitions)
    rows = [
        {
            "what": f"{form} AlignDistil loss, V {VOCABULARY}",
            "part": form,
            "cores": threads,
            "tokens_per_s": TOKENS / taken[form],
            "step_s": taken[form],
            "step_gib": found[form][1],
            "loss": losses[form],
        }
        for form in forms
    ]
    if "plain" in forms:
        rows[-1] |= {
            "speed_ratio": taken["plain"] / taken["tenfold"],
            "memory_ratio": found["tenfold"][1] / found["plain"][1],
        }
    rows[-1]["note"] = note or f"{TOKENS} label positions, hidden size {HIDDEN}"
    return rows


def measure_step(threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Return a row per kind of step; all are warmed up first."""
    torch.set_num_threads(threads)
    case = StepCase()
    work: dict[str, Callable[[], Any]] = {"step": case.align, "sft": case.sft, "teachers": case.teachers}
    medians(work, 1)
    taken = medians(work, repetitions)
    ratio = taken["step"] / (taken["sft"] + taken["teachers"])
    names = {
        "step": "tenfold AlignDistil step",
        "sft": "tenfold SFT step",
        "teachers": "two frozen forward passes",
    }
    rows = [
        {
            "what": f"{names[name]}, V {VOCABULARY}",
            "part": name,
            "cores": threads,
            "tokens_per_s": STEP_ROWS * ROW_TOKENS / seconds,
            "step_s": seconds,
        }
        for name, seconds in taken.items()
    ]
    rows[0] |= {"over_parts_ratio": ratio, "note": f"{ratio:.2f} x (two frozen forward passes + SFT step)"}
    return rows


def align_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Hold the measured ratios against the limits; the limits were set before anything was measured."""
    row = {row["part"]: row for row in rows}
    reason = row["tenfold"]["note"]
    step = row["step"]["over_parts_ratio"]
    return [
        Target("align_loss_memory_over_plain", row["tenfold"].get("memory_ratio"), 1 / 6, reason=reason),
        Target("align_step_over_frozen_and_sft", step, 1.3, reason=f"{STEP_ROWS * ROW_TOKENS} tokens, all labelled"),
    ]

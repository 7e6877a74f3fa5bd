"""DSKDv2 between two tokenizers (v2+ETA) for benchmarks/training.py: the loss with full logits, and what a step costs.

Student, teacher, data and alignment are those of the experiment dskd/cross_vocabulary, in float32, with a live teacher
and the student-to-teacher projector recomputed in every pass, as the paper does. Rows are chosen of nearly one length;
their share of label tokens is close to that of all rows. A vocabulary beyond the student's own gives both models more
rows, which count as tokens that both have: the values mean nothing there, the work and the memory are real.

`naive` is what one writes with transformers alone: four full logits of all positions, as the official code takes
them, with zeros where nothing is aligned. `tenfold` is the module that DSKD trains.
"""

import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from losses import PeakMemory, free_bytes
from reporting import Target, median
from tenfold.methods.dskd.collator import TaughtRows, TeachingCollator
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.pairing import pair_rows, teacher_rows
from tenfold.methods.dskd.trainer import make_module
from tenfold.methods.dskd.vocabulary import overlap, teacher_labels
from tenfold.platform.data.examples import load_examples
from tenfold.platform.data.positions import label_positions
from tenfold.platform.data.shards import ShardedRows
from tenfold.platform.data.tokenise import tokenised_dataset
from tenfold.platform.models.hidden import final_hidden
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.storage import Storage
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from training_steps import MAX_NORM, SEED, TeacherPass, demo_config

VOCABULARIES = (50257, 151936)  # GPT-2's, which the student has; Qwen's
LARGE, TOKENS, ROW_TOKENS = 151936, 2048, 64
# Peak of the naive form in units of positions * vocabulary * 4 bytes, to refuse what would not fit.
NAIVE_UNITS = 15
WARM_UP = 2


def aligned_rows(config: DSKDConfig, tokens: int) -> list[dict[str, Any]]:
    """Return rows with both tokenizers' ids and their pairs, the longest that fit `tokens` padded positions a side."""
    examples, theirs = load_examples(config.data).train, load_tokenizer(config.teacher)
    rows = list(tokenised_dataset(examples, load_tokenizer(config.student), config.data))
    both = list(zip(rows, teacher_rows(rows, examples, theirs, config), strict=True))
    both = [pair for pair in both if max(len(row["input_ids"]) for row in pair) <= ROW_TOKENS]
    both = sorted(both, key=lambda pair: -len(pair[0]["input_ids"]))[: tokens // ROW_TOKENS]
    chosen, taught = [own for own, _ in both], [other for _, other in both]
    with tempfile.TemporaryDirectory() as scratch:
        context: Any = TeacherPass(Storage(scratch))
        folder = pair_rows(context, config, chosen, taught, examples, "eta").folder
        found = TaughtRows(chosen, taught, [ShardedRows(Path(scratch) / folder)])
        return [found[index] for index in range(len(found))]


class Case:
    """Both models, one batch of `tokens` padded positions, and the two forms of the loss on it.

    Args:
        vocabulary: at least the student's, whose 50,257 entries are more than the teacher's 49,152.
        tokens: rows are chosen to fill so many.
    """

    def __init__(self, vocabulary: int, tokens: int):
        changes = ("config.teacher_mode=live", "config.s2t_refresh_every=1")
        self.options = demo_config("dual_space_v2", *changes, experiment="dskd/cross_vocabulary")
        self.rows = aligned_rows(self.options, tokens)
        own, theirs = load_tokenizer(self.options.student), load_tokenizer(self.options.teacher)
        self.collate = TeachingCollator(own.pad_token_id, theirs.pad_token_id)
        self.student = load_causal_lm(self.options.student, seed=SEED, dtype="float32")
        self.teacher = load_causal_lm(self.options.teacher, dtype="float32")
        added, columns = torch.arange(len(own), vocabulary), (len(own), len(theirs))
        if len(added) > 0:
            columns = (vocabulary, vocabulary)
            torch.manual_seed(SEED)
            for model in (self.student, self.teacher):
                model.resize_token_embeddings(vocabulary, mean_resizing=False)
        self.teacher.requires_grad_(False)
        between = (own.get_vocab(), theirs.get_vocab(), own.eos_token_id, theirs.eos_token_id)
        self.t2s_id = teacher_labels(*between, vocabulary)
        self.t2s_id[added] = added
        self.common, common = (torch.cat([ids, added]) for ids in overlap(*between))
        # the official code keeps this pseudo-inverse and multiplies with the current head of the student
        self.inverse = torch.linalg.pinv(self._head(self.teacher)[common].T)
        self.module = make_module(
            self.student,
            self.options,
            "eta",
            num_columns=columns[0],
            num_teacher_columns=columns[1],
            teacher=self.teacher,
            overlap=(self.common, common),
            t2s_id=self.t2s_id,
        ).train()
        alone = self.options.model_copy(update={"objective": "sft"})
        self.sft = make_module(self.student, alone, "none", num_columns=columns[0]).train()
        rate = self.options.training.learning_rate
        self.optimizers = {
            module: torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0)
            for module in (self.module, self.sft)
        }

    def facts(self) -> str:
        """Return the shares of label tokens and pairs."""
        batch = self.batch()
        labels = int(label_positions(batch["labels"]).sum())
        share = len(batch["student_pairs"]) / labels
        return f"{labels} of {batch['labels'].numel()} tokens carry a label, {share:.0%} of these are aligned"

    @staticmethod
    def _head(model: Any) -> Tensor:
        return model.get_output_embeddings().weight

    def batch(self) -> dict[str, Tensor]:
        """Collate the batch."""
        return self.collate(self.rows)

    def tenfold(self) -> Tensor:
        """The loss that DSKD trains with."""
        return self.module(**self.batch())["loss"]

    def naive(self) -> Tensor:
        """(1 - alpha) CE + alpha (L_stu + L_t2s_ce + L_tea) of arXiv 2504.11426 with full logits of all positions."""
        batch, alpha, tau = self.batch(), self.options.kd_rate, self.options.kd_temperature
        labels = batch["labels"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        own_hidden = self.student.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        own_logits = self.student.lm_head(own_hidden)
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        ce = cross_entropy(own_logits.float(), following)
        inputs = {"input_ids": batch["teacher_input_ids"], "attention_mask": batch["teacher_attention_mask"]}
        with torch.no_grad():
            hidden = self.teacher.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            logits = self.teacher.lm_head(hidden)
        own = label_positions(labels).flatten().nonzero()[:, 0][batch["student_pairs"]]
        theirs = label_positions(batch["teacher_labels"]).flatten().nonzero()[:, 0][batch["teacher_pairs"]]
        mapped = self.t2s_id[logits.argmax(-1)[theirs]]
        own, theirs, mapped = own[mapped >= 0], theirs[mapped >= 0], mapped[mapped >= 0]

        head = self._head(self.student)
        lowered = own_hidden.new_zeros(own_hidden.shape).index_put((own,), self.module.t2s(hidden[theirs]))
        lowered_logits = lowered @ head.detach().T
        wanted = torch.full_like(following, -100).index_put((own,), mapped)
        t2s_ce = cross_entropy(lowered_logits.float(), wanted)
        agreeing = lowered_logits.argmax(-1) == wanted
        matrix = head.detach()[self.common].T @ self.inverse
        lifted = hidden.new_zeros(hidden.shape).index_put((theirs,), own_hidden[own] @ matrix)
        lifted_logits = lifted @ self._head(self.teacher).T
        aligned = torch.zeros(len(lifted), dtype=torch.bool).index_fill(0, theirs, True)

        def divergence(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
            log_q = log_softmax(student_logits.float() / tau, dim=-1)
            log_p = log_softmax(teacher_logits.float() / tau, dim=-1)
            rows = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            return (rows * mask).sum() / mask.sum().clamp(min=1e-3)

        student_space = divergence(own_logits, lowered_logits.detach(), agreeing)
        teacher_space = divergence(lifted_logits, logits, aligned)
        return (1 - alpha) * ce + alpha * (student_space + t2s_ce + teacher_space)

    def _step(self, module: nn.Module, batch: dict[str, Tensor]) -> None:
        module(**batch)["loss"].backward()
        optimizer = self.optimizers[module]
        nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    def tenfold_step(self) -> None:
        """Do one optimizer step of v2+ETA."""
        self._step(self.module, self.batch())

    def sft_step(self) -> None:
        """Do one optimizer step of the student without a teacher."""
        untaught = [{name: row[name] for name in ("input_ids", "labels")} for row in self.rows]
        self._step(self.sft, self.collate(untaught))

    @torch.no_grad()
    def teacher_forward(self) -> None:
        """Let the teacher read the batch as transformers has it, logits included."""
        batch = self.batch()
        self.teacher(
            input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"], use_cache=False
        )

    @torch.no_grad()
    def teacher_states(self) -> None:
        """Let the teacher read the batch up to what its head would read."""
        batch = self.batch()
        final_hidden(self.teacher, batch["teacher_input_ids"], batch["teacher_attention_mask"])

    def kept(self) -> list[Tensor]:
        """Return all tensors that stay between steps."""
        tensors = [*self.module.parameters(), *self.module.buffers(), self.inverse, self.t2s_id]
        tensors += [*self.teacher.parameters(), *self.teacher.buffers()]
        states = [state for optimizer in self.optimizers.values() for state in optimizer.state.values()]
        return tensors + [value for state in states for value in state.values()]

    def backward(self, loss: Callable[[], Tensor]) -> float:
        """Compute a loss and its gradients, which are thrown away."""
        value = loss()
        value.backward()
        self.module.zero_grad()
        return value.item()

    def peak(self, loss: Callable[[], Tensor]) -> float:
        """Return the peak GiB that a loss and its gradients create."""
        gc.collect()
        with PeakMemory(self.kept()) as memory:
            self.backward(loss)
        return memory.peak / 2**30


def measure_cross(threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Return the rows of all vocabularies, each measured in a process of its own."""
    rows = []
    for vocabulary in VOCABULARIES:
        print(f"two tokenizers, vocabulary {vocabulary} ...", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(measure_case, vocabulary, TOKENS, threads, repetitions).result()
    return rows


def measure_case(vocabulary: int, tokens: int, threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Return a row per form of the loss and per part of a step; they take turns in this process.

    A few training steps come first, so that the projected teacher agrees with the teacher somewhere.
    """
    torch.set_num_threads(threads)
    case = Case(vocabulary, tokens)
    for _ in range(WARM_UP):
        case.tenfold_step()
    case.sft_step()
    forms: dict[str, Callable[[], Tensor]] = {"naive": case.naive, "tenfold": case.tenfold}
    needed, free, note = NAIVE_UNITS * tokens * vocabulary * 4, free_bytes("cpu"), ""
    if needed > free:
        note = f"naive needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free: not measured"
        del forms["naive"]
    losses = {form: case.backward(loss) for form, loss in forms.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4 * abs(losses["tenfold"]):
        raise SystemExit(f"two tokenizers, V {vocabulary}: losses {losses}: not the same, nothing to compare")
    peaks = {form: case.peak(loss) for form, loss in forms.items()}
    work: dict[str, Callable[[], Any]] = {form: partial(case.backward, loss) for form, loss in forms.items()}
    work |= {"step": case.tenfold_step, "sft": case.sft_step, "teacher": case.teacher_forward}
    work |= {"states": case.teacher_states}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repetitions):
        for name, do in work.items():
            start = time.perf_counter()
            do()
            times[name].append(time.perf_counter() - start)
    taken = {name: median(seconds) for name, seconds in times.items()}

    def row(what: str, name: str, **more: Any) -> dict[str, Any]:
        done = {"what": f"{what}, V {vocabulary}", "part": name, "vocabulary": vocabulary, "cores": threads}
        return done | {"tokens_per_s": tokens / taken[name], "step_s": taken[name]} | more

    rows = [row(f"{form} v2+ETA loss", form, step_gib=peaks[form], loss=losses[form]) for form in forms]
    if "naive" in forms:
        rows[-1]["speed_ratio"] = taken["naive"] / taken["tenfold"]
        rows[-1]["memory_ratio"] = peaks["tenfold"] / peaks["naive"]
    rows[-1]["note"] = note or case.facts()
    over_parts = taken["step"] / (taken["sft"] + taken["teacher"])
    parts = {"over_parts_ratio": over_parts, "note": f"{over_parts:.2f} x (teacher forward + SFT step)"}
    rows.append(row("tenfold v2+ETA step", "step", **parts))
    rows.append(row("tenfold SFT step", "sft"))
    rows.append(row("teacher forward", "teacher"))
    rows.append(row("teacher forward without logits", "states"))
    return rows


def cross_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Hold the measured ratios against the limits; the limits were set before anything was measured."""
    row = {(row["part"], row["vocabulary"]): row for row in rows}
    large = row["tenfold", LARGE]
    reason = f"{LARGE} entries, {TOKENS} tokens; {large['note']}"
    time_ratio = 1 / large["speed_ratio"] if "speed_ratio" in large else None
    worst = max((row["step", vocabulary] for vocabulary in VOCABULARIES), key=lambda step: step["over_parts_ratio"])
    return [
        Target("two_tokenizers_memory_over_naive", large.get("memory_ratio"), 1 / 8, reason=reason),
        Target("two_tokenizers_time_over_naive", time_ratio, 1.2, reason=reason),
        Target(
            "two_tokenizers_step_over_teacher_and_sft",
            worst["over_parts_ratio"],
            1.35,
            reason=f"worst: {worst['vocabulary']} entries",
        ),
    ]

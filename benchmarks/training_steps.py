"""The distillation steps that benchmarks/training.py compares, each in a process of its own.

A step collates a batch, computes the loss and its gradient, clips the gradient's norm and lets AdamW update the
student. `naive` is what one writes with transformers alone: full logits of both models, log_softmax in float32, KL on
the positions that carry a label, half cross entropy. `tenfold` is the module that DSKD trains.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from losses import PeakMemory
from tenfold.methods.dskd.collator import TaughtRows, TeachingCollator
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.teacher import encode_rows, teacher_dtype
from tenfold.methods.dskd.trainer import make_module
from tenfold.platform.data.examples import load_examples
from tenfold.platform.data.positions import label_positions
from tenfold.platform.data.shards import ShardedRows
from tenfold.platform.data.tokenise import tokenised_dataset
from tenfold.platform.experiment import Compute, load_experiment
from tenfold.platform.models.heads import head_from_folder
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.references import resolve
from tenfold.platform.storage import Storage
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils import clip_grad_norm_

SEED = 10
MAX_NORM = 1.0
Batches = Sequence[Sequence[int]]


def step_name(form: str, objective: str, teacher: str) -> str:
    """Return a step's name in the table; see `Work`."""
    return f"{form} {objective}, {teacher} teacher"


@dataclass(frozen=True)
class Work:
    """Which step a process measures; plain data.

    Attributes:
        form: naive or tenfold.
        objective: of tenfold's module; naive is always KL.
        teacher: live (it reads every batch) or cached (its states are read from disk).
        threads: of torch.
        states: the teacher's states.
    """

    form: str
    objective: str
    teacher: str
    threads: int
    states: "States"

    @property
    def name(self) -> str:
        """Name in the table."""
        return step_name(self.form, self.objective, self.teacher)


@dataclass(frozen=True)
class States:
    """The training rows and where the teacher's states of them are.

    Attributes:
        max_rows: only so many of the demo's training rows; None: all.
        cache: address of the storage.
        folder: folder in it; empty before the teacher has read the rows.
    """

    max_rows: int | None
    cache: str
    folder: str = ""

    def config(self, objective: str = "kl", *more: str) -> DSKDConfig:
        """Return the demo's options for these rows; see `demo_config`."""
        rows = "null" if self.max_rows is None else self.max_rows
        return demo_config(objective, f"config.data.max_train_rows={rows}", *more)


def demo_config(objective: str, *more: str, experiment: str = "dskd/demo") -> DSKDConfig:
    """Return a demo's options with another objective, all of them in float32."""
    overrides = [f"config.objective={objective}", "config.teacher_dtype=float32", "config.training.bf16=false", *more]
    config = load_experiment(experiment, overrides).config
    assert isinstance(config, DSKDConfig)
    return config


def training_rows(config: DSKDConfig) -> Any:
    """Return the demo's tokenised training rows."""
    return tokenised_dataset(load_examples(config.data).train, load_tokenizer(config.student), config.data)


class TeacherPass:
    """Stands in for a run where `encode_rows` asks for one: pieces are done here, one after the other, and timed."""

    def __init__(self, cache: Storage):
        self.cache, self.compute, self.seconds = cache, Compute(), 0.0

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> list[Any]:
        """Apply `function` to all items; the first one twice, since its first time also loads the teacher."""
        function(items[0])
        start = time.perf_counter()
        results = [function(item) for item in items]
        self.seconds = time.perf_counter() - start
        return results


def teacher_pass(states: States) -> tuple[States, float]:
    """Let the teacher read the training rows once, with this process's threads; return the states and the seconds."""
    config = states.config()
    context: Any = TeacherPass(Storage(states.cache))
    folder = encode_rows(context, config, list(training_rows(config)), "training").folder
    return replace(states, folder=folder), context.seconds


def naive_loss(student: Any, teacher_logits: Tensor, batch: dict[str, Tensor], options: DSKDConfig) -> Tensor:
    """(1 - alpha) CE + alpha KL(teacher || student) with full logits; CE is the one that transformers computes."""
    out = student(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        use_cache=False,
    )
    tau = options.kd_temperature
    log_q = log_softmax(out.logits[:, :-1].float() / tau, dim=-1)
    log_p = log_softmax(teacher_logits[:, :-1].float() / tau, dim=-1)
    mask = batch["labels"][:, 1:] != -100
    kl = (kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * mask).sum() / mask.sum()
    return (1 - options.kd_rate) * out.loss + options.kd_rate * kl


class Step:
    """One optimizer step of a form, on the demo's models and rows."""

    def __init__(self, work: Work, scratch: Path):
        self.options = work.states.config(work.objective)
        self.rows = training_rows(self.options)
        tokenizer = load_tokenizer(self.options.student)
        student = load_causal_lm(self.options.student, seed=SEED, dtype="float32")
        self.collate = TeachingCollator(tokenizer.pad_token_id, tokenizer.pad_token_id)
        self.teacher: Any = None
        self.head: Tensor | None = None
        if work.teacher == "live":
            self.teacher = load_causal_lm(self.options.teacher, dtype=teacher_dtype(self.options))
            self.teacher.requires_grad_(False)
        else:
            folder = Storage(work.states.cache).download(work.states.folder, scratch / "teacher")
            self.rows = TaughtRows(self.rows, None, [ShardedRows(folder)])
            self.head = head_from_folder(resolve(self.options.teacher)).float()
        self.trained: nn.Module = student
        self.loss: Callable[[dict[str, Tensor]], Tensor] = self._naive
        if work.form == "tenfold":
            self.trained = make_module(
                student,
                self.options,
                "none",
                num_columns=len(tokenizer),
                teacher_head=self.head,
                teacher=self.teacher,
            )
            self.loss = lambda batch: self.trained(**batch)["loss"]
        self.trained.train()
        self.parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.options.training.learning_rate, weight_decay=0.0)

    def _naive(self, batch: dict[str, Tensor]) -> Tensor:
        mask, labels = batch["attention_mask"], batch["labels"]
        with torch.no_grad():
            if self.teacher is not None:
                inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
                logits = self.teacher(**inputs, use_cache=False).logits
            else:
                assert self.head is not None
                hidden = torch.zeros(*labels.shape, self.head.shape[1])
                hidden[label_positions(labels)] = batch["teacher_hidden"]
                logits = hidden @ self.head.T
        return naive_loss(self.trained, logits, batch, self.options)

    def run(self, rows: Sequence[int]) -> float:
        """Do one step with these rows and return its loss."""
        loss = self.loss(self.collate([self.rows[row] for row in rows]))
        loss.backward()
        clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> list[Tensor]:
        """Return all tensors that stay between steps: weights, teacher, AdamW's moments."""
        tensors = [*self.trained.parameters(), *self.trained.buffers()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        if self.teacher is not None:
            tensors += [*self.teacher.parameters(), *self.teacher.buffers()]
        return [*tensors, self.head] if self.head is not None else tensors


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory of this process since `reset_peak`; None where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def reset_peak() -> None:
    """Start counting the peak resident memory anew; where that is not allowed it counts from the process's start."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def timed(step: Step, batches: Batches) -> tuple[float, float]:
    """Return the seconds of one step per batch and the first one's loss."""
    start = time.perf_counter()
    losses = [step.run(rows) for rows in batches]
    return time.perf_counter() - start, losses[0]


def memory(step: Step, batches: Batches) -> tuple[int, int | None]:
    """Return the peak bytes that a step creates, and of the whole process meanwhile."""
    reset_peak()
    with PeakMemory(step.state()) as peak:
        for rows in batches:
            step.run(rows)
    return peak.peak, peak_resident_bytes()


def _serve(connection: Connection, work: Work) -> None:
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as scratch:
        step = Step(work, Path(scratch))
        connection.send("ready")
        while (command := connection.recv()) is not None:
            function, batches = command
            connection.send(function(step, batches))


class StepProcess:
    """A process that measures one kind of step on demand; a context manager. It answers once when it is ready."""

    def __init__(self, work: Work):
        context = multiprocessing.get_context("spawn")
        self.work = work
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, function: Callable[[Step, Batches], Any], batches: Batches) -> None:
        """Ask for `function(step, batches)` without waiting."""
        self._connection.send((function, batches))

    def finish(self) -> Any:
        """Wait for the answer.

        Raises:
            RuntimeError: the process has ended instead; its own message is on stderr.
        """
        try:
            return self._connection.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.work.name}: its process ended before it answered") from error

    def ask(self, function: Callable[[Step, Batches], Any], batches: Batches) -> Any:
        """Ask and wait."""
        self.begin(function, batches)
        return self.finish()

    def __enter__(self) -> "StepProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
        self._connection.close()

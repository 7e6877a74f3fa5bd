"""Time and peak memory of the distillation losses, chunked against the plain formulation.

One measurement is one loss and its backward pass, from hidden states and heads. `plain` writes the loss as usual: full
logits, log_softmax, autograd; logits that two terms need are computed once. `chunked` is tenfold's. Both are repeated
in turn and the medians are compared. Memory is the peak of the live storages that the measurement creates (inputs,
heads and teacher excluded, gradients included), on CUDA what its allocator reports. The counter runs while the time is
taken; it costs the chunked form a little more, as that consists of more operations.

    python benchmarks/losses.py --quick
    python benchmarks/losses.py --vocabulary 32000 --tokens 512 1024 --dtype float32
"""

import gc
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil
import torch
from reporting import Report, Target, argument_parser, median
from tenfold.methods.dskd.objective import LossSettings, dual_space_v1, dual_space_v2, sft, vanilla_kd
from tenfold.platform.losses.divergence import DIVERGENCES, DivergenceOptions
from tenfold.platform.losses.fused_linear import linear_argmax
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KD_RATE = 0.5
OPTIONS = DivergenceOptions(temperature=2.0)
LARGE = (151936, 2048)
SMALL = (32000, 512)
OBJECTIVES = ["sft", *DIVERGENCES, "dual_space_v1", "dual_space_v2"]
QUICK_OBJECTIVES = ["sft", "forward_kl", "dual_space_v2"]

# Peak of the plain formulation in units of tokens * vocabulary * 4 bytes, rounded up from measurements with the
# counter below; only used to refuse what would not fit.
PLAIN_UNITS = {"bfloat16": 12.5, "float32": 13.5}


@dataclass
class Inputs:
    """Hidden states at label positions, heads, and what the teacher's states look like in the student's space."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    projected_teacher: Tensor
    student_to_teacher: Tensor
    targets: Tensor

    @classmethod
    def draw(
        cls, vocabulary: int, tokens: int, student: int, teacher: int, dtype: torch.dtype, device: str
    ) -> "Inputs":
        """Draw them from a fixed seed; logits get a standard deviation of about 1.5."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

        return cls(
            normal(tokens, student).requires_grad_(),
            normal(vocabulary, student, scale=1.5 / student**0.5).requires_grad_(),
            normal(tokens, teacher),
            normal(vocabulary, teacher, scale=1.5 / teacher**0.5),
            normal(tokens, student).requires_grad_(),
            normal(teacher, student, scale=student**-0.5),
            torch.randint(0, vocabulary, (tokens,), generator=generator).to(device),
        )

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return list(vars(self).values())


def plain_divergence(name: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q = log_softmax(student_logits.float() / OPTIONS.temperature, -1)
    log_p = log_softmax(teacher_logits.detach().float() / OPTIONS.temperature, -1)
    return DIVERGENCES[name](log_q, log_p, OPTIONS)


def plain_loss(objective: str, x: Inputs) -> Tensor:
    """(1 - alpha) CE + alpha KD with full logits; KD as DSKD (arXiv 2406.17328) and DSKDv2 (2504.11426) define it."""
    tokens = x.targets.numel()
    student_logits = x.student_hidden @ x.student_head.t()
    student_ce = cross_entropy(student_logits.float(), x.targets, reduction="sum") / tokens
    if objective == "sft":
        return student_ce
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_head.t()
    if objective in DIVERGENCES:
        distance = plain_divergence(objective, student_logits, teacher_logits).sum() / tokens
        return (1 - KD_RATE) * student_ce + KD_RATE * distance

    is_v2 = objective == "dual_space_v2"
    projected_logits = x.projected_teacher @ x.student_head.detach().t()
    labels = teacher_logits.argmax(-1) if is_v2 else x.targets
    projected_ce = cross_entropy(projected_logits.float(), labels, reduction="sum") / tokens
    student_space = plain_divergence("forward_kl", student_logits, projected_logits)
    if is_v2:
        agrees = projected_logits.argmax(-1) == labels
        student_space = (student_space * agrees).sum() / agrees.sum().clamp(min=1)
    else:
        student_space = student_space.sum() / tokens
    lifted_logits = (x.student_hidden @ x.student_to_teacher.t()) @ x.teacher_head.t()
    teacher_space = plain_divergence("forward_kl", lifted_logits, teacher_logits).sum() / tokens
    return (1 - KD_RATE) * student_ce + KD_RATE * (projected_ce + student_space + teacher_space)


def chunked_loss(objective: str, x: Inputs, chunk: int) -> Tensor:
    """The same losses as tenfold trains with them, a live teacher's prediction included."""
    items = torch.tensor(float(x.targets.numel()), device=x.targets.device)
    if objective == "sft":
        return sft(x.student_hidden, x.student_head, x.targets, items, chunk).total
    divergence = objective if objective in DIVERGENCES else "forward_kl"
    settings = LossSettings(divergence, OPTIONS, KD_RATE, num_columns=len(x.student_head), chunk=chunk)
    models = (x.student_hidden, x.student_head, x.teacher_hidden, x.teacher_head)
    if objective in DIVERGENCES:
        return vanilla_kd(*models, x.targets, items, settings).total
    projections = (x.projected_teacher, x.student_hidden @ x.student_to_teacher.t())
    if objective == "dual_space_v1":
        return dual_space_v1(*models, *projections, x.targets, items, settings).total
    prediction = linear_argmax(x.teacher_hidden, x.teacher_head, chunk=chunk)
    return dual_space_v2(*models, *projections, prediction, x.targets, items, settings).total


class PeakMemory(TorchDispatchMode):
    """Peak bytes of the storages that operations create while it is active; CUDA: of its caching allocator."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.is_cuda = inputs[0].is_cuda
        self.current = self.peak = 0
        self.finalizers: dict[int, weakref.finalize] = {}
        self.excluded = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __enter__(self) -> "PeakMemory":
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.current = torch.cuda.memory_allocated()
            return self
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_cuda:
            self.peak = torch.cuda.max_memory_allocated() - self.current
            return
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until it is freed."""
        key = storage._cdata
        if key in self.excluded or key in self.finalizers:
            return
        self.finalizers[key] = weakref.finalize(storage, self.remove, key, storage.nbytes())
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)

    def remove(self, key: int, num_bytes: int) -> None:
        """Take a freed storage out again."""
        del self.finalizers[key]
        self.current -= num_bytes


def measure(loss: Callable[[], Tensor], inputs: Inputs) -> tuple[float, float, float]:
    """Return loss value, seconds and peak bytes of one loss with its backward pass."""
    for tensor in inputs.tensors():
        tensor.grad = None
    gc.collect()
    synchronize = torch.cuda.synchronize if inputs.targets.is_cuda else lambda: None
    with PeakMemory(inputs.tensors()) as memory:
        synchronize()
        start = time.perf_counter()
        value = loss()
        value.backward()
        synchronize()
        seconds = time.perf_counter() - start
    return value.item(), seconds, memory.peak


def free_bytes(device: str) -> int:
    """Memory that a measurement may use on the device."""
    return torch.cuda.mem_get_info()[0] if device.startswith("cuda") else psutil.virtual_memory().available


def measure_case(
    objective: str, inputs: Inputs, *, chunk: int, repetitions: int, warm_up: bool, device: str
) -> dict[str, Any]:
    """Medians of both forms, measured in turn; the plain one only where it fits into the free memory."""
    tokens, vocabulary = inputs.targets.numel(), inputs.student_head.shape[0]
    dtype = str(inputs.student_head.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"objective": objective, "vocabulary": vocabulary, "tokens": tokens, "dtype": dtype}
    forms = {
        "plain": lambda: plain_loss(objective, inputs),
        "chunked": lambda: chunked_loss(objective, inputs, chunk),
    }
    needed, free = PLAIN_UNITS[dtype] * tokens * vocabulary * 4, free_bytes(device)
    if needed > free:
        row["note"] = f"plain needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free: not measured"
        del forms["plain"]
    if warm_up:
        for loss in forms.values():
            measure(loss, inputs)
    results: dict[str, list[tuple[float, float, float]]] = {form: [] for form in forms}
    for _ in range(repetitions):
        for form, loss in forms.items():
            results[form].append(measure(loss, inputs))
    for form, measured in results.items():
        row[f"{form}_loss"] = measured[0][0]
        row[f"{form}_s"] = median([seconds for _, seconds, _ in measured])
        row[f"{form}_gib"] = max(peak for _, _, peak in measured) / 2**30
    if "plain" in forms:
        row["time_ratio"] = row["chunked_s"] / row["plain_s"]
        row["memory_ratio"] = row["chunked_gib"] / row["plain_gib"]
        if abs(row["chunked_loss"] - row["plain_loss"]) > 1e-3 * abs(row["plain_loss"]):
            raise SystemExit(f"{row}: the two forms disagree, so their cost cannot be compared.")
    return row


def targets_of(rows: list[dict[str, Any]]) -> list[Target]:
    """Hold the measured ratios against the limits, as far as their cells were asked for.

    A cell that was asked for and does not fit into the memory misses its target.
    """
    targets = []
    for row in rows:
        if (row["objective"], row["vocabulary"], row["tokens"]) == ("dual_space_v2", *LARGE):
            reason = row.get("note", "")
            targets.append(Target("dual_space_v2_memory_ratio", row.get("memory_ratio"), 1 / 8, reason=reason))
            targets.append(Target("dual_space_v2_time_ratio", row.get("time_ratio"), 1.2, reason=reason))
    small = [row for row in rows if (row["vocabulary"], row["tokens"]) == SMALL]
    if small:
        worst = max(small, key=lambda row: row.get("time_ratio", float("inf")))
        # Not slower than plain; the 0.05 is for the noise of a shared machine.
        reason = f"worst: {worst['objective']}" + (f", {worst['note']}" if "note" in worst else "")
        targets.append(Target("small_size_time_ratio", worst.get("time_ratio"), 1.05, reason=reason))
    return targets


def main() -> int:
    parser = argument_parser("Time and peak memory of the distillation losses, chunked against plain.")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 50257, 151936])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, metavar="NAME")
    parser.add_argument("--student-size", type=int, default=768, help="hidden size of the student")
    parser.add_argument("--teacher-size", type=int, default=2048, help="hidden size of the teacher")
    parser.add_argument("--dtype", choices=list(PLAIN_UNITS), default="bfloat16", help="of hidden states and heads")
    parser.add_argument("--chunk", type=int, default=512, help="rows per chunk")
    parser.add_argument("--repetitions", type=int, default=3, help="of each form, in turn, after one warm-up")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    # The large cell comes first: it needs the memory that later cells may leave fragmented.
    cells = sorted(((v, n) for v in options.vocabulary for n in options.tokens), key=lambda cell: -cell[0] * cell[1])
    cases = [(objective, *cell, options.repetitions, True) for cell in cells for objective in options.objectives]
    if options.quick:
        cases = [("dual_space_v2", *LARGE, 1, False)]
        cases += [(objective, *SMALL, 3, True) for objective in QUICK_OBJECTIVES]
    settings = {
        "sizes": f"{options.student_size}/{options.teacher_size}",
        "dtype": options.dtype,
        "chunk": options.chunk,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "repetitions": "1 (large), 3 (small)" if options.quick else options.repetitions,
    }
    report = Report("losses", settings)
    inputs: Inputs | None = None
    for objective, vocabulary, tokens, repetitions, warm_up in cases:
        shape = (tokens, vocabulary)
        if inputs is None or (inputs.targets.numel(), inputs.student_head.shape[0]) != shape:
            inputs = None
            inputs = Inputs.draw(
                vocabulary,
                tokens,
                options.student_size,
                options.teacher_size,
                getattr(torch, options.dtype),
                options.device,
            )
        print(f"{objective}, vocabulary {vocabulary}, {tokens} tokens ...", file=sys.stderr, flush=True)
        report.rows.append(
            measure_case(
                objective,
                inputs,
                chunk=options.chunk,
                repetitions=repetitions,
                warm_up=warm_up,
                device=options.device,
            )
        )
    report.targets = targets_of(report.rows)
    report.show(
        {
            "objective": "objective",
            "vocabulary": "V",
            "tokens": "tokens",
            "plain_s": "plain s",
            "chunked_s": "chunked s",
            "time_ratio": "time ratio",
            "plain_gib": "plain GiB",
            "chunked_gib": "chunked GiB",
            "memory_ratio": "memory ratio",
            "note": "note",
        }
    )
    return report.finish(options.json)


if __name__ == "__main__":
    raise SystemExit(main())

"""What benchmarks/experts.py compares: a dense and an expanded model, and three ways to compute a layer's experts.

A case lives in a process of its own and answers with seconds, of the wall and of the processor.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from tenfold.methods.layermoe.block import mixture
from tenfold.methods.layermoe.expansion import expand, trainable
from tenfold.methods.layermoe.module import ExpansionModule, Objective
from tenfold.methods.layermoe.routing import top_k_routing
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, one_hot, silu
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

SEED, TOP_K, CHUNK, BALANCE, MAX_NORM, RATE = 10, 2, 256, 0.01, 1.0, 1e-4
DENSE, STAGE_1, UNFROZEN = "dense", "expanded, stage 1", "expanded, nothing frozen"


@dataclass(frozen=True)
class Size:
    """A Llama without its weights; plain data."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self, positions: int) -> LlamaConfig:
        """Return transformers' configuration."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
        )


@dataclass(frozen=True)
class Work:
    """What a process holds; plain data.

    Attributes:
        form: DENSE, STAGE_1 or UNFROZEN.
        size: of the dense model.
        experts: of every layer of the expanded one, the original FFN included.
        batch: sequences of a training step.
        length: their tokens.
        threads: of torch.
    """

    form: str
    size: Size
    experts: int
    batch: int
    length: int
    threads: int


class Taken(NamedTuple):
    """Seconds that something took."""

    wall: float
    processor: float


def timed(do: Callable[[], object]) -> Taken:
    """Do something and return how long it took."""
    wall, processor = time.perf_counter(), time.process_time()
    do()
    return Taken(time.perf_counter() - wall, time.process_time() - processor)


class Case:
    """A model, its optimizer and a batch of random tokens."""

    def __init__(self, work: Work):
        torch.manual_seed(SEED)
        self.model: Any = AutoModelForCausalLM.from_config(work.size.config(work.length))
        objective = Objective(chunk=CHUNK)
        if work.form != DENSE:
            new = [work.experts - 1] * work.size.layers
            self.model = expand(self.model, new, languages=["new"], seed=SEED, top_k=TOP_K)
            objective = Objective(balance_weight=BALANCE, chunk=CHUNK)
        if work.form == STAGE_1:
            trainable(self.model, 1)
        self.module = ExpansionModule(self.model, objective).train()
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)  # as the Trainer's default
        draw = torch.Generator().manual_seed(SEED)
        ids = torch.randint(5, work.size.vocabulary, (work.batch, work.length), generator=draw)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.statistics: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        """Return sizes, and what the last step saw: mean next-token loss, share of the rows that expert 0 got."""
        found = {name: (total / count).item() for name, (total, count) in self.statistics.items()}
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "trained": sum(parameter.numel() for parameter in self.parameters),
            "loss": found["ntp"],
            "base_share": found["load_base"] / TOP_K if "load_base" in found else None,
        }

    def step(self) -> None:
        """Do one optimizer step."""
        out = self.module(**self.inputs)
        out["loss"].backward()
        clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.statistics = out["statistics"]

    def forward(self) -> None:
        """Compute the loss alone."""
        with torch.no_grad():
            self.module(**self.inputs)

    def generate(self, batch: int, prompt: int, tokens: int) -> None:
        """Write so many tokens greedily behind each prompt, with a cache, as transformers does."""
        self.model.eval()
        ids = self.inputs["input_ids"][:batch, :prompt]
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        self.model.train()
        if made.shape != (batch, prompt + tokens):
            raise RuntimeError(f"{list(made.shape)}: wanted are {batch} answers of {tokens} tokens")

    def serve(self, batch: int, prompt: int, tokens: int) -> Taken:
        """Let the server's engine answer so many requests at once; its start does not count."""
        from tenfold.serve.engine import Engine
        from tenfold.serve.sampling import Sampling

        self.model.eval()
        engine = Engine(self.model, eos_token_ids=[], max_context=prompt + tokens, max_running=batch, cache_gb=0.25)
        prompts = self.inputs["input_ids"][:batch, :prompt].tolist()

        async def answer(ids: list[int]) -> None:
            sampling = Sampling(temperature=0.0)
            count = [token async for token in engine.generate(ids, sampling, max_new_tokens=tokens)]
            if len(count) != tokens:
                raise RuntimeError(f"{len(count)} tokens; wanted are {tokens}")

        async def answers() -> Taken:
            await answer(prompts[0])
            wall, processor = time.perf_counter(), time.process_time()
            await asyncio.gather(*map(answer, prompts))
            return Taken(time.perf_counter() - wall, time.process_time() - processor)

        engine.start()
        try:
            return asyncio.run(answers())
        finally:
            engine.stop()
            self.model.train()


def masked_loop(rows_NH: Tensor, weights_Nk: Tensor, experts_Nk: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """Return what `mixture` does, as public code for mixtures of experts computes it."""
    total = torch.zeros_like(rows_NH)
    chosen_EkN = one_hot(experts_Nk, len(experts)).permute(2, 1, 0)
    for number, expert in enumerate(experts):
        slot, row = torch.where(chosen_EkN[number])
        total.index_add_(0, row, expert(rows_NH[row]) * weights_Nk[row, slot, None].to(rows_NH.dtype))
    return total


class Stacked(nn.Module):
    """The experts' weights stacked for torch's grouped matrix product; expert 0 apart, as it is frozen."""

    def __init__(self, experts: Sequence[LlamaMLP]):
        super().__init__()
        self.frozen: dict[str, Tensor] = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            stacked = torch.stack([getattr(expert, name).weight.detach().T.contiguous() for expert in experts])
            self.frozen[name] = stacked[:1].clone()
            self.register_parameter(name, nn.Parameter(stacked[1:].clone()))

    def forward(self, rows_NH: Tensor, weights_Nk: Tensor, experts_Nk: Tensor) -> Tensor:
        """Return what `mixture` does; rows are sorted as there."""
        order = experts_Nk.flatten().argsort(stable=True)
        ends = experts_Nk.flatten().bincount(minlength=1 + len(self.gate_proj)).cumsum(0).to(torch.int32)
        source = order // experts_Nk.shape[1]
        product = partial(self._product, ends=ends)
        pieces = rows_NH.index_select(0, source)
        inner = silu(product(pieces, name="gate_proj")) * product(pieces, name="up_proj")
        weighted = product(inner, name="down_proj") * weights_Nk.flatten()[order, None].to(rows_NH.dtype)
        return torch.zeros_like(rows_NH).index_add(0, source, weighted)

    def _product(self, rows: Tensor, *, name: str, ends: Tensor) -> Tensor:
        return grouped_mm(rows, torch.cat([self.frozen[name], getattr(self, name)]), offs=ends)


def measure_experts(
    size: Size, experts: int, rows: int, dtype_name: str, repetitions: int, threads: int
) -> list[dict[str, Any]]:
    """Return a row per way to compute the experts of one layer, forward and backward, expert 0 frozen.

    Raises:
        SystemExit: they do not compute the same.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    dtype, config = getattr(torch, dtype_name), size.config(rows)
    modules = [LlamaMLP(config).to(dtype) for _ in range(experts)]
    modules[0].requires_grad_(False)
    stacked = Stacked(modules)
    states = torch.randn(rows, size.hidden, dtype=dtype, requires_grad=True)
    weights, chosen = top_k_routing(torch.randn(rows, experts), TOP_K)
    push = torch.randn(rows, size.hidden, dtype=dtype)
    ways: dict[str, Callable[[], Tensor]] = {
        "loop with masks": lambda: masked_loop(states, weights, chosen, modules),
        "sorted slices": lambda: mixture(states, weights, chosen, modules),
        "grouped product": lambda: stacked(states, weights, chosen),
    }
    first = {name: way() for name, way in ways.items()}
    for name, value in first.items():
        close = torch.allclose(
            value, first["loop with masks"], rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2
        )
        if not close:
            raise SystemExit(f"{name}, {dtype_name}: another result than the loop with masks; nothing to compare")

    def both(way: Callable[[], Tensor]) -> None:
        way().backward(push)
        for parameter in (states, *stacked.parameters(), *(p for module in modules for p in module.parameters())):
            parameter.grad = None

    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for number in range(1 + repetitions):
        for name, way in ways.items():
            found = timed(partial(both, way))
            if number:
                taken[name].append(found)
    facts = {"size": size.name, "experts": experts, "tokens": rows, "dtype": dtype_name}
    return [facts | {"what": name, "taken": found} for name, found in taken.items()]


class CaseProcess:
    """A process that holds one case and measures it on demand; a context manager."""

    def __init__(self, work: Work):
        self.work = work
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(work,))

    def ask(self, name: str, *arguments: int) -> Any:
        """Call a method of the case; return what it returns, or else the seconds that it took."""
        return self._pool.submit(_answer, name, arguments).result()

    def __enter__(self) -> "CaseProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


_case: Case


def _begin(work: Work) -> None:
    global _case
    torch.set_num_threads(work.threads)
    _case = Case(work)


def _answer(name: str, arguments: Sequence[int]) -> Any:
    found: list[Any] = []
    taken = timed(lambda: found.append(getattr(_case, name)(*arguments)))
    return taken if found[0] is None else found[0]

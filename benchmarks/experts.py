"""Speed of a model that LayerMoE has expanded, against the dense model that it was made from.

Training: one optimizer step (forward, loss, backward, clip, AdamW) at equal batch and in float32. `dense` trains all
weights, which is what one does without an expansion; `expanded, stage 1` trains new experts and routers, top 2, with
three experts a layer, as the published models have in the mean; `expanded, nothing frozen` is the strategy moe. Of the
dense and of the stage 1 model the loss is measured alone as well (`forward`). Fresh weights, random tokens. The larger
size has SmolLM2-135M's layers, fewer of them, and as much less vocabulary, so that the head keeps its share.

Generation: greedy, with a cache, by transformers' generate and by the engine of tenfold's server, which forms its
batches itself.

Experts: one layer's mixture, forward and backward, expert 0 frozen: `block.mixture` (rows sorted by expert, a slice
for each), the loop with a mask for each expert that public code has, and torch's grouped matrix product.

All of them take turns and medians are compared; dense and expanded models have a process each. The ratios are those of
the seconds that the process had the processor for, which other work on the machine changes less; tokens/s are those of
the wall clock. With one thread and an idle machine they say the same.

    python benchmarks/experts.py --quick
    python benchmarks/experts.py --parts training generation --repetitions 7 --json experts.json
"""

import itertools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import psutil
from expert_cases import DENSE, STAGE_1, TOP_K, UNFROZEN, CaseProcess, Size, Taken, Work, measure_experts
from reporting import Report, Target, argument_parser, median

SMOLLM2 = Size("SmolLM2-135M, 4 of 30 layers", 576, 1536, 4, 9, 3, 49152 * 4 // 30)
SMALL = Size("small", 256, 768, 4, 4, 2, 2048)
EXPERTS, MANY_EXPERTS = 3, 6  # of every layer: the mean of the published models; MoE-LPR's
BATCH, LENGTH = 8, 256
PROMPT, NEW_TOKENS, REQUESTS = 32, 32, (1, 8)
PARTS = ("training", "generation", "experts")
GENERATE, ENGINE = "generate()", "engine"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def medians(taken: Sequence[Taken]) -> Taken:
    """Return the middle of each column."""
    return Taken(median([each.wall for each in taken]), median([each.processor for each in taken]))


def row_of(size: Size, what: str, tokens: int, taken: Sequence[Taken], **more: Any) -> dict[str, Any]:
    """Return a row of the table."""
    middle = medians(taken)
    rate = {"tokens_per_s": tokens / middle.wall, "tokens_per_processor_s": tokens / middle.processor}
    return {"size": size.name, "what": what, "seconds": middle.wall, "processor_s": middle.processor} | rate | more


def with_ratios(rows: list[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """Put each row's speed over that of the row called `against` into it, as `ratio`."""
    (base,) = (row for row in rows if row["what"] == against)
    for row in rows:
        row["ratio"] = row["tokens_per_processor_s"] / base["tokens_per_processor_s"]
    return rows


def measure_training(
    processes: dict[str, CaseProcess], size: Size, repetitions: int, threads: int
) -> list[dict[str, Any]]:
    """Return a row per kind of step and of forward pass; the first round is for warming up."""
    say(f"{size.name}: steps ...")
    work = [(form, "step") for form in processes] + [(form, "forward") for form in (DENSE, STAGE_1)]
    taken: dict[tuple[str, str], list[Taken]] = {each: [] for each in work}
    facts: dict[str, dict[str, Any]] = {}
    for number in range(1 + repetitions):
        for form, name in work:
            found = processes[form].ask(name)
            if number:
                taken[form, name].append(found)
            elif name == "step":
                facts[form] = processes[form].ask("facts")
    losses = [fact["loss"] for fact in facts.values()]
    if max(losses) - min(losses) > 1e-4 * losses[0]:
        raise SystemExit(f"{size.name}: first losses {losses}: not the same model, nothing to compare")
    rows: list[dict[str, Any]] = []
    for name in ("step", "forward"):
        tokens, own = BATCH * LENGTH, [form for form, kind in work if kind == name]
        of_kind = [
            row_of(size, f"{name}: {form}", tokens, taken[form, name], cores=threads, **facts[form]) for form in own
        ]
        rows += with_ratios(of_kind, f"{name}: {DENSE}")
    return rows


def measure_generation(
    processes: dict[str, CaseProcess], size: Size, repetitions: int, threads: int, ways: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row per way to generate, number of prompts, and model; the first round is for warming up."""
    say(f"{size.name}: generation ...")
    work = [(way, batch, form) for way in ways for batch in REQUESTS for form in (DENSE, STAGE_1)]
    taken: dict[tuple[str, int, str], list[Taken]] = {each: [] for each in work}
    for number in range(1 + repetitions):
        for way, batch, form in work:
            name = "generate" if way == GENERATE else "serve"
            found = processes[form].ask(name, batch, PROMPT, NEW_TOKENS)
            if number:
                taken[way, batch, form].append(found)
    rows: list[dict[str, Any]] = []
    for way in ways:
        for batch in REQUESTS:
            prompts = f"{batch} prompt{'s' if batch > 1 else ''}"
            pair = [
                row_of(size, f"{way}, {prompts}: {form}", batch * NEW_TOKENS, taken[way, batch, form], cores=threads)
                for form in (DENSE, STAGE_1)
            ]
            rows += with_ratios(pair, f"{way}, {prompts}: {DENSE}")
    return rows


def measure_models(size: Size, options: Any, repetitions: int) -> list[dict[str, Any]]:
    """Return the rows of training and generation of one size."""
    forms = (DENSE, STAGE_1, UNFROZEN) if "training" in options.parts else (DENSE, STAGE_1)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        processes = {
            form: stack.enter_context(CaseProcess(Work(form, size, EXPERTS, BATCH, LENGTH, options.threads)))
            for form in forms
        }
        if "training" in options.parts:
            rows += measure_training(processes, size, repetitions, options.threads)
        if "generation" in options.parts:
            ways = (GENERATE,) if options.quick else (GENERATE, ENGINE)
            rows += measure_generation(processes, size, repetitions, options.threads, ways)
    return rows


def measure_mixtures(sizes: Sequence[Size], options: Any, repetitions: int) -> list[dict[str, Any]]:
    """Return a row per way to compute the experts of a layer, size, dtype and number of experts."""
    rows: list[dict[str, Any]] = []
    counts = (EXPERTS,) if options.quick else (EXPERTS, MANY_EXPERTS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for size, dtype, experts in itertools.product(sizes, ("float32", "bfloat16"), counts):
            say(f"{size.name}: {experts} experts, {dtype} ...")
            arguments = (size, experts, BATCH * LENGTH, dtype, repetitions, options.threads)
            found = pool.submit(measure_experts, *arguments).result()
            own = [
                row_of(size, each["what"], BATCH * LENGTH, each["taken"], experts=experts, dtype=dtype)
                for each in found
            ]
            for row in with_ratios(own, "loop with masks"):
                row["what"] = f"{experts} experts, {dtype}: {row['what']}"
                rows.append(row)
    return rows


def targets_of(rows: Sequence[dict[str, Any]], sizes: Sequence[Size], parts: Sequence[str]) -> list[Target]:
    """Hold the training steps against the limit, which was set before anything was measured."""
    row, found = {(row["size"], row["what"]): row for row in rows}, []
    if "training" in parts:
        for size, name in zip(sizes, ("smollm2", "small") if len(sizes) > 1 else ("small",), strict=True):
            stage_1 = row[size.name, f"step: {STAGE_1}"]
            reason = f"top {TOP_K} of {EXPERTS}; the original FFN got {stage_1['base_share']:.0%} of the rows"
            found.append(
                Target(f"training_speed_over_dense_{name}", stage_1["ratio"], 0.6, at_most=False, reason=reason)
            )
    return found


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argument_parser("Speed of a model that LayerMoE has expanded, against the dense one.")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--repetitions", type=int, default=5, help="of everything, in turn, after a warm-up")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    options = parser.parse_args()

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(options.threads)}
    sizes = [SMALL] if options.quick else [SMOLLM2, SMALL]
    repetitions = min(3, options.repetitions) if options.quick else options.repetitions
    report = Report(
        "experts",
        {
            "experts a layer": EXPERTS,
            "top": TOP_K,
            "batch": f"{BATCH} x {LENGTH} tokens",
            "dtype": "float32 where no other is named",
            "threads": options.threads,
            "repetitions": repetitions,
            "share of the cores busy before": f"{psutil.cpu_percent(interval=2):.0f} %",
        },
    )
    if "training" in options.parts or "generation" in options.parts:
        for size in sizes:
            report.rows += measure_models(size, options, repetitions)
    if "experts" in options.parts:
        report.rows += measure_mixtures(sizes, options, repetitions)
    report.targets = targets_of(report.rows, sizes, options.parts)
    report.show(
        {
            "size": "size",
            "what": "what",
            "tokens_per_s": "tokens/s",
            "tokens_per_processor_s": "tokens/processor s",
            "ratio": "/ dense or loop",
            "trained": "trained weights",
            "base_share": "expert 0's rows",
        }
    )
    return report.finish(options.json)


if __name__ == "__main__":
    raise SystemExit(main())

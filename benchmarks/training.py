"""Speed and memory of distillation training, on the demo's models and data.

Steps: one optimizer step (collate, forward, loss, backward, clip, AdamW) with tenfold's own module against the same
step written with transformers alone. Same models, rows, float32 and threads; every step has a process of its own, they
take turns, and medians are compared. By default tenfold lets the teacher read the data once and keeps its states; what
that pass costs and after how many epochs it is paid back is measured as well. `step GiB` is the peak of the storages
that a step creates (weights, teacher and AdamW's moments excluded, gradients included, counted as in losses.py),
`process GiB` the peak resident memory of its process while it steps.

Jobs: the same rows in the same order, 16 a step, in a bare loop on one core, in the platform's Trainer, and as the
platform runs it (Ray Train, DeepSpeed ZeRO-2) on 1 and on 2 workers of one core each. `start s` is from the call to
the first step. Two bare loops at once, half of the rows each, exchange nothing: what is missing to twice the speed in
them is not the platform's. A step has parts that half of the rows do not halve (AdamW, the head's gradient).

Two tokenizers: DSKDv2 with exact token alignment (v2+ETA), at the student's vocabulary and at a large one. See
training_cross.py; its `step GiB` and `/ naive` are of forward passes, loss and backward, without the optimizer.

AlignDistil: its loss from hidden states against full logits (`/ naive`), and an off-policy step against what it
consists of, at a vocabulary of 151,936. See training_align.py.

`--quick` measures steps alone: the starts of Ray's workers and the naive loss at a large vocabulary take too long.

    python benchmarks/training.py --quick
    python benchmarks/training.py --parts two_tokenizers aligndistil
    python benchmarks/training.py --repetitions 7 --cycles 3 --json training.json
"""

import os
import sys
import tempfile
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from reporting import Report, Target, argument_parser, median
from training_align import align_targets, measure_align
from training_cross import cross_targets, measure_cross
from training_jobs import (
    BATCH,
    JobTimes,
    Schedule,
    bare_loops,
    platform_job,
    trainer_alone,
    window_tokens,
)
from training_steps import States, StepProcess, Work, memory, step_name, teacher_pass, timed, training_rows

NAIVE = ("naive", "kl", "live")
CACHED = ("tenfold", "kl", "cached")
LIVE = ("tenfold", "kl", "live")
STEPS = [
    NAIVE,
    ("naive", "kl", "cached"),
    LIVE,
    CACHED,
    ("tenfold", "dual_space_v2", "live"),
    ("tenfold", "dual_space_v2", "cached"),
]
QUICK_STEPS = [NAIVE, LIVE, CACHED]
QUICK_ROWS = 4 * BATCH
PARTS = ("steps", "jobs", "two_tokenizers", "aligndistil")
BARE, ALONE, CEILING = "bare loop, 1 core", "Trainer alone, 1 core", "two bare loops, 1 core each"
PLATFORM = {1: "Ray + DeepSpeed, 1 worker", 2: "Ray + DeepSpeed, 2 workers"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_steps(
    steps: list[tuple[str, str, str]], states: States, threads: int, *, num_batches: int, repetitions: int
) -> list[dict[str, Any]]:
    """Return a row per step: all are warmed up, then they take turns, then their memory is taken."""
    batches = [range(number * BATCH, (number + 1) * BATCH) for number in range(num_batches)]
    lengths = training_rows(states.config())["length"]
    tokens = sum(lengths[row] for rows in batches for row in rows)
    works = [Work(form, objective, teacher, threads, states) for form, objective, teacher in steps]
    with ExitStack() as stack:
        processes = [stack.enter_context(StepProcess(work)) for work in works]
        for process in processes:
            process.finish()
        say(f"{len(steps)} kinds of step, {repetitions} x {num_batches} each ...")
        losses = [process.ask(timed, batches[:1])[1] for process in processes]
        seconds: list[list[float]] = [[] for _ in processes]
        for _ in range(repetitions):
            for process, measured in zip(processes, seconds, strict=True):
                measured.append(process.ask(timed, batches)[0])
        peaks = [process.ask(memory, batches) for process in processes]
    rows = []
    for work, loss, measured, (created, resident) in zip(works, losses, seconds, peaks, strict=True):
        if work.objective == "kl" and abs(loss - losses[0]) > 1e-4 * abs(losses[0]):
            raise SystemExit(f"{work.name}: loss {loss}, naive {losses[0]}: not the same step, nothing to compare")
        rows.append(
            {
                "what": work.name,
                "cores": threads,
                "tokens_per_s": tokens / median(measured),
                "step_s": median(measured) / num_batches,
                "step_gib": created / 2**30,
                "process_gib": None if resident is None else resident / 2**30,
                "loss": loss,
            }
        )
    for row in rows:
        row["speed_ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        row["memory_ratio"] = row["step_gib"] / rows[0]["step_gib"]
    return rows


def pass_row(
    rows: list[dict[str, Any]], num_tokens: int, seconds: float, threads: int, num_epochs: float
) -> dict[str, Any]:
    """Return the row of the teacher's pass: after how many epochs the cached step has made up for it.

    Also how the cached step compares with the naive one when the pass is spread over `num_epochs`.
    """
    speed = {row["what"]: row["tokens_per_s"] for row in rows}
    with_pass = 1 / (1 / speed[step_name(*CACHED)] + seconds / num_tokens / num_epochs)
    with_pass_ratio = with_pass / speed[step_name(*NAIVE)]

    def epochs(other: tuple[str, str, str]) -> float:
        # per token: pass / (other step - cached step); never where the cached step is not quicker
        saved = 1 / speed[step_name(*other)] - 1 / speed[step_name(*CACHED)]
        return seconds / num_tokens / saved if saved > 0 else float("inf")

    return {
        "what": f"teacher reads {num_tokens} tokens once",
        "cores": threads,
        "tokens_per_s": num_tokens / seconds,
        "seconds": seconds,
        "epochs_over_naive": epochs(NAIVE),
        "epochs_over_live": epochs(LIVE),
        "with_pass_ratio": with_pass_ratio,
        "note": f"paid back after {epochs(NAIVE):.2f} epochs (naive), {epochs(LIVE):.2f} (tenfold live); "
        f"with it, over {num_epochs:g} epochs, kl is {with_pass_ratio:.2f} x naive",
    }


def measure_jobs(states: States, schedule: Schedule, cycles: int) -> list[dict[str, Any]]:
    """Return a row per job; every cycle runs each of them once, a Ray cluster only where one is needed."""
    from tenfold.platform import cluster

    tokens = window_tokens(states, schedule)
    times: dict[str, list[JobTimes]] = {name: [] for name in (BARE, CEILING, ALONE, *PLATFORM.values())}
    for _ in range(cycles):
        say("bare loops ...")
        single, double = bare_loops(states, schedule, tokens)
        times[BARE].append(single)
        times[CEILING].append(double)
        say(f"{ALONE} ...")
        times[ALONE].append(trainer_alone(states, schedule, tokens))
        cluster.connect()
        try:
            for workers, name in PLATFORM.items():
                say(f"{name} ...")
                times[name].append(platform_job(states, schedule, tokens, workers))
        finally:
            cluster.shutdown()
        check_same_work(*(times[name][-1].first_loss for name in PLATFORM.values()))
    mean_tokens = sum(tokens[1:]) / (len(tokens) - 1) / schedule.steps
    rows = []
    for name, measured in times.items():
        rate = median([job.rate() for job in measured])
        starts = [job.start_s for job in measured if job.start_s is not None]
        rows.append(
            {
                "what": name,
                "cores": 2 if name in (CEILING, PLATFORM[2]) else 1,
                "tokens_per_s": rate,
                "step_s": mean_tokens / rate,
                "start_s": median(starts) if starts else None,
                "windows": [job.rates for job in measured],
            }
        )
    bare = rows[0]
    for row in rows:
        row["over_bare_ratio"] = row["tokens_per_s"] / bare["tokens_per_s"]
        row["added_s"] = row["step_s"] - bare["step_s"]
    return rows


def check_same_work(one: float | None, two: float | None) -> None:
    """Make sure that 1 and 2 workers trained the same: equal losses up to the order of sums."""
    if one is None or two is None or abs(one - two) > 1e-3 * abs(one):
        raise SystemExit(f"mean loss of the first steps: {one} on 1 worker, {two} on 2; nothing to compare")


def step_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Hold the measured ratios against the limits; the limits were set before anything was measured."""
    row = {row["what"]: row for row in rows}
    cached, live = row[step_name(*CACHED)], row[step_name(*LIVE)]
    return [
        Target("step_cached_teacher_speed_over_naive", cached["speed_ratio"], 1.5, at_most=False),
        Target("step_live_teacher_speed_over_naive", live["speed_ratio"], 1.0, at_most=False),
        Target(
            "step_peak_memory_over_naive",
            max(cached["memory_ratio"], live["memory_ratio"]),
            0.5,
            reason="kl, the worse of cached and live",
        ),
    ]


def job_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Hold two workers against one; the limit was set before anything was measured."""
    row = {row["what"]: row for row in rows}
    one, two, ceiling = (row[name]["over_bare_ratio"] for name in (PLATFORM[1], PLATFORM[2], CEILING))
    reason = f"two bare loops reach {ceiling:.2f} x one"
    return [Target("two_workers_speed_over_one", two / one, 1.5, at_most=False, reason=reason)]


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argument_parser("Speed and memory of distillation training, on the demo's models and data.")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the steps; jobs take 1 a core"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of each kind of step, in turn, after a warm-up")
    parser.add_argument("--cycles", type=int, default=2, help="times that every job is run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    options = parser.parse_args()

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ADDRESS"] = "local"  # a cluster that others use would be measured with their work on it
    torch.set_num_threads(options.threads)
    steps, num_batches, repetitions, rows = STEPS, 3, options.repetitions, None
    schedule, parts = Schedule(windows=6, steps=5), options.parts
    if options.quick:
        steps, num_batches, repetitions, rows, parts = QUICK_STEPS, 1, 3, QUICK_ROWS, ["steps"]
    report = Report(
        "training",
        {
            "batch": BATCH,
            "dtype": "float32",
            "threads of a step": options.threads,
            "batches x repetitions of a step": f"{num_batches} x {repetitions}",
            "steps of a job": f"{schedule.windows} x {schedule.steps}, the first {schedule.steps} to warm up",
            "cycles": options.cycles if "jobs" in parts else 0,
            "share of the cores busy before": f"{psutil.cpu_percent(interval=2):.0f} %",
        },
    )
    with tempfile.TemporaryDirectory(prefix="tenfold-benchmark-") as cache:
        if "steps" in parts or "jobs" in parts:
            say("the teacher reads the rows ...")
            states, seconds = teacher_pass(States(rows, cache))
        if "steps" in parts:
            found = measure_steps(steps, states, options.threads, num_batches=num_batches, repetitions=repetitions)
            num_tokens = sum(training_rows(states.config())["length"])
            num_epochs = states.config().training.num_train_epochs
            report.rows += [*found, pass_row(found, num_tokens, seconds, options.threads, num_epochs)]
            report.targets += step_targets(found)
        if "jobs" in parts:
            found = measure_jobs(states, schedule, options.cycles)
            report.rows += found
            report.targets += job_targets(found)
    if "two_tokenizers" in parts:
        found = measure_cross(options.threads, repetitions)
        report.rows += found
        report.targets += cross_targets(found)
    if "aligndistil" in parts:
        found = measure_align(options.threads, repetitions)
        report.rows += found
        report.targets += align_targets(found)
    report.show(
        {
            "what": "what",
            "cores": "cores",
            "tokens_per_s": "tokens/s",
            "speed_ratio": "/ naive",
            "step_s": "step s",
            "step_gib": "step GiB",
            "memory_ratio": "/ naive",
            "process_gib": "process GiB",
            "over_bare_ratio": "/ bare",
            "added_s": "added s",
            "start_s": "start s",
            "note": "note",
        }
    )
    return report.finish(options.json)


if __name__ == "__main__":
    raise SystemExit(main())

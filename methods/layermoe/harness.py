"""The benchmarks of the paper (section 5.4 of LayerMoE, arXiv 2505.22582), run by EleutherAI's lm-evaluation-harness.

The harness is not among the package's dependencies. It downloads the benchmarks; this module only names them.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# random, numpy, torch, few-shot: the official `--seed 0,1234,1234,1234`
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@dataclass(frozen=True)
class HarnessTask:
    """One benchmark in one language.

    Attributes:
        benchmark: its name in the paper.
        language: ISO 639-1 code.
        task: what the harness calls it.
        shots: examples in a prompt.
        metric: what is read; whether the paper reports acc or acc_norm is not known. acc_norm where the predecessor's
            base score suggests it.
        is_stock: the harness (0.4.13) has it; else its definition is in the paper's own copy of the harness, and must
            be given in a folder.
    """

    benchmark: str
    language: str
    task: str
    shots: int
    metric: str
    is_stock: bool = True


def _tasks(
    benchmark: str, shots: int, metric: str, names: Mapping[str, str], own: Sequence[str] = ()
) -> list[HarnessTask]:
    return [HarnessTask(benchmark, code, name, shots, metric, code not in own) for code, name in names.items()]


LANGUAGES = ("en", "es", "zh", "el", "hu", "tr", "bn", "hi", "ne")
TASKS: tuple[HarnessTask, ...] = (
    *_tasks(
        "ARC-Challenge",
        25,
        "acc_norm",
        {"en": "arc_challenge", **{code: f"arc_{code}" for code in LANGUAGES[1:]}},
        own=("el", "tr"),
    ),
    *_tasks("MMLU", 5, "acc", {"en": "mmlu", "es": "m_mmlu_es", "zh": "cmmlu", "hu": "m_mmlu_hu"}),
    *_tasks("MMLU", 5, "acc", {"el": "mmlu_el"}, own=("el",)),
    *_tasks("MMLU", 4, "acc", {"tr": "mmlu_tr"}, own=("tr",)),
    *_tasks("MMLU", 5, "acc", {code: f"m_mmlu_{code}" for code in ("bn", "hi", "ne")}),
    *_tasks(
        "HellaSwag",
        10,
        "acc_norm",
        {"en": "hellaswag", **{code: f"hellaswag_{code}" for code in LANGUAGES[1:]}},
        own=("zh", "el", "tr"),
    ),
    *_tasks(
        "Belebele",
        5,
        "acc",
        {
            code: f"belebele_{name}"
            for code, name in zip(
                LANGUAGES,
                (
                    *("eng_Latn", "spa_Latn", "zho_Hans", "ell_Grek", "hun_Latn"),
                    *("tur_Latn", "ben_Beng", "hin_Deva", "npi_Deva"),
                ),
                strict=True,
            )
        },
    ),
)


def tasks_of(
    languages: Sequence[str], *, benchmarks: Sequence[str] | None = None, with_own: bool = False
) -> list[HarnessTask]:
    """Return the tasks of some languages.

    Args:
        languages: ISO 639-1 codes; those without tasks give none.
        benchmarks: names as in the paper; default: all.
        with_own: also those whose definition the harness does not have.
    """
    return [
        task
        for task in TASKS
        if task.language in languages
        and (benchmarks is None or task.benchmark in benchmarks)
        and (with_own or task.is_stock)
    ]


def check_harness(option: str) -> None:
    """Make sure that the harness can be used here.

    Args:
        option: the one by which the user asked for it, for the message.

    Raises:
        ConfigError: the package is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{option}: the benchmarks run in lm-evaluation-harness, which is not installed here. "
            f"Run: pip install 'tenfold[languages]', or leave {option} out"
        )


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[HarnessTask],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    definitions: Path | None = None,
) -> dict[HarnessTask, float]:
    """Return task -> score, 0 to 1; the harness downloads what it has not yet.

    Args:
        model: dense or expanded, in memory: the harness needs to know nothing of how it is loaded.
        tokenizer: the model's.
        tasks: what to run; tasks with equally many examples run together.
        batch_size: requests at once.
        limit: first documents of a task; default: all. For trials only.
        definitions: folder with the definitions of tasks that the harness does not have.

    Raises:
        ConfigError: the harness is missing, or a task needs a definition and no folder is given.
    """
    check_harness("harness")
    own = [task.task for task in tasks if not task.is_stock]
    if own and definitions is None:
        raise ConfigError(
            f"{', '.join(own)}: lm-evaluation-harness has no such tasks; they are in the paper's own copy. Give the "
            "folder with their definitions, or leave these tasks out"
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager(include_path=None if definitions is None else str(definitions))
    scores: dict[HarnessTask, float] = {}
    for shots in sorted({task.shots for task in tasks}):
        together = [task for task in tasks if task.shots == shots]
        found: Any = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[task.task for task in together],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
            **SEEDS,
        )
        # a task of many parts (mmlu, cmmlu) has its mean under its own name in either of the two
        results = {**found["results"], **(found.get("groups") or {})}
        scores |= {task: float(results[task.task][f"{task.metric},none"]) for task in together}
    return scores


def harness_metrics(scores: Mapping[HarnessTask, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return scores times 100: of each task, and per group the means over its languages, then over benchmarks.

    Args:
        scores: of `run_harness`.
        groups: old, new and earlier -> languages.

    Returns:
        `harness/TASK`; `harness/GROUP/BENCHMARK`; `harness/GROUP/average`.
    """
    metrics = {f"harness/{task.task}": 100 * value for task, value in scores.items()}
    for group, languages in groups.items():
        by_benchmark: dict[str, list[float]] = {}
        for task, value in scores.items():
            if task.language in languages:
                by_benchmark.setdefault(task.benchmark, []).append(100 * value)
        means = {name: statistics.fmean(values) for name, values in by_benchmark.items()}
        metrics |= {f"harness/{group}/{name}": value for name, value in means.items()}
        if means:
            metrics[f"harness/{group}/average"] = statistics.fmean(means.values())
    return metrics

"""The paper's benchmarks: which tasks, how the harness is asked, means."""

import importlib.machinery
import importlib.util
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from tenfold.methods.layermoe.harness import (
    TASKS,
    HarnessTask,
    check_harness,
    harness_metrics,
    run_harness,
    tasks_of,
)
from tenfold.platform.errors import ConfigError


def test_every_benchmark_is_there_in_every_language_with_the_papers_examples():
    assert len(set(TASKS)) == len(TASKS) == 36
    assert Counter(task.benchmark for task in TASKS) == dict.fromkeys(
        ["ARC-Challenge", "MMLU", "HellaSwag", "Belebele"], 9
    )
    assert {(task.benchmark, task.shots) for task in TASKS if task.language != "tr"} == {
        ("ARC-Challenge", 25),
        ("MMLU", 5),
        ("HellaSwag", 10),
        ("Belebele", 5),
    }
    by_key = {(task.benchmark, task.language): task for task in TASKS}
    assert by_key["MMLU", "tr"].shots == 4
    assert by_key["MMLU", "zh"].task == "cmmlu"
    assert by_key["Belebele", "ne"].task == "belebele_npi_Deva"
    assert by_key["ARC-Challenge", "en"].task == "arc_challenge"
    own = {task.task for task in TASKS if not task.is_stock}
    assert own == {"arc_el", "arc_tr", "mmlu_el", "mmlu_tr", "hellaswag_zh", "hellaswag_el", "hellaswag_tr"}


def test_tasks_are_chosen_by_language_and_benchmark():
    assert [task.task for task in tasks_of(["el"])] == ["belebele_ell_Grek"]
    assert len(tasks_of(["el", "hu"], with_own=True)) == 8
    assert [task.task for task in tasks_of(["en", "xx"], benchmarks=["MMLU", "HellaSwag"])] == ["mmlu", "hellaswag"]


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm_eval 0.4.13 that notes how it is called; tasks score by their number of examples."""
    calls = []

    def simple_evaluate(model, tasks, num_fewshot, **given):
        calls.append({"model": model, "tasks": tasks, "num_fewshot": num_fewshot, **given})
        scores = {task: {"acc,none": num_fewshot / 100, "acc_norm,none": num_fewshot / 50} for task in tasks}
        groups = {task: scores.pop(task) for task in list(scores) if task == "cmmlu"}
        return {"results": scores, "groups": groups} if groups else {"results": scores}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")}
    modules["lm_eval"].__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = lambda **given: given
    modules["lm_eval.tasks"].TaskManager = lambda include_path: include_path
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    return calls


def test_tasks_with_equally_many_examples_run_together_with_the_official_seeds(harness):
    tasks = tasks_of(["en", "zh"], benchmarks=["ARC-Challenge", "MMLU", "Belebele"])
    scores = run_harness("model", "tokenizer", tasks, batch_size=3, limit=9)
    assert [(call["num_fewshot"], call["tasks"]) for call in harness] == [
        (5, ["mmlu", "cmmlu", "belebele_eng_Latn", "belebele_zho_Hans"]),
        (25, ["arc_challenge", "arc_zh"]),
    ]
    call = harness[0]
    assert call["model"] == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 3}
    seeds = [call[f"{name}_seed"] for name in ("random", "numpy_random", "torch_random", "fewshot_random")]
    assert seeds == [0, 1234, 1234, 1234]
    assert (call["limit"], call["task_manager"]) == (9, None)
    assert {task.task: value for task, value in scores.items()} == {
        **dict.fromkeys(["mmlu", "cmmlu", "belebele_eng_Latn", "belebele_zho_Hans"], 0.05),
        **dict.fromkeys(["arc_challenge", "arc_zh"], 0.5),
    }


def test_tasks_that_the_harness_lacks_need_their_definitions(harness):
    tasks = tasks_of(["el"], benchmarks=["ARC-Challenge"], with_own=True)
    with pytest.raises(ConfigError, match="arc_el: lm-evaluation-harness has no such tasks"):
        run_harness("model", "tokenizer", tasks)
    assert run_harness("model", "tokenizer", tasks, definitions=Path("own")) == {tasks[0]: 0.5}
    assert harness[0]["task_manager"] == "own"


def test_a_missing_harness_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^benchmarks: .* not installed here\. Run: pip install 'tenfold.languages"):
        check_harness("benchmarks")
    with pytest.raises(ConfigError, match="not installed"):
        run_harness(None, None, [])


def test_scores_are_averaged_over_languages_then_benchmarks():
    def task(benchmark, language):
        return HarnessTask(benchmark, language, f"{benchmark}_{language}", 5, "acc")

    scores = {task("A", "en"): 0.2, task("A", "es"): 0.4, task("B", "en"): 0.9, task("A", "el"): 0.5}
    metrics = harness_metrics(scores, {"old": ["en", "es"], "new": ["el"], "earlier": ["bn"]})
    assert metrics == pytest.approx(
        {
            "harness/A_en": 20,
            "harness/A_es": 40,
            "harness/B_en": 90,
            "harness/A_el": 50,
            "harness/old/A": 30,
            "harness/old/B": 90,
            "harness/old/average": 60,
            "harness/new/A": 50,
            "harness/new/average": 50,
        }
    )

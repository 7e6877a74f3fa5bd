"""DSKD trained for three steps by two processes: the same losses and weights under all of DeepSpeed's settings."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.objective import LossSettings, dual_space_v2
from tenfold.methods.dskd.preparation import prepare
from tenfold.platform import cluster
from tenfold.platform.data.examples import load_examples
from tenfold.platform.experiment import check_experiment
from tenfold.platform.losses.divergence import DivergenceOptions
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.run import run
from tenfold.platform.storage import Storage
from tenfold.platform.training.deepspeed_config import deepspeed_config

pytestmark = [pytest.mark.slow]

SCRIPT = Path(__file__).parent.parent / "platform" / "training" / "training_ranks.py"
TEACHER = "sample:models/stories260K"
STEPS = 3
OWN_SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 2000,
    },
}
# what else than the objective of the same name
CASES = {
    "cma": {"objective": "dual_space_v1", "two_tokenizers": True},
    "eta": {"objective": "dual_space_v2", "two_tokenizers": True},
    "uld": {"two_tokenizers": True},
    "lora": {"objective": "dual_space_v2", "lora": {"r": 4, "alpha": 8, "dropout": 0.0}},
    "on_policy": {"objective": "dual_space_v2", "on_policy": {"after_epochs": 0, "ratio": 0.5, "max_new_tokens": 4}},
}
# case, DeepSpeed settings, teacher; the first of each objective is what the others are compared with
COMBINATIONS = [
    ("dual_space_v1", "zero2", "cache"),
    ("dual_space_v1", "zero0", "cache"),
    ("dual_space_v1", "zero3_offload", "cache"),
    ("dual_space_v1", "zero3", "live"),
    ("dual_space_v2", "zero2", "cache"),
    ("dual_space_v2", "zero1", "cache"),
    ("dual_space_v2", "zero3", "cache"),
    ("dual_space_v2", "zero2_offload", "cache"),
    ("dual_space_v2", "zero2", "live"),
    ("dual_space_v2", "zero3", "live"),
    ("dual_space_v2", "own.json", "live"),
    ("cma", "zero2", "cache"),
    ("cma", "zero3", "cache"),
    ("cma", "zero3", "live"),
    ("eta", "zero2", "cache"),
    ("eta", "zero3", "live"),
    ("uld", "zero2", "cache"),
    ("uld", "zero3", "cache"),
    ("on_policy", "zero2", "live"),
    ("on_policy", "zero3", "live"),
    ("lora", "zero2", "cache"),
    ("lora", "zero3", "live"),
    ("lora", "zero1", "offload"),
]
TEACHERS = {
    "cache": {"teacher_mode": "cache"},
    "live": {"teacher_mode": "live"},
    "offload": {"teacher_mode": "live", "teacher_offload": "cpu"},
}
# these leave a checkpoint before the last step, and are resumed from it
RESUMED = [("lora", "zero2", "cache"), ("lora", "zero3", "live")]
ADAPTED = ("q_proj", "v_proj")


def options(student, **more):
    data = {
        "train": [{"path": "sample:instruct/short_instructions.json", "stop": 24}],
        "validation_ratio": 0.2,
        "template": "none",
        "max_length": 64,
        "max_prompt_length": 32,
    }
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # with the default the sign of a gradient of 1e-9 would decide about whole updates
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    own = {"student": student, "teacher": {"model": TEACHER}, "teacher_dtype": "float32", "data": data}
    evaluation = {"seeds": [10], "max_rows": 2, "generation": {"max_new_tokens": 2}}
    return {**own, "training": training, "loss_chunk_rows": 16, "evaluation": evaluation, **more}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return saved_student(tmp_path_factory, TEACHER)


@pytest.fixture(scope="module")
def other_student(tmp_path_factory):
    # its head is its embedding: under ZeRO-3 one parameter that a pass through the model gives back
    return saved_student(tmp_path_factory, "sample:tokenizers/gpt2", tie_word_embeddings=True)


def saved_student(tmp_path_factory, tokenizer, **more):
    """Make a student that has its weights already: under ZeRO-3 fresh ones are drawn in another order."""
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 256}
    fresh = DSKDConfig(**options({"config": shape | more, "tokenizer": tokenizer})).student
    folder = tmp_path_factory.mktemp("student")
    load_causal_lm(fresh, seed=3, dtype="float32").save_pretrained(folder)
    load_tokenizer(fresh).save_pretrained(folder)
    return {"model": str(folder)}


@pytest.fixture(scope="module")
def own_settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed") / "own.json"
    path.write_text(json.dumps(OWN_SETTINGS))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student, other_student, own_settings):
    """Folder of each combination, all trained by one pair of processes."""
    base = tmp_path_factory.mktemp("trained")
    config = DSKDConfig(**options(student))
    here = SimpleNamespace(
        cache=Storage(base / "cache"),
        compute=SimpleNamespace(cpus_per_worker=1, gpus_per_worker=0),
        map=lambda function, items, **_: [function(item) for item in items],
        report=lambda metrics: None,
    )
    splits = load_examples(config.data)
    jobs, folders = [], {}
    for combination in COMBINATIONS:
        case, settings, teacher_mode = combination
        own = {"objective": case, **CASES.get(case, {})}
        who = other_student if own.pop("two_tokenizers", False) else student
        config = DSKDConfig(**options(who, **TEACHERS[teacher_mode], **own))
        folders[combination] = base / "-".join(combination)
        folders[combination].mkdir()
        job = {
            "build": "tenfold.methods.dskd.trainer:build_trainer",
            "config": prepare(config, here, splits),
            "options": config.training.model_dump(mode="json"),
            "deepspeed": deepspeed_config(own_settings if settings == "own.json" else settings),
            "seed": 10,
            "output": str(folders[combination]),
        }
        jobs.append(job)
        if combination in RESUMED:
            job["options"] |= {"save_strategy": "steps", "save_steps": STEPS - 1}
            job["checkpoints"] = str(base / "checkpoints" / "-".join(combination))
            again = folders["resumed", *combination] = base / f"resumed-{'-'.join(combination)}"
            again.mkdir()
            checkpoint = folders["checkpoint", *combination] = checkpoint_of(job["checkpoints"], STEPS - 1)
            jobs.append({**job, "resume": str(checkpoint), "output": str(again)})
    (base / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, str(SCRIPT), str(base / "jobs.json"), "2"], check=True, timeout=900)
    return folders


def checkpoint_of(folder, step):
    return Path(folder) / "out" / f"checkpoint-{step}"


def losses(folder):
    return json.loads((folder / "result.json").read_text())["losses"]


def first_of(combination):
    return next(one for one in COMBINATIONS if one[0] == combination[0])


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_settings_and_teacher_modes_give_the_same_losses(trained, combination):
    found, expected = losses(trained[combination]), losses(trained[first_of(combination)])
    assert len(set(found)) == STEPS
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_saved_student_is_whole_and_has_the_same_weights(trained, student, other_student, combination):
    from transformers import AutoModelForCausalLM

    begun = other_student if "two_tokenizers" in CASES.get(combination[0], {}) else student

    model, found = AutoModelForCausalLM.from_pretrained(
        trained[combination], dtype="float32", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(begun["model"], dtype="float32").state_dict()
    same = AutoModelForCausalLM.from_pretrained(trained[first_of(combination)], dtype="float32").state_dict()
    for name, weight in model.state_dict().items():
        assert weight.shape == before[name].shape
        torch.testing.assert_close(weight, same[name], rtol=1e-5, atol=1e-6, msg=name)
    if combination[0] == "lora":
        changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
        assert changed == {name for name in before if any(part in name for part in ADAPTED)}
        return
    moved = (model.get_output_embeddings().weight - before["lm_head.weight"]).abs().max().item()
    assert moved > 1e-4


@pytest.mark.parametrize("combination", RESUMED, ids="-".join)
def test_adapter_resumed_from_a_checkpoint_ends_as_if_nothing_had_happened(trained, combination):
    from safetensors.torch import load_file

    assert losses(trained["resumed", *combination]) == losses(trained[combination])
    weights = load_file(trained[combination] / "model.safetensors")
    again = load_file(trained["resumed", *combination] / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@pytest.mark.parametrize("combination", RESUMED, ids="-".join)
def test_checkpoint_of_an_adapter_has_plain_merged_weights_and_no_frozen_ones_in_deepspeeds_state(
    trained, combination
):
    checkpoint = trained["checkpoint", *combination]
    names = load_causal_lm(ModelSource(model=str(checkpoint)), dtype="float32").state_dict()
    assert not any("lora" in name for name in names)
    # the pickled part of torch's files holds the names of all tensors: read as bytes
    states = [zipfile.ZipFile(path) for path in sorted(checkpoint.glob(f"global_step{STEPS - 1}/*.pt"))]
    pickled = b"".join(file.read(name) for file in states for name in file.namelist() if name.endswith("data.pkl"))
    assert b"q_proj.lora_A.default.weight" in pickled
    assert b"t2s.weight" in pickled
    assert b"embed_tokens.weight" not in pickled
    assert b"base_layer.weight" not in pickled


@pytest.mark.parametrize("spaces", ["both", "student", "teacher"])
def test_v2_finds_the_teachers_prediction_by_itself(spaces):
    draw = torch.Generator().manual_seed(0)
    rows, columns, small, large = 7, 11, 4, 6

    def tensor(*shape):
        return torch.randn(*shape, generator=draw)

    student_head, teacher_head, teacher = tensor(columns, small), tensor(columns, large), tensor(rows, large)
    states = (tensor(rows, small), student_head, teacher, teacher_head, tensor(rows, small), tensor(rows, large))
    labels = torch.randint(columns, (rows,), generator=draw)
    settings = LossSettings("forward_kl", DivergenceOptions(temperature=2.0), 0.5, columns - 1, 3)
    best = (teacher @ teacher_head[: columns - 1].T).argmax(1)
    given, found = (
        dual_space_v2(*states, prediction, labels, torch.tensor(7.0), settings, spaces=spaces)
        for prediction in (best, None)
    )
    torch.testing.assert_close(found.total, given.total)
    assert found.parts.keys() == given.parts.keys()
    for name, part in given.parts.items():
        torch.testing.assert_close(found.parts[name], part)


@pytest.mark.ray
def test_a_launched_run_with_own_settings_and_a_live_teacher_gives_the_same_losses(
    trained, student, own_settings, tmp_path, tracking_uri
):
    from mlflow import MlflowClient

    uri = tracking_uri(tmp_path)
    config = options(student, objective="dual_space_v2", teacher_mode="live")
    loaded = check_experiment(
        {
            "name": "own-settings",
            "method": "dskd",
            "config": config,
            "compute": {"workers": 2, "deepspeed": own_settings, "max_failures": 0},
            "storage": str(tmp_path / "runs"),
            "tracking": {"uri": uri},
        },
        "own-settings",
    )
    cluster.connect(num_cpus=2, include_dashboard=False)
    try:
        result = run(loaded)
    finally:
        cluster.shutdown()
    history = MlflowClient(uri).get_metric_history(result.mlflow_run_id, "train/loss")
    found = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
    assert found == pytest.approx(losses(trained["dual_space_v2", "own.json", "live"]), rel=1e-5)

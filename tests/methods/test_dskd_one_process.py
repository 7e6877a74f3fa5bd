"""DSKD from data to trained student with real tokenizers, in one process: every objective, exact means of a step."""

from types import SimpleNamespace

import pytest
import torch
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.method import DSKD
from tenfold.methods.dskd.pairing import pair_rows
from tenfold.methods.dskd.preparation import find_alignment, prepare
from tenfold.methods.dskd.trainer import build_trainer
from tenfold.platform.data.examples import load_examples
from tenfold.platform.errors import DataError, ModelError
from tenfold.platform.models.randomness import seeded
from tenfold.platform.storage import Storage
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.worker import WorkerContext

TEACHER = "sample:models/stories260K"
OTHER_TOKENIZER = "sample:tokenizers/gpt2"
SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "max_position_embeddings": 256}


def options(objective, *, rows=4, passes=1, steps=4, learning_rate=1e-2, adam_epsilon=1e-8, **more):
    training = {"max_steps": steps, "per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    training |= {"learning_rate": learning_rate, "adam_epsilon": adam_epsilon, "logging_steps": 1}
    training |= {"eval_strategy": "no", "save_strategy": "no"}
    data = {"train": [{"path": "sample:instruct/short_instructions.json", "stop": 10}], "validation_ratio": 0.2}
    data |= {"template": "alpaca", "max_length": 256, "max_prompt_length": 200}
    own = {"student": {"config": SHAPE, "tokenizer": OTHER_TOKENIZER}, "teacher": {"model": TEACHER}, "data": data}
    own |= {"teacher_dtype": "float32", "objective": objective, "training": training, "loss_chunk_rows": 32}
    own |= {"seqkd_generation": {"max_new_tokens": 4}}
    return DSKDConfig.model_validate(own | more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stands in for a run: independent pieces are done here, one after the other."""
    return SimpleNamespace(
        cache=Storage(tmp_path_factory.mktemp("cache")),
        compute=SimpleNamespace(max_workers=1, cpus_per_worker=1, gpus_per_worker=0),
        map=lambda function, items, **_: [function(item) for item in items],
        report=lambda metrics: None,
    )


@pytest.fixture
def make(run, local_arguments):
    def trainer(config):
        payload = prepare(config, run, load_examples(config.data))
        return build_trainer(WorkerContext(payload, TrainingOptions(), local_arguments(config.training), 1, 0, 1, {}))

    return trainer


@pytest.fixture
def train(make):
    """Train to the end; returns the trainer."""

    def finished(config):
        trainer = make(config)
        with seeded(1):
            trainer.train()
        return trainer

    return finished


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


OBJECTIVES = ["sft", "seqkd", "dual_space_v1", "dual_space_v2", "overlap_kd", "uld", "mined"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_all_its_parts(make, objective):
    trainer = make(options(objective))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    with seeded(1):
        trainer.train()
    losses = logged(trainer)
    assert len(losses) == 4
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < losses[0]
    unchanged = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []


@pytest.mark.parametrize("objective", ["dual_space_v1", "dual_space_v2", "overlap_kd", "uld", "mined"])
def test_a_cached_teacher_gives_the_loss_of_a_live_one(make, objective):
    losses = []
    for mode in ("cache", "live"):
        trainer = make(options(objective, teacher_mode=mode))
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
        trainer.model.train()
        losses.append(trainer.model(**batch)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("objective", ["dual_space_v1", "overlap_kd", "uld", "mined"])
def test_splitting_a_batch_gives_the_same_gradient(make, objective):
    module = make(options(objective))
    rows = [module.train_dataset[index] for index in range(4)]
    student = module.model
    student.train()

    def gradient(parts):
        student.zero_grad()
        for part in parts:
            student(**module.data_collator(part), num_items_in_batch=100)["loss"].backward()
        return student.exported.get_input_embeddings().weight.grad.clone()

    whole, split = gradient([rows]), gradient([rows[:1], rows[1:]])
    # CMA normalises by deviations over the micro-batch: there the parts differ, as the paper's own code does
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-6) == (objective != "dual_space_v1")


@pytest.mark.parametrize(
    ("objective", "tokenizer"),
    [("dual_space_v2", OTHER_TOKENIZER), ("dual_space_v2", TEACHER), ("kl", TEACHER), ("overlap_kd", OTHER_TOKENIZER)],
)
def test_on_policy_training_compares_on_what_the_student_writes(train, objective, tokenizer):
    own = {"after_epochs": 1, "ratio": 1.0, "max_new_tokens": 6}
    student = {"config": SHAPE, "tokenizer": tokenizer}
    trainer = train(options(objective, teacher_mode="live", on_policy=own, student=student))
    # 8 rows, 4 a step: the second epoch begins with the third step
    assert ["on_policy_" in " ".join(entry) for entry in logs(trainer)] == [False, False, True, True]


def test_pairs_of_a_generated_response_that_is_cut_count_what_is_left_of_it(make, monkeypatch):
    from tenfold.methods.dskd import on_policy
    from tenfold.platform.data.positions import next_labels

    more = {"teacher_mode": "live", "on_policy": {"max_new_tokens": 500}}
    trainer = make(options("dual_space_v2", **more))
    rollout, tokenizer = trainer._rollout, trainer.processing_class
    rows = [trainer.train_dataset[index] for index in range(3)]
    text = "One day a little dog saw a big red ball in the park. " * 30
    answers = [tokenizer(text)["input_ids"], tokenizer("A dog.")["input_ids"] + [tokenizer.eos_token_id], []]
    monkeypatch.setattr(on_policy, "generate_tokens", lambda *given, **_: answers)
    batch = rollout.generate(None, trainer.data_collator(rows), seed=1)
    own, theirs = next_labels(batch["labels"]), next_labels(batch["teacher_labels"])
    counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    assert batch["input_ids"].shape[1] == 256
    assert len(answers[0]) > counts[0] > 0
    assert counts[1:] == [len(answers[1]), 0]
    ends = [tokenizer.eos_token_id, rollout._teacher_tokenizer.eos_token_id]
    assert (own == ends[0]).sum() == (theirs == ends[1]).sum() == 1  # a response that was cut has none
    assert batch["student_pairs"].max() < len(own)
    assert batch["teacher_pairs"].max() < len(theirs)
    pairs = zip(own[batch["student_pairs"]].tolist(), theirs[batch["teacher_pairs"]].tolist(), strict=True)
    strings = [(tokenizer.decode([a]).strip(), rollout._teacher_tokenizer.decode([b]).strip()) for a, b in pairs]
    assert len(strings) > 20
    assert all(a == b or (a, b) == (tokenizer.eos_token, "</s>") for a, b in strings)


@pytest.mark.parametrize(("tokenizer", "mode"), [(OTHER_TOKENIZER, "cache"), (TEACHER, "live")])
def test_exact_means_do_not_depend_on_the_accumulation(train, tokenizer, mode):
    # the teacher itself as the student agrees with it at first, a fresh one hardly ever
    student = {"model": TEACHER} if tokenizer == TEACHER else {"config": SHAPE, "tokenizer": tokenizer}
    more = {"student": student, "teacher_mode": mode, "normaliser": "global", "steps": 2, "learning_rate": 1e-3}
    whole, split = (
        train(options("dual_space_v2", rows=rows, passes=4 // rows, adam_epsilon=1e-4, **more)) for rows in (4, 1)
    )
    assert logged(whole) == pytest.approx(logged(split), rel=1e-4)
    for name in ("student_space", "t2s_ce", "teacher_space", "t2s_agreement"):
        assert logged(whole, name) == pytest.approx(logged(split, name), rel=1e-4, abs=1e-6, nan_ok=True), name
    assert (logged(whole, "t2s_agreement")[0] > 0) == (tokenizer == TEACHER)
    for (name, one), other in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("std", ["masked", "batch"])
def test_cross_model_attention_trains_on_what_the_student_writes(train, std):
    own = {"after_epochs": 1, "ratio": 1.0, "max_new_tokens": 6}
    log = logs(train(options("dual_space_v1", teacher_mode="live", on_policy=own, cma_std=std)))
    assert ["on_policy_t2s_ce" in entry for entry in log] == [False, False, True, True]
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log)


def test_exact_means_of_a_step_that_generates_in_some_passes(train):
    own = {"after_epochs": 0, "ratio": 0.5, "max_new_tokens": 6}
    more = {"teacher_mode": "live", "on_policy": own, "normaliser": "global"}
    log = logs(train(options("dual_space_v2", rows=1, passes=4, steps=2, **more)))
    assert any("on_policy_t2s_ce" in entry and "t2s_ce" in entry for entry in log)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log)


def test_data_without_any_pair_is_refused_before_training(run):
    config = options("dual_space_v2")
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "index": 0}]
    theirs = [{"input_ids": [1, 2], "labels": [-100, -100]}]  # its prompt fills the row
    with pytest.raises(DataError, match="none of the student's 1 label tokens has a counterpart"):
        pair_rows(run, config, rows, theirs, load_examples(config.data).train, "eta")


def test_a_tokenizer_that_does_not_tell_its_bytes_is_refused_by_the_plan(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[SEP]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]").save_pretrained(tmp_path)
    student = {"config": SHAPE, "tokenizer": str(tmp_path)}
    with pytest.raises(ModelError, match="neither byte-level nor SentencePiece-like"):
        find_alignment(options("dual_space_v2", student=student))
    assert find_alignment(options("dual_space_v1", student=student)) == "cma"


def test_a_student_that_caps_its_logits_is_refused_by_the_plan():
    shape = {**SHAPE, "model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 2}
    config = options("dual_space_v2", student={"config": shape, "tokenizer": TEACHER})
    context = SimpleNamespace(compute=SimpleNamespace(max_workers=1))
    with pytest.raises(ModelError, match=r"gemma2: final_logit_softcapping = 30.0"):
        DSKD().plan(config, context)

"""Representation structure distance, by hand and by slow loops; and measured on a student beside a real teacher."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.evaluation import measure, other_answers, request
from tenfold.methods.dskd.structure_distance import (
    aligned_positions,
    cosine_distance,
    cosine_matrix,
    inner_product_distance,
    inner_product_matrix,
    mean_distances,
    measure_structure,
)
from tenfold.platform.data.examples import Example, load_examples
from tenfold.platform.data.tokenise import tokenise
from tenfold.platform.errors import ConfigError, DataError
from tenfold.platform.evaluation.judge_client import Reply
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.storage import Storage

TEACHER = "sample:models/stories260K"
SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "max_position_embeddings": 256}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_distances_of_three_states_are_those_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    # cosines: student (1, 3) alike, teacher (1, 2) alike; four of nine entries differ by 1
    assert cosine_distance(student, teacher) == pytest.approx(4 / 9)
    # rows that sum to 1: student (1/4, 0, 3/4), (0, 1, 0), (1/4, 0, 3/4); teacher (1/2, 1/2, 0) twice, (0, 0, 1)
    expected = ((0.25 + 0.5 + 0.75) + (0.5 + 0.5 + 0) + (0.25 + 0 + 0.25)) / 3
    assert inner_product_distance(student, teacher) == pytest.approx(expected)


def test_distances_are_those_of_slow_loops():
    student, teacher = normal(5, 4), normal(5, 7, seed=1)

    def similarities(states):
        inner = [[sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) for y in states] for x in states]
        lengths = [math.sqrt(inner[i][i]) for i in range(5)]
        cosine = [[inner[i][j] / lengths[i] / lengths[j] for j in range(5)] for i in range(5)]
        return cosine, [[value / sum(row) for value in row] for row in inner]

    (cosine, inner), (their_cosine, their_inner) = similarities(student), similarities(teacher)
    total = sum(abs(cosine[i][j] - their_cosine[i][j]) for i in range(5) for j in range(5))
    assert cosine_distance(student, teacher) == pytest.approx(total / 25)
    total = sum(abs(inner[i][j] - their_inner[i][j]) for i in range(5) for j in range(5))
    assert inner_product_distance(student, teacher) == pytest.approx(total / 5)


@pytest.mark.parametrize("distance", [cosine_distance, inner_product_distance])
def test_rotation_and_scale_of_a_space_are_no_difference(distance):
    states = normal(6, 4)
    rotation, _ = torch.linalg.qr(normal(9, 9, seed=2))
    turned = 3.0 * torch.nn.functional.pad(states, (0, 5)) @ rotation
    assert distance(states, turned) == pytest.approx(0, abs=1e-5)
    assert distance(states, normal(6, 4, seed=1)) > 0.1


def test_the_length_of_single_states_matters_to_inner_products_alone():
    states = normal(6, 4).abs()
    longer = states * torch.tensor([1.0, 5.0, 1.0, 1.0, 2.0, 1.0])[:, None]
    assert cosine_distance(states, longer) == pytest.approx(0, abs=1e-6)
    assert inner_product_distance(states, longer) > 0.1


def test_states_of_length_0_and_rows_without_sum_stay_finite():
    states = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert torch.equal(cosine_matrix(states)[0], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(inner_product_matrix(states), torch.zeros(3, 3, dtype=torch.float64))


def test_responses_are_averaged_and_single_positions_left_out():
    pairs = [(normal(n, 3, seed=n), normal(n, 5, seed=9 + n)) for n in (4, 1, 0, 2)]
    found = mean_distances(iter(pairs))
    mean = (cosine_distance(*pairs[0]) + cosine_distance(*pairs[3])) / 2
    assert found["structure_distance_cosine"] == pytest.approx(mean)
    assert (found["structure_distance_rows"], found["structure_distance_positions"]) == (2, 6)
    assert math.isnan(mean_distances(iter([]))["structure_distance_inner"])


def options(tokenizer=TEACHER, **evaluation):
    data = {"train": [{"path": "sample:instruct/short_instructions.json", "stop": 24}], "validation_ratio": 0.2}
    data |= {"template": "alpaca", "max_length": 256, "max_prompt_length": 200}
    own = {"student": {"config": SHAPE, "tokenizer": tokenizer}, "teacher": {"model": TEACHER}, "data": data}
    evaluation = {"seeds": [10], "max_rows": 4, "generation": {"max_new_tokens": 4}} | evaluation
    return DSKDConfig.model_validate(own | {"teacher_dtype": "float32", "objective": "sft", "evaluation": evaluation})


@pytest.fixture
def run(tmp_path):
    return SimpleNamespace(
        storage=Storage(tmp_path / "run"),
        cache=Storage(tmp_path / "cache"),
        compute=SimpleNamespace(max_workers=1, cpus_per_worker=1, gpus_per_worker=0),
        map=lambda function, items, **_: [function(item) for item in items],
        tracker=SimpleNamespace(log_text=lambda text, file: None),
    )


@pytest.fixture
def saved(tmp_path):
    def save(config):
        folder = tmp_path / "student"
        load_causal_lm(config.student, seed=3, dtype="float32").save_pretrained(folder)
        load_tokenizer(config.student).save_pretrained(folder)
        return folder

    return save


def test_a_teacher_has_no_distance_to_itself_and_a_fresh_student_has(run):
    config = options()
    tokenizer = load_tokenizer(config.teacher)
    found = measure_structure(run, config, load_causal_lm(config.teacher), tokenizer, tokenizer, 3)
    assert found["structure_distance_cosine"] == pytest.approx(0, abs=1e-5)
    assert found["structure_distance_inner"] == pytest.approx(0, abs=1e-3)
    assert found["structure_distance_rows"] == 3
    responses = [example.responses[0] for example in load_examples(config.data).train[:3]]
    assert found["structure_distance_positions"] == sum(len(tokenizer(text)["input_ids"]) for text in responses)
    student = load_causal_lm(config.student, seed=3, dtype="float32")
    assert measure_structure(run, config, student, tokenizer, tokenizer, 3)["structure_distance_cosine"] > 0.05


def test_two_tokenizers_are_compared_at_their_aligned_positions(run):
    config = options("sample:tokenizers/gpt2")
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    found = measure_structure(run, config, load_causal_lm(config.student, seed=3), *tokenizers, 6)
    assert 0 < found["structure_distance_cosine"] < 2
    examples = load_examples(config.data).train[:6]
    sides = [[tokenise(example, tokenizer, config.data) for example in examples] for tokenizer in tokenizers]
    shared, last = [], examples[5].responses[0]
    for positions, rows in zip(zip(*aligned_positions(*sides, *tokenizers), strict=True), sides, strict=True):
        labels = [[label for label in row["labels"][1:] if label != -100] for row in rows]
        shared.append([[own[at] for at in chosen.tolist()] for chosen, own in zip(positions, labels, strict=True)])
    spoken = [
        [tokenizer.decode(token) for token in tokens[5][:-1]]
        for tokenizer, tokens in zip(tokenizers, shared, strict=True)
    ]
    assert last == "The fact is that he was late."
    assert [token.strip() for token in spoken[0]] == [token.strip() for token in spoken[1]]
    assert [token.strip() for token in spoken[0]] == ["The", "that", "he", "was", "."]
    assert [tokens[5][-1] for tokens in shared] == [tokenizer.eos_token_id for tokenizer in tokenizers]
    assert found["structure_distance_positions"] == sum(len(tokens) for tokens in shared[0] if len(tokens) > 1)


def test_aligned_positions_count_labels_not_tokens():
    tokenizer = load_tokenizer(options().teacher)
    ids = tokenizer("a dog", add_special_tokens=False)["input_ids"]
    row = {"input_ids": [5, 6, *ids], "labels": [-100, -100, *ids]}
    longer = {"input_ids": [5, *ids], "labels": [-100, *ids]}
    ((own, theirs),) = aligned_positions([row], [longer], tokenizer, tokenizer)
    assert own.tolist() == theirs.tolist() == list(range(len(ids)))


def prefers(wanted):
    def ask(client, options, question):
        first, second = question.split("<answer_A>\n")[1].split("\n</answer_A>\n\n<answer_B>\n")
        second = second.split("\n</answer_B>")[0]
        return Reply(text="A" if wanted(first) and not wanted(second) else "B" if wanted(second) else "Tied")

    return ask


def test_measuring_a_student_adds_judge_and_structure_where_they_are_asked_for(run, saved, monkeypatch, tmp_path):
    judge = {"base_url": "http://localhost/v1", "model": "m", "max_items": 3}
    config = options(structure_distance=2, judge=judge)
    folder = str(saved(config))
    references = {example.responses[0] for example in load_examples(config.data).validation}
    monkeypatch.setattr("tenfold.platform.evaluation.judge.ask", prefers(lambda text: text in references))
    found = measure(config, folder, run)
    assert (found["eval/judge_wins"], found["eval/judge_losses"], found["eval/judge_win_rate"]) == (0, 3, 0)
    assert found["eval/structure_distance_cosine"] > 0
    assert not any("judge" in name or "structure" in name for name in found if name.startswith("teacher/"))
    assert len(run.storage.read_text("judge/validation.jsonl").splitlines()) == 3

    plain = measure(options(), folder, run)
    assert set(found) - set(plain) == {name for name in found if "judge" in name or "structure" in name}
    assert {name: found[name] for name in plain} == plain

    # the same student again is its own equal; the teacher's answers differ
    lines = [json.loads(line) for line in run.storage.read_text("responses.jsonl").splitlines()]
    students = {line["student"] for line in lines}
    assert not students & {line["teacher"] for line in lines}
    monkeypatch.setattr("tenfold.platform.evaluation.judge.ask", prefers(lambda text: text in students))
    against_teacher = measure(options(judge=judge, judge_against="teacher"), folder, run)
    assert against_teacher["eval/judge_wins"] == 3

    other = Storage(tmp_path / "other")
    other.write_text("responses.jsonl", "".join(json.dumps(line | {"student": "?"}) + "\n" for line in lines))
    against_run = measure(options(judge=judge, judge_against=str(tmp_path / "other")), folder, run)
    assert against_run["eval/judge_wins"] == 3


def test_a_missing_key_is_said_before_anything_is_computed(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = {"base_url": "http://localhost/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        measure(options(judge=judge), None, None)


def test_another_runs_answers_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"has no responses.jsonl"):
        other_answers(str(tmp_path), "responses.jsonl", ["p"])
    line = json.dumps({"prompt": "p", "reference": "r", "student": "s", "teacher": "t"})
    (tmp_path / "responses.jsonl").write_text(line + "\n")
    assert other_answers(str(tmp_path), "responses.jsonl", ["p"]) == ["s"]
    with pytest.raises(DataError, match="1 of 2 prompts are not in it, one is 'q'"):
        other_answers(str(tmp_path), "responses.jsonl", ["p", "q"])


def test_the_judge_reads_the_whole_conversation():
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"})
    last = {"role": "user", "content": "Sing"}
    assert request(Example((last,), ("la",), "here", "Sing")) == "Sing"
    assert request(Example((*turns, last), ("la",), "here", "Sing")) == "user: Hi\n\nassistant: Yes?\n\nuser: Sing"


def test_rows_to_judge_must_exist():
    judge = {"base_url": "http://localhost/v1", "model": "m"}
    with pytest.raises(ValidationError, match="no rows called dolly; there are validation and no test_sets"):
        options(judge=judge, judge_sets=["dolly"])

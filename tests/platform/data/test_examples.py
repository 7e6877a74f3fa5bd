import hashlib
import json
import logging
import random
import re

import pytest
from tenfold.platform.data.config import DataConfig
from tenfold.platform.data.examples import load_examples, to_example
from tenfold.platform.errors import DataError

GOOD = {"instruction": "Say a.", "output": "a"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def config(*paths, **options):
    return DataConfig(train=[{"path": path} for path in paths], **options)


@pytest.mark.parametrize("instruction", ["instruction", "prompt", "query", "question"])
@pytest.mark.parametrize("extra", ["input", "context"])
@pytest.mark.parametrize("response", ["output", "response", "answer", "completion"])
def test_known_column_names_are_found(instruction, extra, response):
    example = to_example({instruction: "Add.", extra: "1 2", response: "3", "id": 7}, "f, row 1")
    assert (example.instruction, example.input, example.responses) == ("Add.", "1 2", ("3",))
    assert example.messages == ({"role": "user", "content": "Add.\n1 2"},)
    assert example.origin == "f, row 1"


@pytest.mark.parametrize("row", [GOOD, {**GOOD, "input": ""}, {**GOOD, "input": None, "prompt": None}])
def test_an_absent_or_empty_input_adds_nothing(row):
    assert to_example(row, "").messages[0]["content"] == "Say a."


def test_a_list_of_references_is_kept_in_order_and_a_response_may_be_empty():
    assert to_example({**GOOD, "output": ["a", "b"]}, "").responses == ("a", "b")
    assert to_example({**GOOD, "output": ""}, "").responses == ("",)


def test_the_first_of_self_instructs_instances_is_taken():
    instances = [{"input": "x", "output": "y"}, {"input": "no", "output": "no"}]
    example = to_example({"instruction": "Do.", "instances": instances}, "")
    assert (example.input, example.responses) == ("x", ("y",))


def test_a_conversation_ends_with_the_response():
    turns = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    example = to_example({"messages": messages}, "")
    assert example.messages == tuple(messages[:-1])
    assert (example.instruction, example.responses) == ("u2", ("a2",))


def test_named_fields_are_read_and_no_others():
    row = {"instruction": "wrong", "q": "right", "input": "unread", "output": "wrong", "gold": "good"}
    example = to_example(row, "", {"instruction": "q", "response": "gold"})
    assert (example.instruction, example.input, example.responses) == ("right", "", ("good",))
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert to_example({"chat": chat, "output": 3}, "", {"messages": "chat"}).responses == ("a",)


def turns(*roles, content="x"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    ("row", "fields", "told"),
    [
        ("text", None, "is a str; needs an object"),
        ({"output": "a"}, None, "has no instruction / prompt / query / question"),
        ({"instruction": "a"}, None, "has no output / response / answer / completion"),
        ({"instruction": "a", "output": None}, None, "has no output / response"),
        ({"instruction": "  ", "output": "a"}, None, "instruction is empty"),
        ({"prompt": "", "output": "a"}, None, "prompt is empty"),
        ({"instruction": 3, "output": "a"}, None, "instruction is a int; needs text"),
        ({"instruction": "a", "output": 3}, None, "output is a int; needs text"),
        ({"instruction": "a", "output": []}, None, "output is an empty list"),
        ({"instruction": "a", "output": ["b", 3]}, None, "output is a int; needs text"),
        ({"instruction": "a", "output": ["b", None]}, None, "output holds null"),
        ({"instruction": "a", "context": {}, "output": "b"}, None, "context is a dict; needs text"),
        ({"instruction": "a", "instances": []}, None, "instances needs a list of objects"),
        ({"instruction": "a", "instances": ["b"]}, None, "instances needs a list of objects"),
        ({"instruction": "a", "instances": [{"input": "b"}]}, None, "has no output"),
        (GOOD, {"instruction": "q", "response": "output"}, "has no q"),
        (GOOD, {"instruction": "instruction", "response": "gold"}, "has no gold"),
        (GOOD, {"messages": "chat"}, "messages needs a list"),
        ({"messages": "hi"}, None, "messages needs a list of at least two turns"),
        (turns("assistant"), None, "messages needs a list of at least two turns"),
        (turns("user", "user"), None, "must alternate and the assistant must end; got user, user"),
        (turns("user", "assistant", "user"), None, "the assistant must end"),
        (turns("system", "assistant"), None, "must alternate"),
        (turns("user", "system", "assistant"), None, "must alternate"),
        (turns("user", "tool"), None, "must alternate"),
        (turns("user", "assistant", content=" "), None, "turn 1 (user) is empty"),
        (turns("user", "assistant", content=None), None, "turn 1 needs role and content, both text"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, None, "turn 2 needs role and content"),
    ],
)
def test_a_bad_row_is_told_apart(row, fields, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        to_example(row, "", fields)


def test_all_bad_rows_are_listed_with_file_and_line_before_anything_starts(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD, {"instruction": "no answer"}, "{broken", GOOD])
    other = tmp_path / "b.json"
    other.write_text(json.dumps([GOOD, {"instruction": "a", "output": 1}], indent=2))
    with pytest.raises(DataError) as error:
        load_examples(config(path, str(other)))
    lines = str(error.value).split("\n")
    assert lines[0] == "3 of 6 train rows cannot be used:"
    assert lines[1].startswith(f"  - {path}, line 2: has no output")
    assert lines[2].startswith(f"  - {path}, line 3: not JSON: ")
    assert lines[3].startswith(f"  - {other}, row 2 (line 6): output is a int")
    assert "skip_bad_rows" in lines[4]


def test_only_ten_bad_rows_are_shown_with_the_count_of_the_rest(tmp_path):
    path = write(tmp_path / "a.jsonl", ["1"] * 13)
    with pytest.raises(DataError) as error:
        load_examples(config(path))
    assert str(error.value).count("  - ") == 10
    assert "line 10: " in str(error.value)
    assert "line 11: " not in str(error.value)
    assert "... and 3 more" in str(error.value)


def test_skipped_rows_are_counted_and_logged(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [GOOD] * 10 + ["{broken", {"instruction": "a"}])
    validation = write(tmp_path / "v.jsonl", [GOOD, "3"])
    with caplog.at_level(logging.WARNING):
        splits = load_examples(config(path, validation=[{"path": validation}], skip_bad_rows=True))
    assert (len(splits.train), len(splits.validation), splits.skipped) == (10, 1, 3)
    assert "2 of 12 train rows are bad and left out" in caplog.text
    assert f"{path}, line 11: not JSON" in caplog.text
    assert f"{validation}, line 2: is a int" in caplog.text


def test_a_split_with_only_bad_rows_is_an_error_even_when_they_are_skipped(tmp_path):
    good, bad = write(tmp_path / "good.jsonl", [GOOD] * 4), write(tmp_path / "bad.jsonl", ["3", "4"])
    with pytest.raises(DataError, match=r"bad.jsonl: all 2 train rows are bad, nothing is left"):
        load_examples(config(bad, skip_bad_rows=True))
    with pytest.raises(DataError, match=r"bad.jsonl: all 2 validation rows are bad"):
        load_examples(config(good, validation=[{"path": bad}], skip_bad_rows=True))


@pytest.mark.parametrize(("rows", "ratio"), [(1, 0.1), (4, 0.1), (2, 0.9)])
def test_a_ratio_that_empties_a_split_is_an_error(tmp_path, rows, ratio):
    path = write(tmp_path / "a.jsonl", [GOOD] * rows)
    with pytest.raises(DataError, match=f"{rows} rows with validation_ratio {ratio} leave a split empty"):
        load_examples(config(path, validation_ratio=ratio))


@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_templates_without_turns_refuse_conversations_with_earlier_ones(tmp_path, template):
    path = write(tmp_path / "a.jsonl", [turns("user", "assistant", "user", "assistant")])
    with pytest.raises(DataError, match=f"line 1: has earlier turns, which template {template} cannot show"):
        load_examples(config(path, template=template))


@pytest.fixture
def numbered(tmp_path):
    return write(tmp_path / "n.jsonl", [{"instruction": f"Say {n}.", "output": str(n)} for n in range(20)])


def answers(examples):
    return [int(example.responses[0]) for example in examples]


def test_the_split_holds_every_row_once_and_depends_on_its_seed_alone(numbered):
    first, again = load_examples(config(numbered)), load_examples(config(numbered))
    other = load_examples(config(numbered, split_seed=1))
    assert first == again
    assert len(first.validation) == 2
    assert sorted(answers([*first.train, *first.validation])) == list(range(20))
    assert answers(first.train) != sorted(answers(first.train))
    assert answers(other.validation) != answers(first.validation)
    assert other.digest != first.digest


def test_the_last_part_after_the_shuffle_is_held_out(numbered):
    order = list(range(20))
    random.Random(5).shuffle(order)
    splits = load_examples(config(numbered, split_seed=5, validation_ratio=0.25))
    assert (answers(splits.train), answers(splits.validation)) == (order[:15], order[15:])


def test_limits_take_the_first_rows_after_the_split(numbered):
    whole = load_examples(config(numbered, validation_ratio=0.5))
    part = load_examples(config(numbered, validation_ratio=0.5, max_train_rows=3, max_validation_rows=2))
    assert (part.train, part.validation) == (whole.train[:3], whole.validation[:2])


def test_given_validation_data_leaves_all_training_rows_and_keeps_its_order(numbered):
    splits = load_examples(config(numbered, validation=[{"path": numbered, "start": 3, "stop": 6}]))
    assert sorted(answers(splits.train)) == list(range(20))
    assert answers(splits.validation) == [3, 4, 5]


def test_the_digest_is_of_the_texts_and_their_splits(tmp_path, numbered):
    renamed = write(tmp_path / "renamed.jsonl", [{"query": f"Say {n}.", "answer": str(n)} for n in range(20)])
    splits = load_examples(config(numbered))
    assert load_examples(config(renamed)).digest == splits.digest
    assert load_examples(config(numbered, validation_ratio=0.2)).digest != splits.digest
    content = [
        [[[{"content": f"Say {n}.", "role": "user"}], [str(n)]] for n in answers(split)]
        for split in (splits.train, splits.validation)
    ]
    assert splits.digest == hashlib.sha256(json.dumps(content).encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("short_instructions.json", 1100),
        ("self_instruct_seed_tasks.jsonl", 175),
        ("self_instruct_user_oriented.jsonl", 252),
    ],
)
def test_every_row_of_the_packaged_samples_is_good(name, count):
    splits = load_examples(config(f"sample:instruct/{name}"))
    assert (len(splits.train) + len(splits.validation), splits.skipped) == (count, 0)

import pytest
from tenfold.methods.aligndistil.preference_rows import (
    Pair,
    Prompt,
    Single,
    columns_of,
    has_pair,
    read_pair,
    read_prompt,
    read_single,
)

USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "No."}


def columns(**fields):
    return columns_of(fields)


def pair(row, **fields):
    prompt = read_prompt(row, "f, row 1", columns(**fields))
    return read_pair(row, prompt, columns(**fields))


def single(row, **fields):
    prompt = read_prompt(row, "f, row 1", columns(**fields))
    return read_single(row, prompt, columns(**fields))


def prompt(row, **fields):
    return read_prompt(row, "f, row 1", columns(**fields))


EXPECTED = Pair(messages=(USER,), chosen="Yes.", rejected="No.", origin="f, row 1")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi?", "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [GOOD], "rejected": "No."},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"instruction": "Hi?", "input": "", "output": "Yes.", "chosen": "Yes.", "rejected": "No."},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {  # UltraFeedback, binarized; the prompt's white space may differ
            "prompt": "Hi? ",
            "prompt_id": "1",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
    ],
)
def test_every_known_shape_of_a_pair_is_the_same_pair(row):
    assert pair(row) == EXPECTED
    assert prompt(row) == Prompt((USER,), "f, row 1")


def test_earlier_turns_stay_in_the_prompt():
    second = {"role": "user", "content": "And now?"}
    before = [SYSTEM, USER, BAD, second]
    for row in (
        {"chosen": [*before, GOOD], "rejected": [*before, BAD]},
        {"prompt": before, "chosen": "Yes.", "rejected": "No."},
        {"messages": before, "chosen": GOOD, "rejected": BAD},
        {"prompt": "Hi?", "chosen": [*before, GOOD], "rejected": [*before, BAD]},
    ):
        assert pair(row).messages == tuple(before)
        assert (pair(row).chosen, pair(row).rejected) == ("Yes.", "No.")


def test_the_input_is_on_the_next_line_and_set_apart_for_the_alpaca_template():
    found = pair({"instruction": "Fix.", "input": "He go.", "chosen": "He goes.", "rejected": "?"})
    assert found.messages == ({"role": "user", "content": "Fix.\nHe go."},)
    example = found.example("He goes.")
    assert (example.instruction, example.input, example.responses) == ("Fix.", "He go.", ("He goes.",))
    assert example.messages == found.messages
    blank = prompt({"instruction": "Fix.", "input": " "})
    assert (blank.messages[0]["content"], blank.example().instruction, blank.input) == ("Fix.", "Fix.", "")


def test_an_answer_of_white_space_is_empty():
    found = pair({"prompt": "Hi?", "chosen": " Yes. ", "rejected": " \n"})
    assert (found.chosen, found.rejected) == (" Yes. ", "")


def test_fields_name_the_columns_and_no_other_is_read():
    row = {"prompt": "unread", "q": "Hi?", "good": "Yes.", "bad": "No.", "chosen": "unread", "rejected": "unread"}
    assert pair(row, prompt="q", chosen="good", rejected="bad") == EXPECTED
    with pytest.raises(ValueError, match=r"has no q; needs one of them"):
        prompt({"prompt": "Hi?"}, prompt="q")
    with pytest.raises(ValueError, match="has no column that fields calls prompt"):
        prompt({"prompt": "Hi?"}, chosen="good", rejected="bad")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            "has no prompt / instruction / query / question / messages / conversations",
        ),
        ({"prompt": "Hi?", "chosen": "a"}, "has no rejected; needs text, a message or messages"),
        ({"prompt": "Hi?", "rejected": "a"}, "has no chosen"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty; needs text"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is a int; needs text"),
        ({"prompt": "Hi?", "input": 3, "chosen": "a", "rejected": "b"}, "input is a int; needs text"),
        ({"prompt": "Hi?", "chosen": 3, "rejected": "b"}, "chosen: turn 1 needs role and content"),
        ({"prompt": "Hi?", "chosen": [], "rejected": "b"}, "chosen needs text or a list of turns"),
        ({"prompt": "Hi?", "chosen": USER, "rejected": "b"}, "chosen ends with the turn of the user"),
        ({"prompt": "Ho?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt is not the prompt that chosen"),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": BAD}, "prompt is not the prompt that chosen"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Hm?"}, BAD]},
            "rejected answers another prompt than the row's",
        ),
        (
            {"conversations": [{"from": "robot", "value": "Hi?"}], "chosen": "a", "rejected": "b"},
            "turn 1 has the role 'robot'; known: system, user, human, assistant, gpt",
        ),
        (
            {"messages": [USER, USER], "chosen": "a", "rejected": "b"},
            "must alternate and the user ends; got user, user",
        ),
        ({"messages": [GOOD], "chosen": "a", "rejected": "b"}, "the user ends; got nothing"),
        ({"messages": [SYSTEM], "chosen": "a", "rejected": "b"}, "the user ends; got system"),
        (
            {"messages": [{"role": "user", "content": " "}], "chosen": "a", "rejected": "b"},
            r"turn 1 \(user\) is empty",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, message):
    with pytest.raises(ValueError, match=message):
        pair(row)


@pytest.mark.parametrize(
    ("row", "desirable"),
    [
        ({"prompt": "Hi?", "completion": "Yes.", "label": True}, True),
        ({"prompt": [USER], "completion": [GOOD], "label": False}, False),
        ({"messages": [USER, GOOD], "label": 1}, True),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}], "label": 0}, False),
        ({"messages": [USER], "completion": "Yes.", "label": False}, False),
    ],
)
def test_every_known_shape_of_a_single_answer_is_read(row, desirable):
    assert single(row) == Single(messages=(USER,), response="Yes.", desirable=desirable, origin="f, row 1")
    assert single(row).desirable is desirable
    assert not has_pair(row, columns())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi?", "completion": "a"}, "label is None; single answers need true"),
        ({"prompt": "Hi?", "completion": "a", "label": "true"}, "label is 'true'"),
        ({"prompt": "Hi?", "completion": "a", "label": 2}, "label is 2"),
        ({"prompt": "Hi?", "label": True}, "has no completion"),
        ({"messages": [USER], "label": True}, "messages ends with the turn of the user"),
        ({"prompt": "Ho?", "messages": [USER, GOOD], "label": True}, "messages answers another prompt than the row's"),
    ],
)
def test_a_single_answer_that_cannot_be_used_says_why(row, message):
    with pytest.raises(ValueError, match=message):
        single(row)


def test_prompts_lose_the_assistants_last_turn():
    assert prompt({"messages": [SYSTEM, USER, GOOD]}).messages == (SYSTEM, USER)
    assert prompt({"messages": [USER]}).messages == (USER,)
    assert prompt({"prompt": [USER, GOOD]}).messages == (USER,)
    assert prompt({"instruction": "Hi?", "output": "Yes."}).messages == (USER,)


def test_columns_without_a_value_count_as_missing():
    """Parquet files give None where a row lacks what another row has."""
    row = {"prompt": "Hi?", "chosen": None, "rejected": None, "messages": None, "completion": "Yes.", "label": True}
    assert single(row).response == "Yes."
    assert not has_pair(row, columns())
    turn = {"role": "user", "content": "Hi?", "from": None, "value": None}
    assert prompt({"prompt": None, "messages": [turn]}).messages == (USER,)

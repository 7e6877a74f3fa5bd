"""What the measures of an aligned policy mean, on numbers that can be followed by hand."""

import pytest
from tenfold.methods.aligndistil.evaluation import (
    _divergence_metrics,
    _lengths,
    _reward_metrics,
    answered,
    distinct,
    preference,
    request,
)
from tenfold.methods.aligndistil.plots import MAX_TOKENS, token_figure
from tenfold.methods.aligndistil.preference_rows import Pair

HELLO = ({"role": "user", "content": "Hello"},)
TWO = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"})


def test_ties_of_the_reward_are_wrong_and_counted():
    # margins: 0.1 x (3, 0, -1)
    found = preference("eval/reward", [5.0, 2.0, 0.0], [2.0, 2.0, 1.0], beta=0.1)
    assert found["eval/reward_accuracy"] == pytest.approx(100 / 3)
    assert found["eval/reward_tie_rate"] == pytest.approx(100 / 3)
    assert found["eval/reward_margin"] == pytest.approx(0.1 * 2 / 3)


def test_the_contrastive_reward_decides_which_answer_wins():
    def row(dpo, other):
        return {"log_prob": {"dpo": dpo, "other": other}}

    own, theirs = [row(-1.0, -4.0), row(-2.0, -2.0), row(-3.0, -1.0)], [row(-2.0, -3.0), row(-5.0, -5.0), row(0, 0)]
    # rewards 0.3, 0, -0.2 against 0.1, 0, 0: a win, a tie, a loss
    found = _reward_metrics(own, theirs, beta=0.1)
    assert found["eval/win_rate"] == pytest.approx(50.0)
    assert found["eval/answer_reward"] == pytest.approx(0.1 / 3)
    assert found["start/answer_reward"] == pytest.approx(0.1 / 3)


def test_divergence_is_told_by_answer_and_by_token():
    own = [
        {"tokens": 4, "kl": {"reference": 2.0, "dpo": 1.0, "other": 9.0}},
        {"tokens": 1, "kl": {"reference": 0.5, "dpo": 0, "other": 9}},
    ]
    found = _divergence_metrics(own)
    assert found == {
        "eval/answer_kl_start": 1.25,
        "eval/answer_kl_start_per_token": 0.5,
        "eval/answer_kl_dpo": 0.5,
        "eval/answer_kl_dpo_per_token": 0.2,
    }


def test_an_answer_without_eos_counts_as_truncated(tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    found = _lengths("eval", [[7, 8, 7, 8], [7, end], []], tiny_tokenizer)
    assert found["eval/response_length"] == 2.0
    assert found["eval/truncated"] == pytest.approx(200 / 3)
    # pairs 78, 87, 78, 7-end: three of four differ
    assert found["eval/distinct_2"] == pytest.approx(75.0)


def test_a_prompt_of_several_pairs_is_asked_once():
    pairs = [Pair(messages=HELLO, chosen="a", rejected="b", origin=str(number)) for number in range(3)]
    pairs.append(Pair(messages=TWO, chosen="a", rejected="b", origin="3"))
    prompts = distinct(pairs)
    assert [prompt.messages for prompt in prompts] == [HELLO, TWO]
    assert request(prompts[0]) == "Hello"
    assert request(prompts[1]) == "system: Be kind.\n\nuser: Hello"


def test_labels_are_on_what_was_written():
    made = answered([{"input_ids": [5, 6]}, {"input_ids": [7]}], [[8, 2], []])
    assert made == [{"input_ids": [5, 6, 8, 2], "labels": [-100, -100, 8, 2]}, {"input_ids": [7], "labels": [-100]}]


def test_the_picture_shows_the_first_tokens_of_a_long_answer():
    number = MAX_TOKENS + 5
    row = {name: [0.1 * (1 + index) for index in range(number)] for name in ("alpha", "weight", "kl_teacher")}
    figure = token_figure([f" t{index}$" for index in range(number)], row)
    assert f"first {MAX_TOKENS} of {number}" in figure.axes[0].get_title()
    assert all(len(axes.patches) == MAX_TOKENS for axes in figure.axes)
    figure.canvas.draw()  # a text that is no valid formula would fail here

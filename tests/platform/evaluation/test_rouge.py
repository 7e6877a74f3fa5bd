import pytest
from tenfold.platform.evaluation.rouge import clean_response, exact_match, rouge_l


def test_half_of_the_words_in_order_give_50():
    # [i, don, t, know] and [i, do, not, know] share (i, know): precision 2/4, recall 2/4.
    assert rouge_l(["I don't know"], [["I do not know"]]) == pytest.approx(50.0)


def test_the_best_reference_counts_after_stemming():
    references = [["A cat runs quick", "The cat ran quickly."]]
    assert rouge_l(["The cats are running quickly"], references) == pytest.approx(66.6667, abs=1e-4)
    assert rouge_l(["The cats are running quickly"], [references[0][::-1]]) == pytest.approx(66.6667, abs=1e-4)


def test_the_mean_is_over_items():
    assert rouge_l(["a b", "c"], [["a b"], ["d"]]) == pytest.approx(50.0)


def test_other_scripts_and_empty_texts_score_0_even_when_identical():
    assert rouge_l(["\u4f60\u597d"], [["\u4f60\u597d"]]) == 0
    assert rouge_l([""], [[""]]) == 0


def test_text_after_the_end_mark_does_not_count():
    assert clean_response("  yes \n<|endoftext|> no <|endoftext|>") == "yes"
    assert rouge_l(["red green<|endoftext|>blue"], [["red green"]]) == pytest.approx(100.0)
    assert exact_match(["red<|endoftext|>blue"], [["red"]]) == 100.0


def test_exact_match_ignores_case_punctuation_and_spacing():
    predictions = ["  The  CAT, ran!\n", "It's", "a b", "\u00c9t\u00e9"]
    references = [["no", "the cat ran"], ["its"], ["ab"], ["\u00e9t\u00e9."]]
    assert exact_match(predictions, references) == 75.0


@pytest.mark.parametrize("score", [rouge_l, exact_match])
@pytest.mark.parametrize(
    ("predictions", "references"), [([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a"], [[]]), (["a"], ["a"])]
)
def test_unequal_or_missing_references_are_refused(score, predictions, references):
    with pytest.raises(ValueError, match="needs"):
        score(predictions, references)

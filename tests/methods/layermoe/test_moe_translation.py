"""Few-shot translation: the protocol's prompts, where an answer ends, scores."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from tenfold.methods.layermoe import translation
from tenfold.methods.layermoe.corpora import Corpus, lines_by_language
from tenfold.methods.layermoe.translation import (
    TranslationScore,
    check_sacrebleu,
    directions,
    example_indices,
    first_line,
    language_name,
    measure_direction,
    pairs,
    prompts,
    score,
    translate,
    translation_metrics,
)
from tenfold.platform.errors import ConfigError, DataError
from transformers import LlamaConfig, LlamaForCausalLM

EOS = 1
OFFICIAL = [654, 114, 25, 759, 281, 250, 228, 142]


@pytest.fixture(scope="module")
def letters(byte_tokenizer):
    return byte_tokenizer()


class Scripted(LlamaForCausalLM):
    """Writes one text after the prompt's last letter, whatever came before; counts the steps."""

    def __init__(self, tokenizer, answers):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=4096,
        )
        super().__init__(config)
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        self.script = {encode(last)[0]: encode(text) + [EOS] for last, text in answers.items()}
        self.steps, self.lasts, self.seen = 0, None, []

    def forward(self, input_ids=None, **given):
        out = super().forward(input_ids=input_ids, **given)
        if input_ids.shape[1] > 1:
            self.steps, self.lasts = 0, input_ids[:, -1].tolist()
            self.seen.append(input_ids.tolist())
        scores = torch.full_like(out.logits[:, -1:], -9.0)
        scores[..., EOS] = -1e4  # beams would else end early, each somewhere else
        for row, last in enumerate(self.lasts):
            script = self.script[last]
            scores[row, 0, script[min(self.steps, len(script) - 1)]] = 9.0
        self.steps += 1
        out.logits = scores
        return out


def test_the_examples_are_those_of_the_official_protocol():
    assert example_indices(997) == OFFICIAL
    assert example_indices(997, shots=3) == OFFICIAL[:3]
    assert example_indices(5, shots=0) == []
    with pytest.raises(DataError, match="8 examples a prompt, and 7 lines"):
        example_indices(7)


def test_a_prompt_shows_the_examples_one_a_line_and_ends_after_the_target_language():
    corpora = [Corpus(language=name, path=f"sample:flores101/dev/{name}.dev") for name in ("eng", "ell")]
    examples = lines_by_language(corpora)
    [prompt] = prompts(examples, [" A short sentence. "], ("eng", "ell"))
    *shown, query = prompt.split("\n")
    assert len(shown) == 8
    for number, line in zip(OFFICIAL, shown, strict=True):
        english, greek = (examples[name][number].strip() for name in ("eng", "ell"))
        assert line == f"Translation: English: {english} Greek: {greek}"
    assert query == "Translation: English: A short sentence. Greek: "
    [back] = prompts(examples, ["x"], ("ell", "eng"), shots=1)
    english, greek = (examples[name][654].strip() for name in ("eng", "ell"))
    assert back == f"Translation: Greek: {greek} English: {english}\nTranslation: Greek: x English: "
    assert prompts(examples, ["x"], ("ell", "eng"), shots=0) == ["Translation: Greek: x English: "]


def test_examples_must_be_parallel():
    with pytest.raises(DataError, match=r"3 lines of en, 2 of el\. Line n of each must be the same sentence"):
        prompts({"en": ["a"] * 3, "el": ["b"] * 2}, ["c"], ("en", "el"), shots=1)


def test_lines_that_one_language_lacks_are_no_sentences_of_either():
    lines = {"en": ["a", "", "c", "d"], "el": ["A", "B", " ", "D"]}
    assert pairs(lines, ("el", "en")) == (["A", "D"], ["a", "d"])
    [prompt] = prompts(lines, ["x"], ("en", "el"), shots=2)
    assert sorted(prompt.split("\n")[:2]) == ["Translation: English: a Greek: A", "Translation: English: d Greek: D"]


def test_languages_have_names_and_directions():
    assert [language_name(code) for code in ("en", "zho_simpl", "npi", "ne", "Klingon")] == [
        *("English", "Chinese", "Nepali", "Nepali", "Klingon")
    ]
    assert directions("en", ["es", "en", "el"]) == [("en", "es"), ("es", "en"), ("en", "el"), ("el", "en")]
    assert set(translation.FLORES_CODES.values()) == set(translation.NAMES)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Hallo Welt.\nTranslation: English: more", "Hallo Welt."),
        (" Hallo Translation: English", "Hallo"),
        ("Hallo\n", "Hallo"),
        ("\nHallo", ""),
        ("", ""),
    ],
)
def test_the_first_line_up_to_a_further_example_is_kept(text, kept):
    assert first_line(text) == kept


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_ends_at_the_text_that_begins_an_example(letters, num_beams):
    model = Scripted(letters, {"a": "one two\nTranslation: and so on for ever", "b": "three Translation: x"})
    assert translate(model, letters, ["xxa", "b"], num_beams=num_beams, max_new_tokens=200) == ["one two", "three"]
    if num_beams == 1:  # other beams go on without the word
        assert model.steps == len("one two\nTranslation:")


def test_generation_ends_at_eos_and_at_the_longest_answer(letters):
    model = Scripted(letters, {"a": "short", "b": "a much longer answer"})
    assert translate(model, letters, ["a"], num_beams=1) == ["short"]
    assert translate(model, letters, ["b"], num_beams=2, max_new_tokens=6) == ["a much"]


def test_prompts_keep_their_order_and_are_padded_on_the_left_behind_bos(letters):
    answers = {letter: letter.upper() for letter in "abcd"}
    model = Scripted(letters, answers)
    texts = ["a", "xxxxb", "xxc", "xxxxxxxxd"]
    assert translate(model, letters, texts, num_beams=1, batch_size=3) == ["A", "B", "C", "D"]
    first, second = model.seen
    x = letters.encode("x", add_special_tokens=False)[0]
    assert [len(row) for row in first] == [10, 10, 10]
    assert first[0][:2] == [0, x]
    assert first[2][:8] == [EOS] * 6 + [0, x]  # the tokenizer has no pad
    assert len(second) == 1


def test_the_models_own_generation_defaults_and_mode_are_left_alone(letters):
    model = Scripted(letters, {"a": "ok"}).train()
    model.generation_config.num_beams, model.generation_config.repetition_penalty = 4, 1.7
    own = model.generation_config
    assert translate(model, letters, ["a"], num_beams=1) == ["ok"]
    assert model.generation_config is own
    assert (own.num_beams, own.repetition_penalty) == (4, 1.7)
    assert model.training


@pytest.fixture
def scorer(monkeypatch):
    """A stand-in for sacrebleu that notes how it is called."""
    calls = []
    module = types.ModuleType("sacrebleu")
    module.__spec__ = importlib.machinery.ModuleSpec("sacrebleu", None)

    def corpus_bleu(hypotheses, references, *, tokenize):
        calls.append(("bleu", hypotheses, references, tokenize))
        return types.SimpleNamespace(score=10.0)

    def corpus_chrf(hypotheses, references):
        calls.append(("chrf", hypotheses, references))
        return types.SimpleNamespace(score=50.0 if hypotheses == references[0] else 20.0)

    module.corpus_bleu, module.corpus_chrf = corpus_bleu, corpus_chrf
    monkeypatch.setitem(sys.modules, "sacrebleu", module)
    return calls


@pytest.mark.parametrize(("target", "words"), [("el", "13a"), ("zh", "zh"), ("zho_simpl", "zh"), ("jpn", "char")])
def test_scores_are_of_the_whole_corpus_with_words_as_the_target_language_has_them(scorer, target, words):
    assert score(["a", "b"], ["a", "b"], target) == TranslationScore(chrf=50.0, bleu=10.0)
    assert ("bleu", ["a", "b"], [["a", "b"]], words) in scorer
    assert ("chrf", ["a", "b"], [["a", "b"]]) in scorer


def test_a_missing_scorer_is_said_before_anything_is_translated(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^config\.evaluation\.translation: .* pip install 'tenfold.languages"):
        check_sacrebleu("config.evaluation.translation")
    with pytest.raises(ConfigError, match="sacrebleu"):
        measure_direction(None, None, ("en", "el"), {}, {})


def test_a_direction_is_measured_on_the_first_lines(scorer, letters):
    # every query ends in ": "
    model = Scripted(letters, {" ": "Nai\n"})
    examples = {"en": ["Yes", "No"], "el": ["Nai", "Ochi"]}
    lines = {"en": ["Yes", "Yes", "No"], "el": ["Nai", "Nai", "Ochi"]}
    found, texts = measure_direction(
        model, letters, ("en", "el"), examples, lines, max_lines=2, shots=1, num_beams=1, max_new_tokens=9
    )
    assert texts == ["Nai", "Nai"]
    assert found.chrf == 50.0
    with pytest.raises(DataError, match="3 lines of en, 1 of el"):
        measure_direction(model, letters, ("en", "el"), examples, {**lines, "el": ["Nai"]})


def test_means_are_over_the_directions_of_a_group():
    scores = {
        ("en", "es"): TranslationScore(40, 10),
        ("es", "en"): TranslationScore(60, 20),
        ("en", "el"): TranslationScore(30, 3),
        ("el", "en"): TranslationScore(34, 5),
    }
    metrics = translation_metrics(scores, "en", {"old": ["en", "es"], "new": ["el"], "earlier": []})
    assert metrics["translation/en-es/chrf"] == 40
    assert metrics["translation/old/chrf"] == 50
    assert metrics["translation/new/chrf"] == 32
    assert metrics["translation/new/bleu"] == 4
    assert len(metrics) == 12


def test_an_expanded_model_translates_in_batches_as_it_does_alone(letters):
    from tenfold.methods.layermoe.expansion import attach_classifiers, expand

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(letters), num_key_value_heads=2, initializer_range=0.5, **sizes)
    )
    model = expand(dense, [1, 2], languages=["el"], old_languages=["en"], seed=1)
    attach_classifiers(model, [1], seed=2)
    texts = ["a", "some longer prompt", "and two", "x y z"]
    alone = [translate(model, letters, [text], num_beams=2, max_new_tokens=8)[0] for text in texts]
    assert translate(model, letters, texts, num_beams=2, max_new_tokens=8, batch_size=4) == alone
    assert any(alone)

"""Generation in batches: order, reproducibility, independence of padding and of the model's own defaults."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tenfold.platform.errors import ModelError
from tenfold.platform.models.generation import end_tokens, generate_texts, up_to_end
from tenfold.platform.models.options import GenerationOptions

EOS = 2
PROMPTS = [[5, 60, 70], [8, 9, 10, 11, 12, 13, 14], [40], [100, 101, 102, 103, 104], [7, 7]]


@pytest.fixture
def model(tiny_llama):
    model = tiny_llama(320, tied=False, seed=4).eval()
    with torch.no_grad():
        # Peaked enough that texts differ from prompt to prompt and rounding decides nothing.
        model.lm_head.weight.mul_(40)
    return model


def options_of(**changes):
    return GenerationOptions(**{"max_new_tokens": 12, "do_sample": False, "batch_size": 2, **changes})


def one_by_one(model, tokenizer, **changes):
    """What transformers itself generates for each prompt alone, without any padding."""
    texts = []
    for prompt in PROMPTS:
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            eos_token_id=2,
            **changes,
        )
        texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_greedy_texts_are_those_of_each_prompt_alone_in_the_order_given(model, tiny_tokenizer, batch_size):
    expected = one_by_one(model, tiny_tokenizer)
    assert len(set(expected)) == len(expected)
    assert generate_texts(model, tiny_tokenizer, PROMPTS, options_of(batch_size=batch_size), seed=0) == expected


@pytest.mark.parametrize("rule", [{"no_repeat_ngram_size": 2}, {"repetition_penalty": 3.0}])
def test_rules_against_repetition_pass_through_and_ignore_padding(model, tiny_tokenizer, rule):
    # With EOS as padding, a penalty on padding would put off the end of the padded rows.
    tiny_tokenizer_pad = tiny_tokenizer.pad_token
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    try:
        with torch.no_grad():
            model.lm_head.weight[2] = 0.6 * model.lm_head.weight.mean(0)
        texts = generate_texts(model, tiny_tokenizer, PROMPTS, options_of(batch_size=5, **rule), seed=0)
    finally:
        tiny_tokenizer.pad_token = tiny_tokenizer_pad
    assert texts == one_by_one(model, tiny_tokenizer, **rule)
    assert texts != one_by_one(model, tiny_tokenizer)


def test_the_penalty_leaves_eos_of_padded_rows_alone(model, tiny_tokenizer):
    from tenfold.platform.models.generation import _left_padded

    ids, mask = _left_padded(PROMPTS[:2], tiny_tokenizer, options_of(repetition_penalty=1.5))
    assert ids.tolist() == [[5, 5, 5, 5, 5, 60, 70], PROMPTS[1]]
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1, 1], [1] * 7]
    ids, _ = _left_padded(PROMPTS[:2], tiny_tokenizer, options_of())
    assert ids[0].tolist() == [0, 0, 0, 0, 5, 60, 70]


def test_a_seed_decides_the_samples_and_the_random_state_is_left_alone(model, tiny_tokenizer):
    options = options_of(do_sample=True, temperature=20.0)
    torch.manual_seed(1)
    first = generate_texts(model, tiny_tokenizer, PROMPTS, options, seed=10)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = generate_texts(model, tiny_tokenizer, PROMPTS, options, seed=10)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert generate_texts(model, tiny_tokenizer, PROMPTS, options, seed=11) != first


@pytest.mark.parametrize("narrow", [{"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}])
def test_each_sampling_option_narrows_the_choice_to_the_greedy_one(model, tiny_tokenizer, narrow):
    greedy = generate_texts(model, tiny_tokenizer, PROMPTS, options_of(), seed=0)
    flat = options_of(do_sample=True, **{"temperature": 20.0, **narrow})
    wide = options_of(do_sample=True, temperature=20.0)
    assert generate_texts(model, tiny_tokenizer, PROMPTS, flat, seed=0) == greedy
    assert generate_texts(model, tiny_tokenizer, PROMPTS, wide, seed=0) != greedy


def test_the_models_own_defaults_do_not_leak_in_and_stay_as_they_are(model, tiny_tokenizer):
    expected = generate_texts(model, tiny_tokenizer, PROMPTS, options_of(), seed=0)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = list(range(3, 300))
    model.generation_config.max_length = 3
    own = model.generation_config
    assert generate_texts(model, tiny_tokenizer, PROMPTS, options_of(), seed=0) == expected
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_texts_end_at_any_end_token_of_model_or_tokenizer(model, tiny_tokenizer):
    options = options_of(batch_size=1)
    ids = tiny_tokenizer("The chef", add_special_tokens=False)["input_ids"]
    whole = generate_texts(model, tiny_tokenizer, [ids], options, seed=0)[0]
    output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(ids) :]
    position = next(index for index in range(2, 12) if output[index] not in output[:index])
    model.generation_config.eos_token_id = [2, int(output[position])]
    cut = generate_texts(model, tiny_tokenizer, [ids], options, seed=0)[0]
    assert cut == tiny_tokenizer.decode(output[:position], skip_special_tokens=True)
    assert cut != whole


def test_special_tokens_are_not_in_the_text(model, tiny_tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = model.model.norm.weight  # the start-of-turn token always wins or ties
    hidden_sign = generate_texts(model, tiny_tokenizer, [[5]], options_of(), seed=0)[0]
    assert "<|" not in hidden_sign


def test_progress_is_told_after_every_batch(model, tiny_tokenizer):
    told = []
    generate_texts(model, tiny_tokenizer, PROMPTS, options_of(), seed=0, on_progress=lambda *pair: told.append(pair))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_no_prompts_give_no_texts(model, tiny_tokenizer):
    assert generate_texts(model, tiny_tokenizer, [], options_of(), seed=0) == []


def test_the_mode_of_the_model_comes_back_and_no_gradient_is_kept(model, tiny_tokenizer):
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    generate_texts(model, tiny_tokenizer, PROMPTS, options_of(), seed=0)
    assert model.training
    assert not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.use_cache is False


def test_dropout_is_off_while_generating(tiny_llama, tiny_tokenizer):
    model = tiny_llama(320, tied=False)
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    first = generate_texts(model.train(), tiny_tokenizer, PROMPTS, options_of(), seed=0)
    assert generate_texts(model.eval(), tiny_tokenizer, PROMPTS, options_of(), seed=1) == first


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[5], []], "prompt 1 has no tokens"), ([[5, 320]], "a prompt holds token 320, the model has 320")],
)
def test_prompts_that_cannot_be_continued_are_refused(model, tiny_tokenizer, prompts, message):
    with pytest.raises(ModelError, match=message):
        generate_texts(model, tiny_tokenizer, prompts, options_of(), seed=0)


def test_more_positions_than_the_model_has_are_refused_or_warned_about(model, tiny_tokenizer, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    model.config.max_position_embeddings = 16
    with caplog.at_level(logging.WARNING):
        generate_texts(model, tiny_tokenizer, [[5] * 10], options_of(), seed=0)
    assert "more than the 16 positions" in caplog.text
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"10 tokens and 12 new ones need more than the 16 positions of this gpt2"):
        generate_texts(learned, tiny_tokenizer, [[5] * 10], options_of(), seed=0)
    assert len(generate_texts(learned, tiny_tokenizer, [[5] * 4], options_of(), seed=0)) == 1


@pytest.mark.parametrize(("own", "expected"), [(None, [EOS]), (9, [EOS, 9]), ([9, EOS], [EOS, 9])])
def test_the_ends_are_those_of_model_and_tokenizer(own, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert end_tokens(model, SimpleNamespace(eos_token_id=EOS)) == expected


def test_a_model_without_ends_of_its_own_has_the_tokenizers_and_perhaps_none():
    assert end_tokens(SimpleNamespace(generation_config=None), SimpleNamespace(eos_token_id=EOS)) == [EOS]
    assert end_tokens(SimpleNamespace(), SimpleNamespace(eos_token_id=None)) == []


def test_an_answer_ends_with_its_first_end_token():
    assert up_to_end([4, 5, EOS, 6, EOS], [EOS, 9]) == [4, 5, EOS]
    assert up_to_end([4, 9, 5], [EOS, 9]) == [4, 9]
    assert up_to_end([4, 5], [EOS]) == [4, 5]
    assert up_to_end([], [EOS]) == []

import importlib.resources
import math

import pytest
import torch
from tenfold.platform.errors import ModelError
from tenfold.platform.evaluation.perplexity import label_bytes, perplexity, token_nll
from tenfold.platform.models.hidden import check_head
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_rows(vocabulary, sizes=(3, 9, 5, 12, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in sizes:
        ids = torch.randint(0, vocabulary, (size,), generator=generator).tolist()
        prompt = max(1, size // 2)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def slow_nll(model, rows):
    """Sum the losses one by one, from whole logits in float64, without padding."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position in range(len(row["input_ids"]) - 1):
            label = row["labels"][position + 1]
            if label != -100:
                total -= logits[position].log_softmax(-1)[label].item()
                count += 1
    return total, count


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_a_slow_loop(tiny_llama, tied):
    model = tiny_llama(tied=tied).eval()
    rows = make_rows(320)
    expected, count = slow_nll(model, rows)
    found = token_nll(model, rows)
    assert found[1] == count == 2 + 5 + 3 + 6 + 1
    assert found[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (2, 3), (5, 4), (64, 1000)])
def test_neither_batches_nor_chunks_change_the_loss(tiny_llama, batch_size, chunk):
    model, rows = tiny_llama(), make_rows(320)
    total, count = token_nll(model, rows, batch_size=batch_size, chunk=chunk)
    expected = token_nll(model, rows)
    assert count == expected[1]
    assert total == pytest.approx(expected[0], rel=1e-5)


def test_rows_of_a_data_set_are_taken(tiny_llama):
    from datasets import Dataset

    model, rows = tiny_llama(), make_rows(320)
    assert token_nll(model, Dataset.from_list(rows)) == token_nll(model, rows)


def test_rows_without_labels_count_nothing(tiny_llama):
    rows = [{"input_ids": [3, 4, 5], "labels": [-100] * 3}]
    assert token_nll(tiny_llama(), rows) == (0.0, 0)
    assert token_nll(tiny_llama(), []) == (0.0, 0)


def test_dropout_is_off_and_every_module_is_put_back_into_its_mode():
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    rows = make_rows(64)
    assert token_nll(model, rows) == token_nll(model, rows)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_no_tensor_of_all_positions_and_the_whole_vocabulary_is_built(tiny_llama):
    from torch.utils._python_dispatch import TorchDispatchMode

    model = tiny_llama(vocab=1000)
    rows = make_rows(1000, sizes=(40,) * 8)
    head = model.lm_head.weight.untyped_storage().data_ptr()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            is_logits = isinstance(result, torch.Tensor) and result.dim() > 0 and result.shape[-1] == 1000
            if is_logits and result.untyped_storage().data_ptr() != head:  # the head's own transpose is no new tensor
                largest = max(largest, result.numel())
            return result

    with Watch():
        token_nll(model, rows, batch_size=8, chunk=16)
    assert 0 < largest <= 16 * 1000


def test_a_real_model_predicts_its_own_kind_of_text():
    folder = importlib.resources.files("tenfold.samples") / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park. "
        "One day, she saw a big red ball. She wanted to play with it, but it was too high."
    )
    ids = tokenizer(text)["input_ids"]
    assert (len(ids), ids[0]) == (61, tokenizer.bos_token_id)
    total, count = token_nll(model, [{"input_ids": ids, "labels": ids}])
    assert count == 60
    assert total / count == pytest.approx(0.43, abs=0.005)


def test_perplexity_is_the_exponential_of_the_mean():
    assert perplexity(2 * math.log(7), 2) == pytest.approx(7)
    assert perplexity(0.0, 3) == 1
    assert perplexity(1e6, 3) == math.inf
    assert math.isnan(perplexity(0.0, 0))


def capped():
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0))


def scaled_up():
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625))


def scaled_down():
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))


@pytest.mark.parametrize("make", [capped, scaled_up, scaled_down])
def test_models_that_change_their_logits_after_the_head_are_refused(make):
    model = make()
    with pytest.raises(ModelError, match=f"{model.config.model_type}: its logits are not the head applied"):
        check_head(model)
    with pytest.raises(ModelError):
        token_nll(model, make_rows(64))


def test_a_hidden_state_before_the_norm_is_refused(tiny_llama):
    model = tiny_llama()
    model.model.norm = torch.nn.Identity()
    final = torch.nn.RMSNorm(32)
    torch.nn.init.uniform_(final.weight, 1.0, 3.0)
    original = model.forward

    def with_late_norm(**inputs):
        output = original(**inputs)
        output.logits = model.lm_head(final(model.model(inputs["input_ids"]).last_hidden_state))
        return output

    model.forward = with_late_norm
    with pytest.raises(ModelError, match="or a state before the norm"):
        check_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_heads_pass_in_every_dtype_and_mode(tiny_llama, dtype):
    unscaled = GraniteForCausalLM(GraniteConfig(**SMALL))
    uncapped = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=None))
    for model in (tiny_llama(), unscaled, uncapped):
        model.to(dtype).train()
        check_head(model)
        assert model.training


def test_bytes_are_those_of_the_labelled_text_without_eos(tiny_tokenizer):
    text = "Caf\u00e9 red"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    row = {"input_ids": [5, *ids, tiny_tokenizer.eos_token_id]}
    row["labels"] = [-100, *ids, tiny_tokenizer.eos_token_id]
    assert label_bytes([row, {"input_ids": [5], "labels": [-100]}], tiny_tokenizer) == len(text.encode()) == 9

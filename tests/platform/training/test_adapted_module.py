"""A model with an adapter as what is trained: its parameter groups, and checkpoints without frozen weights."""

import pytest
import torch
from tenfold.platform.models.adapters import LoraOptions, add_adapter
from tenfold.platform.training.module import TrainedModule
from tenfold.platform.training.trainer import Trainer
from torch import nn
from transformers import TrainingArguments


class WithProjector(TrainedModule):
    def __init__(self, model):
        super().__init__(model)
        self.projector = nn.Linear(4, 4)


@pytest.fixture
def module(tiny_llama):
    model = tiny_llama(320)
    add_adapter(model, LoraOptions(r=2))
    return WithProjector(model)


def trained_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_adapter_is_one_group_with_decay_and_projectors_have_their_own_rate(module, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3, weight_decay=1e-2)
    trainer = Trainer(model=module, args=arguments, projector_learning_rate=5e-4)
    adapter, projector = trainer.create_optimizer().param_groups
    assert (adapter["lr"], adapter["weight_decay"]) == (1e-3, 1e-2)
    assert (projector["lr"], projector["weight_decay"]) == (5e-4, 1e-2)
    own = {id(p) for name, p in module.named_parameters() if "lora_" in name}
    assert {id(p) for p in adapter["params"]} == own
    assert {id(p) for p in projector["params"]} == {id(p) for p in module.projector.parameters()}


def test_state_without_frozen_weights_is_loaded_and_leaves_them_alone(module):
    # a tied head is there twice
    named = dict(module.named_parameters(remove_duplicate=False))
    frozen = {name: p.clone() for name, p in named.items() if not p.requires_grad}
    state = {name: torch.ones_like(value) for name, value in module.state_dict().items() if name not in frozen}
    assert state.keys() == trained_names(module)
    module.load_state_dict(state)
    for name, parameter in named.items():
        assert torch.equal(parameter, frozen[name] if name in frozen else state[name])


def test_state_that_lacks_a_trained_weight_or_has_an_unknown_one_is_refused(module):
    state = module.state_dict()
    lacking = {name: value for name, value in state.items() if name != "projector.bias"}
    with pytest.raises(RuntimeError, match=r"1 names differ, the first is projector\.bias"):
        module.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r"1 names differ, the first is other"):
        module.load_state_dict({**state, "other": torch.zeros(1)})
    module.load_state_dict(lacking, strict=False)

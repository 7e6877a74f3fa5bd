"""Frozen models beside the trained one: teachers and references that never get a gradient."""

from __future__ import annotations

from typing import Any

from tenfold.platform.training.deepspeed_config import zero_stage
from torch import nn


def prepare_frozen(model: nn.Module, deepspeed_settings: dict[str, Any], device: Any) -> nn.Module:
    """Put a frozen model on this worker: sharded over the ranks under ZeRO-3, a copy on the device otherwise.

    Under ZeRO-3 `from_pretrained` has already split the weights; the engine gathers them layer by layer in forward, so
    that a teacher that fits on no single device still runs. Every rank must call its forward equally often.

    Args:
        model: loaded after the TrainingArguments were made.
        deepspeed_settings: the trained model's DeepSpeed configuration; stage and offloading are taken from it.
        device: where a whole copy goes.
    """
    model.requires_grad_(False)
    model.eval()
    if zero_stage(deepspeed_settings) != 3:
        return model.to(device)
    import deepspeed

    zero: dict[str, Any] = {"stage": 3}
    if "offload_param" in deepspeed_settings["zero_optimization"]:
        zero["offload_param"] = deepspeed_settings["zero_optimization"]["offload_param"]
    dtype = next(model.parameters()).dtype
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": str(dtype) == "torch.bfloat16"},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine

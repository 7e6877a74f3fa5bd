"""Frozen models beside the trained one: teachers and references that never get a gradient."""

from __future__ import annotations

from typing import Any, Literal

from tenfold.platform.models.sharding import sharded_by
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.deepspeed_config import zero_stage
from torch import nn

Offload = Literal["none", "cpu"]


def load_frozen(
    source: ModelSource,
    *,
    dtype: str,
    deepspeed_settings: dict[str, Any],
    device: Any,
    offload: Offload = "none",
) -> nn.Module:
    """Load a frozen model on this worker: sharded or offloaded where `frozen_settings` says so, else a whole copy.

    A sharded one is split over the ranks while it loads, and gathered layer by layer in forward: a teacher that fits
    on no single device still runs. Every rank must call its forward equally often.

    Args:
        source: which model.
        dtype: of its arithmetic, "float32" or "bfloat16".
        deepspeed_settings: the trained model's DeepSpeed configuration.
        device: where a whole copy goes.
        offload: see `frozen_settings`.

    Returns:
        The model, or DeepSpeed's engine with the model as its `module`.
    """
    from tenfold.platform.models.loading import load_causal_lm

    settings = frozen_settings(deepspeed_settings, dtype=dtype, offload=offload)
    with sharded_by(settings):
        model = load_causal_lm(source, dtype=dtype)
    model.requires_grad_(False)
    if settings is None:
        return model.to(device)
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


def frozen_settings(
    deepspeed_settings: dict[str, Any], *, dtype: str, offload: Offload = "none"
) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of a frozen model; None for a whole copy on the device.

    Args:
        deepspeed_settings: the trained model's; under its ZeRO-3 the frozen model is sharded as well, and offloaded
            as its `offload_param` says.
        dtype: of the frozen model's arithmetic, which may differ from the trained model's.
        offload: cpu keeps the weights in main memory, each rank its share, whatever stage the trained model uses.
    """
    if zero_stage(deepspeed_settings) != 3 and offload == "none":
        return None
    zero: dict[str, Any] = {"stage": 3}
    own = deepspeed_settings.get("zero_optimization", {}).get("offload_param")
    if offload == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    elif own is not None:
        zero["offload_param"] = own
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
    }

"""DeepSpeed's optimizer of bfloat16 without ZeRO takes a step of zero gradients when it is made; it must not count."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def forget_trial_step(optimizer: Any) -> None:
    """Set moments and step counts back to zero, and the float32 copies to the weights that they were made from.

    With the counts left at 1, Adam's first update is (1 - b1) sqrt(1 - b2^2) / ((1 - b1^2) sqrt(1 - b2)) of what it
    should be, 0.74 for its usual betas, and weights have decayed once too often.

    Args:
        optimizer: of an engine that has not trained yet; any other class than `FP16_UnfusedOptimizer`, which bfloat16
            gets in stage 0 as well, is left alone.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return
    for state in optimizer.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for copies, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for copy, weight in zip(copies, weights, strict=True):
            copy.data.copy_(weight.data)

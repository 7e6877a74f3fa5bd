"""The models of a worker: the policy that is trained, and the frozen ones that its objective reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.platform.models.adapters import add_adapter
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.frozen import load_frozen
from tenfold.platform.training.worker import WorkerContext


@dataclass(frozen=True)
class Loaded:
    """What an objective's `build_trainer` starts from."""

    config: AlignDistilConfig
    tokenizer: Any
    policy: Any
    frozen: dict[str, Any]


def frozen_dtype(config: AlignDistilConfig) -> str:
    """Return the dtype that the frozen models compute in."""
    from tenfold.platform.hardware import supports_bf16

    if config.frozen_dtype == "auto":
        return "bfloat16" if supports_bf16() else "float32"
    return config.frozen_dtype


def load_models(context: WorkerContext) -> Loaded:
    """Load what training needs on this worker.

    `context.config` has the method's options under `aligndistil` and, under `frozen`, the source of every frozen model
    that the objective reads (`AlignDistilConfig.frozen_names`).
    """
    payload = context.config
    config = AlignDistilConfig.model_validate(payload["aligndistil"])
    policy = load_causal_lm(config.model, seed=context.seed, dtype="float32")
    if config.lora is not None:
        add_adapter(policy, config.lora, seed=context.seed)
    frozen = {
        name: load_frozen(
            ModelSource.model_validate(source),
            dtype=frozen_dtype(config),
            deepspeed_settings=context.deepspeed,
            device=context.arguments.device,
            offload=config.frozen_offload,
        )
        for name, source in payload["frozen"].items()
    }
    return Loaded(config, load_tokenizer(config.model), policy, frozen)

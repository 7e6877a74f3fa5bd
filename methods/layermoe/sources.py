"""What the models of a run are called, told apart and loaded by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.methods.layermoe.modeling import Layout
    from tenfold.platform.stages import StageResult


def loaded(source: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a source that was dumped, on the CPU."""
    from tenfold.platform.models.loading import load_causal_lm, load_tokenizer

    given = ModelSource.model_validate(source)
    return load_causal_lm(given, seed=seed), load_tokenizer(given)


def on_device(model: Any) -> Any:
    """Return the model on the GPU that this worker was given, or where it is."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def saved(source: ModelSource, result: StageResult) -> ModelSource:
    """Return the model that a stage saved, to be loaded in the dtype that `source` asks for."""
    return ModelSource(model=result.model_folder, dtype=source.dtype)


def source_digest(source: ModelSource) -> str:
    """Return what tells a model from others; a fresh one by its configuration and tokenizer (and the run's seed)."""
    from tenfold.platform.models.loading import load_tokenizer, tokenizer_digest
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve
    from tenfold.platform.stages import digest_of

    if source.config is None:
        return model_digest(resolve(source))
    return digest_of({"config": source.config, "tokenizer": tokenizer_digest(load_tokenizer(source))})


def layout(source: ModelSource) -> Layout:
    """Return where a model has experts, which need not be anywhere."""
    from tenfold.methods.layermoe.modeling import layout_of
    from tenfold.platform.models.loading import outline

    return layout_of(outline(source).config)

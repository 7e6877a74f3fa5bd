"""What earlier runs have measured already, for a plan that starts nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tenfold.platform.stages import STATE, Stage, digest_of

if TYPE_CHECKING:
    from tenfold.methods.layermoe.config import LayerMoEConfig
    from tenfold.methods.layermoe.similarity import Similarity
    from tenfold.platform.context import PlanContext

METHOD = "layermoe"


def cached_similarity(config: LayerMoEConfig, context: PlanContext) -> Similarity | None:
    """Return what the first expansion's stage gave in an earlier run; None if there is none, or to know would cost."""
    from tenfold.methods.layermoe.similarity import Similarity
    from tenfold.methods.layermoe.stages import SIMILARITY, base_stage, similarity_stage
    from tenfold.platform.models.loading import describe
    from tenfold.platform.models.source import ModelSource

    options, source = config.expansions()[0], config.model
    if not options.needs_similarity or (source.config is None and describe(source).digest is None):
        return None  # without a manifest all weights would be read
    if config.base_training is not None:
        base = _finished(base_stage(config, context), context)
        if base is None:
            return None
        folder, state = base
        source = ModelSource(model=context.cache.uri_of(f"{folder}/{state['model']}"), dtype=source.dtype)
    found = _finished(similarity_stage(options, source), context)
    if found is None:
        return None
    return Similarity.from_json(json.loads(context.cache.read_text(f"{found[0]}/{SIMILARITY}")))


def _finished(stage: Stage, context: PlanContext) -> tuple[str, dict[str, Any]] | None:
    """Return (folder in the cache, state) of a shared stage that has been done; see `tenfold.platform.stages`."""
    folder = f"stages/{METHOD}/{stage.name}-{digest_of({**stage.decides, 'seed': context.seed})}"
    if not context.cache.exists(f"{folder}/{STATE}"):
        return None
    state = json.loads(context.cache.read_text(f"{folder}/{STATE}"))
    return (folder, state) if state["status"] == "finished" else None

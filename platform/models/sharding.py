"""Whether models are split over the ranks while they load: transformers asks one global of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sharded_by(settings: dict[str, Any] | None) -> Iterator[None]:
    """Load models inside the block by these DeepSpeed settings, whatever the training that goes on uses.

    Args:
        settings: of ZeRO-3, and `from_pretrained` splits the weights while it reads them; None loads whole models.
    """
    from transformers.integrations import deepspeed as state

    before = state._hf_deepspeed_config_weak_ref
    try:
        if settings is None:
            state.unset_hf_deepspeed_config()
        else:
            own = state.HfDeepSpeedConfig(settings)  # transformers keeps only a weak reference to it
        yield
    finally:
        state._hf_deepspeed_config_weak_ref = before
    if settings is not None:
        del own

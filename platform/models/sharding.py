"""Models split over the ranks by ZeRO-3: whether they are while they load, and their whole weights afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def sharded_by(settings: dict[str, Any] | None) -> Iterator[None]:
    """Load models inside the block by these DeepSpeed settings, whatever the training that goes on uses.

    transformers asks one global of its own.

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


@contextmanager
def gathered(parameters: Sequence[Tensor | None]) -> Iterator[None]:
    """Make whole parameters of what ZeRO-3 has sharded; does nothing for whole ones. All ranks must enter."""
    # a tied embedding may have been gathered as the head
    sharded: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    sharded = [parameter for parameter in sharded if parameter.ds_status.name != "AVAILABLE"]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield

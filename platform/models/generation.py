"""Generating text for many prompts, in batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ModelError
from tenfold.platform.models.hidden import evaluating
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.randomness import seeded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue every prompt with a text.

    Prompts of like length share a batch (longest first) and are padded on the left. A model's own generation defaults
    are not used, only its EOS tokens. Greedy texts do not depend on the batch size beyond rounding; sampled ones do,
    because a batch draws from one stream of random numbers.

    Args:
        model: a causal language model; its mode (training or not) is as before afterwards.
        tokenizer: with a padding token.
        prompts: token ids, at least one each.
        options: length, sampling, batch size.
        seed: decides what is sampled; the global random state is neither read nor changed.
        on_progress: called with (done, total) after every batch.

    Returns:
        The new text of each prompt, in the order given, up to the first EOS token and without special tokens.

    Raises:
        ModelError: an empty prompt, a token that the model does not have, or more positions than it has.
    """
    _check_prompts(model, prompts, options)
    config = _generation_config(model, tokenizer, options)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [""] * len(prompts)
    with seeded(seed):
        for start in range(0, len(order), options.batch_size):
            batch = order[start : start + options.batch_size]
            answers = _continue(model, tokenizer, [prompts[index] for index in batch], options, config)
            for index, tokens in zip(batch, answers, strict=True):
                texts[index] = _text(tokens, tokenizer, config.eos_token_id)
            if on_progress is not None:
                on_progress(start + len(batch), len(order))
    return texts


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    seed: int,
) -> list[list[int]]:
    """Continue all prompts at once, whatever `options.batch_size` is; else as `generate_texts`.

    Returns:
        The new tokens of each prompt with the EOS token that ends them; one that was cut at `max_new_tokens` has none.
    """
    _check_prompts(model, prompts, options)
    if not prompts:
        return []
    with seeded(seed):
        return _continue(model, tokenizer, prompts, options, _generation_config(model, tokenizer, options))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer of this model, sorted: its own and its tokenizer's EOS; none if neither."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id} - {None})


def up_to_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens up to the first that ends an answer, it included."""
    at = next((number for number, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return list(tokens[:at])


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    config: GenerationConfig,
) -> list[list[int]]:
    """Return the new tokens of each prompt up to the first EOS token, it included."""
    import torch

    generate: Any = model.generate
    ids, mask = _left_padded(prompts, tokenizer, options)
    with torch.no_grad(), _evaluation_mode(model, config):
        output = generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    return [up_to_end(tokens, config.eos_token_id) for tokens in output[:, ids.shape[1] :].tolist()]


def _check_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> None:
    if not prompts:
        return
    empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ModelError(f"prompt {empty[0]} has no tokens, so there is nothing to continue. Give at least one")
    config = model.config.get_text_config()
    largest = max(max(prompt) for prompt in prompts)
    if largest >= config.vocab_size:
        raise ModelError(
            f"a prompt holds token {largest}, the model has {config.vocab_size}. Use the model's own tokenizer"
        )
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if limit is None or longest + options.max_new_tokens <= limit:
        return
    message = (
        f"a prompt of {longest} tokens and {options.max_new_tokens} new ones need more than the {limit} positions of "
        f"this {config.model_type}"
    )
    if getattr(config, "rope_parameters", None) is None:
        raise ModelError(f"{message}. Lower max_new_tokens or shorten the prompts")
    # Rotary positions go on beyond what was trained.
    logger.warning("%s; texts may be worse beyond them", message)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions
) -> GenerationConfig:
    from transformers import GenerationConfig

    unread = set() if options.do_sample else {"temperature", "top_p", "top_k"}
    return GenerationConfig(
        **options.model_dump(exclude={"batch_size", *unread}),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        use_cache=True,
    )


@contextmanager
def _evaluation_mode(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    own = model.generation_config
    # generate() fills what a given configuration leaves open from the model's.
    model.generation_config = config
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own


def _left_padded(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, options: GenerationOptions
) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both [B, T] int64."""
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids = torch.empty(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        # The penalty counts padding as tokens that occurred: with EOS as padding, answers would not end.
        ids[row] = prompt[0] if options.repetition_penalty != 1 else tokenizer.pad_token_id
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _text(tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> str:
    kept = tokens[:-1] if tokens and tokens[-1] in ends else tokens
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

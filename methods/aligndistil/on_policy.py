"""On-policy training: the policy is trained on what it writes itself, with the weights that it has at that step.

Section 3.7 of the method: sample a response to each prompt from the current policy, take one optimizer step on it,
never use it again. So a batch is never stale, and no gradient goes through the sampling. Generation is in eval mode
with a cache. Tokens after the first EOS are not there; a response that was cut has no EOS, and all its tokens count.

Legend: P prompts of a batch, n samples of each, B = P n sequences, T padded length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.models.generation import end_tokens, generate_tokens
from tenfold.platform.models.vllm_rollout import Engine, VllmEngine
from torch import Tensor

logger = logging.getLogger(__name__)

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


class Rollout:
    """Turns a batch of prompts into one of the policy's own responses.

    Args:
        config: the method's options, `on_policy` among them.
        tokenizer: the policy's.
        collator: pads rows of `input_ids` and `labels` on the right.
        seed: of the run.

    Attributes:
        engine: what generates in the place of transformers; None: transformers.
    """

    engine: Engine | None = None

    def __init__(self, config: AlignDistilConfig, tokenizer: Any, collator: Collator, seed: int):
        assert config.on_policy is not None
        self._options, self._generation = config.on_policy, config.on_policy.generation()
        self._max_prompt_length = config.data.max_prompt_length
        self._tokenizer, self._collator, self._seed = tokenizer, collator, seed
        if (self._options.temperature, self._options.top_p, self._options.top_k) != (1.0, 1.0, 0):
            logger.info("responses are drawn with another temperature, top_p or top_k: not from the policy itself")

    def start_engine(self, model: Any, accelerator: Any) -> None:
        """Start what generates, where it is not transformers; once, on every rank, before training."""
        if self._options.engine == "vllm":
            self.engine = VllmEngine(
                self._generation,
                model,
                accelerator,
                self._tokenizer,
                memory=self._options.vllm_memory,
                max_prompt_length=self._max_prompt_length,
            )

    def seed_of(self, step: int, micro_batch: int, rank: int) -> int:
        """Return the seed of one forward pass of a step on one rank: another for each, the same in a resumed run."""
        return hash((self._seed, step, micro_batch, rank)) % 2**63

    def generate(self, model: Any, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Write n responses to each prompt with the model's current weights.

        Args:
            model: the policy; its mode (training or not) is as before afterwards. All ranks must call this.
            batch: `input_ids` and `attention_mask` [P, T] of prompts, padded on the right; `labels` are not read.
            seed: decides what is sampled; the global random state is neither read nor changed.

        Returns:
            input_ids, attention_mask and labels, int64 [B, T'], padded on the right: the n sequences of the first
            prompt, then those of the second. labels are the response's tokens with the EOS that ends it.

        Raises:
            ModelError: as `generate_tokens`.
        """
        sizes = batch["attention_mask"].sum(1).tolist()
        prompts = [ids[:size] for ids, size in zip(batch["input_ids"].tolist(), sizes, strict=True)]
        number = self._options.samples_per_prompt
        repeated = [prompt for prompt in prompts for _ in range(number)]
        if self.engine is None:
            answers = generate_tokens(model, self._tokenizer, repeated, self._generation, seed=seed)
        else:
            # one call a sample: an engine may give equal prompts equal responses
            samples = [self.engine.generate(prompts, (seed + sample) % 2**63) for sample in range(number)]
            answers = [answer for of_prompt in zip(*samples, strict=True) for answer in of_prompt]
        rows = [
            {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
            for prompt, answer in zip(repeated, answers, strict=True)
        ]
        return self._collator(rows)

    def truncated(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return which sequences of `generate` were cut before the policy ended them, bool [B]."""
        last = batch["attention_mask"].sum(1, keepdim=True) - 1
        tokens = batch["input_ids"].gather(1, last).squeeze(1)
        return ~torch.isin(tokens, tokens.new_tensor(end_tokens(model, self._tokenizer)))

"""On-policy responses from vLLM on the training GPUs instead of transformers' own generation.

trl's `VLLMGeneration` does the work: an engine in each worker's process, which sleeps while the model trains and takes
its weights anew (gathered one by one under ZeRO-3) each time it is asked. Not run on a GPU so far: the tests use a
stand-in for the engine, and check the arguments against trl's signatures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

from tenfold.platform.errors import ConfigError
from tenfold.platform.models.generation import end_tokens, up_to_end
from tenfold.platform.models.options import GenerationOptions


class Engine(Protocol):
    """What writes responses in the trained model's place; all ranks ask it equally often."""

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Return the new tokens of each prompt by the model's current weights, with the EOS that ends them.

        The seed may be each prompt's own: equal prompts then get equal responses.
        """


def check_engine(option: str) -> None:
    """Make sure that vLLM can be used here.

    Args:
        option: the one by which the user asked for it, for the message.

    Raises:
        ConfigError: a package is missing.
    """
    missing = [package for package in ("vllm", "trl") if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{option} = vllm: {' and '.join(missing)} not installed here. Install tenfold[gpu,align] on machines "
            f"with a GPU, or use {option}=transformers"
        )


def engine_arguments(generation: GenerationOptions, *, memory: float, max_prompt_length: int) -> dict[str, Any]:
    """Return the arguments of `VLLMGeneration` besides model, accelerator and tokenizer."""
    return {
        "mode": "colocate",
        "gpu_memory_utilization": memory,
        "max_model_length": max_prompt_length + generation.max_new_tokens,
        # an engine that sleeps takes the weights anew whenever it wakes
        "enable_sleep_mode": True,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "max_completion_length": generation.max_new_tokens,
        "logprobs": None,
    }


class VllmEngine:
    """An `Engine` in this worker's process.

    Args:
        generation: length and sampling.
        model: the one that trains; its weights must lie in a folder.
        accelerator: the Trainer's.
        tokenizer: the model's.
        memory: share of a GPU's memory that the engine may take.
        max_prompt_length: tokens of the longest prompt.

    Raises:
        ConfigError: vLLM or trl is missing.
    """

    def __init__(
        self,
        generation: GenerationOptions,
        model: Any,
        accelerator: Any,
        tokenizer: Any,
        *,
        memory: float,
        max_prompt_length: int,
    ):
        check_engine("config.on_policy.engine")
        from trl.generation.vllm_generation import VLLMGeneration

        self._ends = end_tokens(model, tokenizer)
        # vLLM's own names, for what trl has no argument
        self._rules = {"min_tokens": generation.min_new_tokens, "stop_token_ids": self._ends}
        arguments = engine_arguments(generation, memory=memory, max_prompt_length=max_prompt_length)
        self._engine = VLLMGeneration(model, accelerator, tokenizer, **arguments)

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """See `Engine`."""
        self._engine.generation_kwargs = {"seed": seed, **self._rules}
        _, answers, *_ = self._engine.generate(
            prompts=[list(prompt) for prompt in prompts], images=None, num_generations=1
        )
        return [up_to_end(answer, self._ends) for answer in answers]

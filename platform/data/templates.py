"""Prompt templates: the text a model reads before its response."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenfold.platform.data.config import DataConfig
from tenfold.platform.data.examples import Example
from tenfold.platform.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The format of the Dolly-style sets of DSKD (arXiv 2406.17328), which is Alpaca's, to the character.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
    """Make sure that the tokenizer can do what the configuration asks.

    Raises:
        DataError: it has no end-of-sequence token, or no chat template where one is asked for.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set its eos_token, responses end with it")
    if config.template == "chat" and not tokenizer.chat_template:
        raise DataError("template = chat: the tokenizer has no chat template; set template to alpaca or none")


def prompt_text(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Return the text before the response.

    * chat: the tokenizer's own template up to the assistant's header; `config.system` comes first where the
      conversation has no system message of its own.
    * alpaca: the format above; an empty input leaves its section out.
    * none: the instruction and, on the next line, its input. Nothing is added: a text formatted elsewhere stays as it
      is.

    Raises:
        DataError: the chat template is missing, or refuses the conversation.
    """
    if config.template == "alpaca":
        template = ALPACA_INPUT if example.input.strip() else ALPACA
        return template.format(instruction=example.instruction, input=example.input)
    if config.template == "none":
        return example.messages[-1]["content"]
    check_tokenizer(tokenizer, config)
    messages = [dict(message) for message in example.messages]
    if config.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(f"{example.origin}: the tokenizer's chat template refuses it: {error}") from error

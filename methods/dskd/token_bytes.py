"""The bytes that every token id of a fast tokenizer stands for (exact token alignment, DSKDv2, arXiv 2504.11426).

Two families of tokenizers spell the same text differently: byte-level BPE writes every byte as a printable character
(a space is U+0120), SentencePiece writes a space as U+2581 and bytes without a token of their own as <0xNN>. In bytes
they agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARKER = "\u2581"
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's table from characters to bytes.

    The printable bytes of Latin-1 are written as themselves, the other 68 as U+0100 and following, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return what each id stands for, b"" for an id without a token; reads the whole vocabulary, so keep the table.

    An added token stands for its text. Partial characters are possible: the bytes of one token need not be UTF-8.

    Raises:
        ModelError: no fast tokenizer, or one that is neither byte-level nor SentencePiece-like (e.g. WordPiece).
    """
    is_byte_level = _is_byte_level(tokenizer)
    alphabet = byte_alphabet()
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if not is_byte_level:
            # added tokens as well: the ids of several of them (Gemma's runs of spaces) are also the model's own tokens
            table[index] = _sentencepiece_bytes(token)
        elif index in added or not alphabet.keys() >= set(token):
            table[index] = token.encode()
        else:
            table[index] = bytes(alphabet[character] for character in token)
    return table


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARKER, " ").encode()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell byte-level from SentencePiece-like by the definition of the decoder, else of the pre-tokenizer."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: a slow tokenizer. Token alignment needs a fast one (tokenizer.json)"
        )
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("decoder", "pre_tokenizer"):
        steps = list(_steps(definition[part]))
        if any(step["type"] == "ByteLevel" for step in steps):
            return True
        if any(step["type"] in ("Metaspace", "ByteFallback") or _restores_spaces(step) for step in steps):
            return False
    raise ModelError(
        f"{tokenizer.name_or_path}: its definition is neither byte-level nor SentencePiece-like, so the bytes of its "
        "tokens are unknown. Use models with other tokenizers, or cross-model attention instead of token alignment"
    )


def _steps(definition: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a decoder or pre-tokenizer, whose sequences may be nested."""
    if definition is None:
        return
    if definition["type"] != "Sequence":
        yield definition
    for step in definition.get("decoders", definition.get("pretokenizers", ())):
        yield from _steps(step)


def _restores_spaces(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step["pattern"].get("String") == SPACE_MARKER and step["content"] == " "

"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
CONTEXT_TOKENS = 6  # tokens decoded before new ones, so that spaces between words come out as in the whole text


class TextDecoder:
    """Decodes token by token; the pieces joined are the text of all tokens.

    A token may be a part of a character (byte-level vocabularies), and many decoders drop the space before the first
    word. So each token is decoded behind some that came before it, and text that ends inside a character is kept back.

    Args:
        decode: from token ids to text, special tokens left out.
        context_ids: the tokens before the first new one (the prompt); only the last few are used.
    """

    def __init__(self, decode: Callable[[list[int]], str], context_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context_ids[-CONTEXT_TOKENS:])
        self._start = 0  # of the tokens decoded as context
        self._end = len(self._ids)  # of those whose text was given out

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain; empty inside a character."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def finish(self) -> str:
        """Return what was kept back: bytes that never became a character, as replacement characters."""
        text = self._new_text() if self._end < len(self._ids) else ""
        self._start = self._end = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._end])
        return self._decode(self._ids[self._start :])[len(before) :]


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and keeps back what may be the start of one.

    Args:
        stops: non-empty strings; none keeps nothing back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """Add text and return what may be sent; after a match (`matched`) there is nothing more."""
        if self.matched:
            return ""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.matched = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was kept back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0

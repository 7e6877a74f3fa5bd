"""Who may ask, and how much they may send."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tenfold.serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request


class KeyRing:
    """The keys that are accepted; none accepts everyone."""

    def __init__(self, keys: Iterable[str] | None) -> None:
        self._digests = None if keys is None else [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> str | None:
        """Compare an Authorization header with all keys, in a time that says nothing about them.

        Returns:
            A name for the holder of the key that does not give it away; None where everyone is accepted.

        Raises:
            ApiError: 401.
        """
        if self._digests is None:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        # No early end: every key is compared.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            what = "a wrong API key" if authorization else "no API key"
            raise ApiError(
                401,
                f"the request has {what}; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.sha256(b"client:" + given).hexdigest()[:16]


def _digest(key: str) -> bytes:
    # Equal lengths, so that compare_digest does not give away the length of a key.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


async def read_json(request: Request, max_bytes: int) -> Any:
    """Read a request's body as JSON, and no more of it than allowed.

    Raises:
        ApiError: 413 for a longer body, 400 for one that is not JSON.
    """
    check_announced_length(request, max_bytes, "limits.max_body_bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_long(len(body), max_bytes, "limits.max_body_bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


def check_announced_length(request: Request, max_bytes: int, option: str) -> None:
    """Refuse a body whose Content-Length is too large before any of it is read.

    Raises:
        ApiError: 413.
    """
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise too_long(int(length), max_bytes, option)


def too_long(length: int, max_bytes: int, option: str) -> ApiError:
    """Return the answer to a body of `length` bytes or more where the server's option allows `max_bytes`."""
    return ApiError(
        413,
        f"the body has {length} bytes or more, this server takes {max_bytes} ({option}); send less",
        code="request_too_large",
    )

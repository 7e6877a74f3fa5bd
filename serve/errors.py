"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
SERVER_ERROR = 500


class FieldError(NamedTuple):
    """One field of a request that cannot be used, and what to do."""

    field: str
    message: str


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status code.
        message: what was given, what is needed, what to do.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: of the answer.
        errors: all fields that are wrong, where there may be several.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[FieldError] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.errors = tuple(errors)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON to send."""
        default = "server_error" if self.status >= SERVER_ERROR else "invalid_request_error"
        error: dict[str, Any] = {
            "message": str(self),
            "type": TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        if self.errors:
            error["errors"] = [problem._asdict() for problem in self.errors]
        return {"error": error}


def of_status(status: int, detail: Any = None) -> ApiError:
    """Return the error for a status that the web framework raised by itself, such as an unknown path."""
    return ApiError(status, str(detail or HTTPStatus(status).phrase))

"""Answers that are no success, in OpenAI's shape.

Source: OpenAI's API reference, "Error codes"; what makes its client ask again is in the client's own code.
"""

from __future__ import annotations

from pydantic import BaseModel
from starlette.responses import JSONResponse

RETRY_AFTER_S = 1
"""Told to clients that find the queue full."""
DEAD = "dead"
"""The code of answers after which none will come but from a server that is started again."""


class ErrorDetail(BaseModel):
    """What is wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, type=kind, code=code, param=param)

    def response(self) -> JSONResponse:
        is_final = self.status == 408 or self.detail.code == DEAD
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) and not is_final else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if is_final:
            headers["X-Should-Retry"] = "false"  # OpenAI's client would ask for the same twice more, and wait as long
        if self.status in (408, 413, 431) or self.detail.code == "two_lengths":
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse(ErrorAnswer(error=self.detail).model_dump(), self.status, headers)


def wrong(message: str, param: str | None = None, status: int = 400, code: str | None = None) -> ApiError:
    """An error of the client's."""
    return ApiError(status, message, "invalid_request_error", code, param)


def defect() -> ApiError:
    """An error of ours, of which the client learns no more; where it was raised is for the server's own log."""
    return ApiError(500, "this is a defect of the server: please report it", "server_error", "defect")


def dead(message: str) -> ApiError:
    """The engine has ended, and with it all answers."""
    return ApiError(503, message, "server_error", DEAD)

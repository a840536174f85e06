"""Every HTTP error says {"code", "text"} (PROTOCOL 6), those of the framework too."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from taesd_stream.fields import quoted


class ApiError(Exception):
    """An answer {"code", "text"} with an HTTP status."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code, self.text = status, code, text


class ErrorAnswer(BaseModel):
    """Every error's body: a code for programs, a text for people."""

    code: str
    text: str


_REFUSED: Final[dict[str, Any]] = {"model": ErrorAnswer, "description": "Refused"}
ERROR_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {"4XX": _REFUSED, "5XX": _REFUSED}  # for /openapi.json


def _fault(error: Mapping[str, Any]) -> str:
    """One of Pydantic's errors: where, what was expected, what came."""
    came = "" if error["type"] in ("missing", "json_invalid") else f", got {quoted(error['input'])}"
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}{came}"


def answer_errors(app: FastAPI, count: Counter) -> None:
    """Make the application answer so. count: of such answers, by status and code."""

    def answer(status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> Response:
        count.labels(status, code).inc()
        return JSONResponse({"code": code, "text": text}, status, headers)

    @app.exception_handler(ApiError)
    async def ours(_request: Request, error: ApiError) -> Response:
        return answer(error.status, error.code, error.text)

    @app.exception_handler(HTTPException)
    async def frameworks(_request: Request, error: HTTPException) -> Response:
        """No such route, no such method."""
        return answer(error.status_code, HTTPStatus(error.status_code).name.lower(), str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_request(_request: Request, error: RequestValidationError) -> Response:
        return answer(422, "bad_request", "; ".join(map(_fault, error.errors())))

    @app.exception_handler(Exception)
    async def broken(_request: Request, error: Exception) -> Response:
        """A fault of ours: the log has its traceback."""
        return answer(500, "internal", f"{type(error).__name__}: this is a bug; the daemon's log has more.")

"""Every HTTP error says {"code", "text"} (PROTOCOL 6), those of the framework too."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException


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


def answer_errors(app: FastAPI) -> None:
    """Make the application answer so."""
    app.add_exception_handler(ApiError, _answer_ours)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_bad_request)


async def _answer_ours(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse({"code": error.code, "text": error.text}, error.status)


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    """The framework's own: no such route, no such method."""
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    return JSONResponse({"code": code, "text": str(error.detail)}, error.status_code, error.headers)


async def _answer_bad_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return JSONResponse({"code": "bad_request", "text": "; ".join(faults)}, 422)

"""Whatever goes wrong, answered in the shape of OpenAI's errors: {"error": {message, type, param, code}}."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from specformer_jax.engine.request import Failed, QueueFull, Stopped
from specformer_jax.errors import UserError


class ErrorBody(BaseModel):
    """What went wrong, for the OpenAPI description.

    Attributes:
      message: what went wrong, in one sentence.
      type: "invalid_request_error", "rate_limit_error" or "server_error".
      param: the field at fault, with dots between its parts.
      code: a name of the mistake that clients may look for.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The object that holds an `ErrorBody`."""

    error: ErrorBody


class ApiError(Exception):
    """An error that has its HTTP status already."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        """The JSON of the answer."""
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else None
        error = ErrorBody(message=self.message, type=kind or "invalid_request_error", param=self.param, code=self.code)
        return {"error": error.model_dump()}

    def response(self) -> fastapi.Response:
        """The answer; ASCII, because what a client sent may not encode."""
        return fastapi.Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def of(error: Exception) -> ApiError:
    """The answer to an exception from here, the engine or the framework."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case UserError():
            return ApiError(400, str(error))
        case QueueFull():
            headers = {"Retry-After": str(math.ceil(error.retry_after))}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case Failed():
            return ApiError(503, str(error), code="engine_failed")
        case Stopped():
            return ApiError(503, "the server is shutting down", code="shutting_down")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    # The framework logs it.
    return ApiError(500, f"{type(error).__name__} in the server: see its log", code="internal_error")


def install(app: fastapi.FastAPI) -> None:
    """Lets the app answer every exception in this shape."""

    async def answer(request: fastapi.Request, error: Exception) -> fastapi.Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            return _no_route(request, error).response()
        return of(error).response()

    for kind in (ApiError, RequestValidationError, UserError, QueueFull, Stopped, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _no_route(request: fastapi.Request, error: HTTPException) -> ApiError:
    """What to use in place of a path that is not there, or of a method that does not go with it."""
    path, method = request.url.path, request.method
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "another method")
        message = f"{path} takes no {method}: use {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    routes = [route for route in request.app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    paths = [(route, route.path.replace(":path}", "}")) for route in routes]
    known = {f"{method} {path}": path for route, path in paths for method in route.methods or ()}
    near = difflib.get_close_matches(path, known.values(), n=1, cutoff=0.7)
    use = [name for name, other in known.items() if other in near] or sorted(known)
    return ApiError(404, f"there is no {path} here: use {', '.join(use)}", code="unknown_route")


def _invalid(error: RequestValidationError) -> ApiError:
    """One sentence for a field that does not fit."""
    # A field may have several forms, each of which complains: the one that fits furthest says most.
    details = error.errors()
    paths = [_path(error.body, detail) for detail in details]
    path = max(paths, key=len)
    about = [detail for detail, other in zip(details, paths, strict=True) if other == path]
    param = ".".join(map(str, path)) or None
    match about[0]["type"]:
        case "json_invalid":
            return ApiError(400, "the body is not valid JSON", code="invalid_json")
        case "extra_forbidden":
            return ApiError(400, f"unknown field {param!r}", param=param, code="unknown_field")
        case "missing":
            return ApiError(400, f"{param or 'the body'} is missing", param=param, code="missing_field")
    messages = dict.fromkeys(detail["msg"] for detail in about)
    return ApiError(400, f"{param or 'the body'}: {' or '.join(messages)}", param=param, code="invalid_value")


def _path(body: object, detail: dict) -> list:
    """Where in the body a complaint is, without the names of the forms that pydantic tried there."""
    path: list = []
    *_, last = detail["loc"]
    for part in detail["loc"][1:]:
        if isinstance(body, dict) and (part in body or (detail["type"] == "missing" and part is last)):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        path.append(part)
    return path

"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

import logging
import re
from collections.abc import Mapping
from types import MappingProxyType

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from bagel_opt.errors import ProfileError, shown
from bagel_opt.options import described
from bagel_opt.serve.arrival import CancelledError, DeadlineError, QueueFullError, StalledError

log = logging.getLogger("bagel_opt.serve")


class ApiError(HTTPException):
    """An answer other than success. `param`: the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(status, message)
        self.param, self.code = param, code


def refused(error: ValueError, spelled: Mapping[str, str] = MappingProxyType({})) -> ApiError:
    """What the model says of a bad request. Its messages begin with the option's name where one is to blame, or with that of
    the inputs. spelled: the client's fields of what has another name there."""
    name, sign = re.match(r"(\w*)(=?)", str(error)).groups()
    if not sign and name not in described() and name not in spelled:
        return ApiError(400, str(error))
    field = spelled.get(name, name)
    message = str(error) if field == name else f"{field}: {str(error).removeprefix(f'{name}: ')}"
    return ApiError(400, message, field)


def body(error: ApiError) -> dict:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
    return {"error": {"message": error.detail, "type": kind, "param": error.param, "code": error.code}}


def as_api_error(error: Exception) -> ApiError:
    """Any failure of a request; what is not the client's doing is logged and not told."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full")
        case DeadlineError():
            return ApiError(504, str(error), code="deadline_exceeded")
        case StalledError():
            return ApiError(408, str(error), code="body_stalled")
        case CancelledError() | ClientDisconnect():
            return ApiError(499, "the client has gone", code="client_closed_request")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case ProfileError() | FloatingPointError():  # a thought or a guidance that led too far
            return refused(error)
        case MemoryError():
            log.error("request failed: %s", error)
            return ApiError(503, f"{error}"[:500] or "the server has too little memory", code="out_of_memory")
        case ChildProcessError():  # of several GPUs; which process it was is the log's
            log.error("request failed: %s", error)
            return ApiError(503, "the server has lost one of its GPUs and must be started again", code="gpu_lost")
    log.error("request failed: %s", type(error).__name__, exc_info=error)
    return ApiError(500, "the server failed on this request", code="internal_error")


def response(error: Exception) -> JSONResponse:
    found = as_api_error(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(error.retry_after)
    if found.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body(found), found.status_code, headers)


def install(app: FastAPI) -> None:
    async def handle(http: Request, error: HTTPException) -> JSONResponse:
        if error.status_code in (404, 405) and not isinstance(error, ApiError):
            paths = app.openapi()["paths"].items()
            known = ", ".join(f"{method.upper()} {path}" for path, methods in paths for method in methods)
            error.detail = f"there is no {http.method} {shown(http.url.path):.80}; there are {known}"
        return response(error)

    app.add_exception_handler(HTTPException, handle)  # which FastAPI answers itself; all others reach the gate

"""The one table that says how each of our errors looks to a client."""

import math
from dataclasses import dataclass

from aiohttp import web

from swapserve import errors
from swapserve.errors import SwapServeError
from swapserve.router.downstream import ErrorAnswer


@dataclass(frozen=True, slots=True)
class Shown:
    """Status, OpenAI error type and, where waiting helps, after how many seconds to retry.

    The seconds are for an error that carries no prediction of its own.
    """

    status: int
    type: str
    retry_after_s: int | None = None


LONGEST_RETRY_S = 3600
"""No prediction is good enough to send a client away for longer."""
_INVALID = "invalid_request_error"
_SERVER = "server_error"
_UNAVAILABLE = "service_unavailable_error"

TABLE: dict[type[SwapServeError], Shown] = {
    errors.SwapServeError: Shown(500, _SERVER),
    errors.ConfigError: Shown(500, _SERVER),
    errors.InvalidRequest: Shown(400, _INVALID),
    errors.RequestTooLarge: Shown(413, _INVALID),
    errors.Unauthenticated: Shown(401, "authentication_error"),
    errors.Forbidden: Shown(403, "permission_error"),
    errors.ModelNotFound: Shown(404, _INVALID),
    errors.EndpointNotFound: Shown(404, _INVALID),
    errors.MethodNotAllowed: Shown(405, _INVALID),
    errors.AdmissionError: Shown(503, _UNAVAILABLE, 5),
    errors.QueueFull: Shown(429, "rate_limit_error", 5),
    errors.QueueTimeout: Shown(503, _UNAVAILABLE, 10),
    errors.DeadlineUnmeetable: Shown(503, _UNAVAILABLE, 10),
    errors.ShuttingDown: Shown(503, _UNAVAILABLE, 10),
    errors.CapacityError: Shown(503, _UNAVAILABLE, 30),
    errors.EngineError: Shown(503, _UNAVAILABLE, 5),
    errors.StartFailed: Shown(503, _UNAVAILABLE, 30),
    errors.EngineCrashed: Shown(502, _SERVER, 5),
    errors.EngineUnavailable: Shown(503, _UNAVAILABLE, 10),
    errors.UpstreamError: Shown(502, _SERVER, 1),
    errors.SwapError: Shown(503, _UNAVAILABLE, 5),
    errors.CriuError: Shown(503, _UNAVAILABLE, 5),
    errors.CudaError: Shown(503, _UNAVAILABLE, 5),
    errors.DeviceBusy: Shown(503, _UNAVAILABLE, 10),
    errors.QuiesceFailed: Shown(503, _UNAVAILABLE, 5),
    errors.ImageError: Shown(503, _UNAVAILABLE, 5),
    errors.CanaryFailed: Shown(503, _UNAVAILABLE, 5),
    errors.KeeperError: Shown(503, _UNAVAILABLE, 5),
    errors.KeeperUnavailable: Shown(503, _UNAVAILABLE, 5),
    errors.CommandError: Shown(500, _SERVER),
    errors.CommandTimeout: Shown(504, _SERVER),
    errors.DownloadError: Shown(503, _UNAVAILABLE, 30),
    errors.IllegalTransition: Shown(500, _SERVER),
}


def explain(error: SwapServeError) -> ErrorAnswer:
    """Return what a client is told; a class that is not in the table is shown as its base is."""
    shown = next(TABLE[base] for base in type(error).__mro__ if base in TABLE)
    retry_s = _retry_s(error, shown)
    headers = {} if retry_s is None else {"Retry-After": str(retry_s)}
    if isinstance(error, errors.MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    body = {
        "message": str(error),
        "type": shown.type,
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    if isinstance(error, errors.ModelNotFound):
        body["param"] = "model"
    return ErrorAnswer(status=shown.status, body={"error": body}, headers=headers)


def _retry_s(error: SwapServeError, shown: Shown) -> int | None:
    """Return after how many whole seconds a client should try again; None: it need not."""
    predicted_s: float | None = getattr(error, "retry_after_s", None)
    if shown.retry_after_s is None or predicted_s is None or math.isnan(predicted_s):
        return shown.retry_after_s
    return math.ceil(min(max(predicted_s, 1.0), LONGEST_RETRY_S))


def as_response(error: SwapServeError) -> web.Response:
    """Return the error as an answer of its own."""
    answer = explain(error)
    return web.json_response(answer.body, status=answer.status, headers=answer.headers)

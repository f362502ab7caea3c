"""Every error of ours: a class per cause, fields instead of formatted strings.

`code` is stable (API clients and scripts may match it); `retryable` says whether the same
request may succeed later. Mapping to HTTP is in `api/errors.py` alone.
"""

from collections.abc import Sequence


class SwapServeError(Exception):
    """Root of all errors raised on purpose.

    Attributes:
        code: stable identifier in snake case.
        retryable: whether trying again later can help.
    """

    code = "internal_error"
    retryable = False


class ConfigProblem:
    """One thing wrong in a configuration: where it is, what was found and what was expected."""

    def __init__(self, *, path: str, line: int | None, key: str, found: str, expected: str) -> None:
        self.path = path
        self.line = line
        self.key = key
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path}:{self.line}"
        return f"{where}: {self.key}: found {self.found}; expected {self.expected}"


class ConfigError(SwapServeError, ValueError):
    """The configuration cannot be used; carries every problem found, not only the first."""

    code = "config_error"

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class InvalidRequest(SwapServeError, ValueError):
    """A client's request that cannot be understood; `param` names the field."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class RequestTooLarge(InvalidRequest):
    """A request body over the configured limit."""

    code = "request_too_large"

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(f"The request body is larger than {limit_bytes} bytes.")


class EndpointNotFound(SwapServeError, LookupError):
    """No such path here, or none that this engine may be asked for."""

    code = "endpoint_not_found"


class MethodNotAllowed(SwapServeError):
    """The path exists, but not with this method; `allowed` are those it has."""

    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Sequence[str]) -> None:
        self.allowed = tuple(allowed)
        super().__init__(f"{method} is not possible on {path}; use {', '.join(self.allowed)}.")


class ModelNotFound(SwapServeError, LookupError):
    """No engine has that name or alias; `near` are the closest ones that exist."""

    code = "model_not_found"

    def __init__(self, name: str, near: Sequence[str] = ()) -> None:
        self.name = name
        self.near = tuple(near)
        hint = f" Did you mean {', '.join(self.near)}?" if self.near else ""
        super().__init__(f"The model '{name}' does not exist.{hint} GET /v1/models lists them.")


class AdmissionError(SwapServeError):
    """A request that was not let in.

    `retry_after_s`: seconds after which another attempt should find its engine, as predicted;
    None: nobody knows.
    """

    retryable = True
    retry_after_s: float | None = None


class QueueFull(AdmissionError):
    """Too many requests wait for this engine or, `total`, for all engines together."""

    code = "queue_full"

    def __init__(
        self, engine: str, limit: int, *, total: bool = False, retry_after_s: float | None = None
    ) -> None:
        self.engine = engine
        self.limit = limit
        self.total = total
        self.retry_after_s = retry_after_s
        queue = "all models together" if total else f"'{engine}'"
        super().__init__(f"{limit} requests already wait for {queue}. Try again later.")


class QueueTimeout(AdmissionError, TimeoutError):
    """The engine did not become available in time."""

    code = "queue_timeout"

    def __init__(self, engine: str, waited_s: float, retry_after_s: float | None = None) -> None:
        self.engine = engine
        self.waited_s = waited_s
        self.retry_after_s = retry_after_s
        super().__init__(f"'{engine}' could not be made available within {waited_s:.0f} s.")


class DeadlineUnmeetable(AdmissionError):
    """The answer would begin, as predicted, after the request's deadline."""

    code = "deadline_unmeetable"

    def __init__(
        self,
        engine: str,
        deadline_s: float,
        predicted_s: float,
        retry_after_s: float | None = None,
    ) -> None:
        self.engine = engine
        self.deadline_s = deadline_s
        self.predicted_s = predicted_s
        self.retry_after_s = retry_after_s
        super().__init__(
            f"An answer of '{engine}' would begin in about {predicted_s:.1f} s, after the deadline"
            f" of {deadline_s:g} s. Try again later, or allow more time."
        )


class ShuttingDown(AdmissionError):
    """The daemon is going down."""

    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("SwapServe is shutting down.")


class CapacityError(SwapServeError):
    """An engine does not fit on its device, or everything there is pinned."""

    code = "capacity"

    def __init__(self, engine: str, device: str, needed_bytes: int, available_bytes: int) -> None:
        self.engine = engine
        self.device = device
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        super().__init__(
            f"'{engine}' needs {needed_bytes} bytes on device '{device}', of which at most"
            f" {available_bytes} can be freed. Raise the device's budget, unpin an engine,"
            " or lower the engine's memory."
        )


class EngineError(SwapServeError):
    """An engine failed."""

    code = "engine_error"
    retryable = True

    def __init__(self, engine: str, message: str) -> None:
        self.engine = engine
        super().__init__(message)


class StartFailed(EngineError):
    """A cold start that did not become healthy; `log_tail` is the engine's own last words."""

    code = "engine_start_failed"

    def __init__(self, engine: str, reason: str, log_tail: str = "") -> None:
        self.reason = reason
        self.log_tail = log_tail
        tail = f"\nLast lines of its log:\n{log_tail}" if log_tail else ""
        super().__init__(engine, f"'{engine}' could not be started: {reason}.{tail}")


class EngineCrashed(EngineError):
    """An engine's process ended on its own."""

    code = "engine_crashed"

    def __init__(self, engine: str, status: str, log_tail: str = "") -> None:
        self.status = status
        self.log_tail = log_tail
        super().__init__(engine, f"'{engine}' ended unexpectedly ({status}).")


class EngineUnavailable(EngineError):
    """The engine cannot serve now: stopped by an operator, failed and in backoff, or leaving."""

    code = "engine_unavailable"

    def __init__(self, engine: str, message: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(engine, message)


class UpstreamError(EngineError):
    """The engine closed the connection or sent something that is not HTTP."""

    code = "upstream_error"


class SwapError(SwapServeError):
    """A swap step failed. `phase` names the step, `log_tail` the tool's own last words."""

    code = "swap_failed"
    retryable = True

    def __init__(self, engine: str, phase: str, message: str, log_tail: str = "") -> None:
        self.engine = engine
        self.phase = phase
        self.message = message
        self.log_tail = log_tail
        tail = f"\n{log_tail}" if log_tail else ""
        super().__init__(f"{phase} of '{engine}' failed: {message}{tail}")


class CriuError(SwapError):
    """CRIU refused or failed; `log_tail` is from its own log.

    `killed`: it could not undo its work, so connections of the engine may be broken.
    """

    code = "criu_failed"

    def __init__(
        self, engine: str, phase: str, message: str, log_tail: str = "", *, killed: bool = False
    ) -> None:
        self.killed = killed
        super().__init__(engine, phase, message, log_tail)


class CudaError(SwapError):
    """GPU state could not be moved.

    `lost`: the engine's process had to be ended; else it is as it was before the attempt.
    """

    code = "cuda_failed"

    def __init__(
        self, engine: str, phase: str, message: str, log_tail: str = "", *, lost: bool
    ) -> None:
        self.lost = lost
        super().__init__(engine, phase, message, log_tail)


class DeviceBusy(SwapError):
    """A GPU has less free memory than a restore needs, so it was not tried; nothing changed.

    `free_bytes` and `needed_bytes` are of the GPU `uuid`, the margin counted in.
    """

    code = "device_busy"

    def __init__(self, engine: str, uuid: str, needed_bytes: int, free_bytes: int) -> None:
        self.uuid = uuid
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        super().__init__(
            engine,
            "admission",
            f"it needs {needed_bytes} bytes of GPU {uuid} (keeper.gpu_margin included), of which"
            f" NVML sees {free_bytes} free. Something that SwapServe does not manage may use it:"
            " see `nvidia-smi`",
        )


class QuiesceFailed(SwapError):
    """An engine's own sleep or wake-up failed.

    `left_awake`: True if it serves as before, False if it rests and must be woken before it can
    serve, None if that cannot be told. `unsupported`: it has no such call, so that a second
    attempt is as useless.
    """

    code = "quiesce_failed"

    def __init__(
        self,
        engine: str,
        phase: str,
        message: str,
        *,
        left_awake: bool | None,
        unsupported: bool = False,
    ) -> None:
        self.left_awake = left_awake
        self.unsupported = unsupported
        super().__init__(engine, phase, message)


class ImageError(SwapError):
    """A checkpoint image is missing, stale, damaged or does not fit the disk budget."""

    code = "image_error"


class CanaryFailed(SwapError):
    """A restored engine answered its canary prompt differently than before the image."""

    code = "canary_failed"


class KeeperError(SwapServeError):
    """The keeper refused a verb or cannot be reached."""

    code = "keeper_error"
    retryable = True


class KeeperUnavailable(KeeperError, ConnectionError):
    """The keeper's socket is gone or does not answer."""

    code = "keeper_unavailable"


class CommandError(SwapServeError):
    """A tool exited with an error."""

    code = "command_failed"

    def __init__(self, argv: Sequence[str], status: int, output_tail: str, seconds: float) -> None:
        self.argv = tuple(argv)
        self.status = status
        self.output_tail = output_tail
        self.seconds = seconds
        super().__init__(f"{' '.join(argv)} exited with {status}: {output_tail}")


class CommandTimeout(CommandError, TimeoutError):
    """A tool did not end in time and was killed."""

    code = "command_timeout"


class DownloadError(SwapServeError):
    """A model could not be fetched from its hub; what was fetched is kept for the next attempt."""

    code = "download_failed"
    retryable = True

    def __init__(self, repo: str, reason: str) -> None:
        self.repo = repo
        self.reason = reason
        super().__init__(f"'{repo}' could not be downloaded: {reason}")


class IllegalTransition(SwapServeError):
    """A state change that the table does not allow: a bug of ours, never swallowed."""

    code = "illegal_transition"

    def __init__(self, engine: str, old: str, new: str, cause: str) -> None:
        self.engine = engine
        self.old = old
        self.new = new
        self.cause = cause
        super().__init__(f"'{engine}' cannot go from {old} to {new} ({cause})")


class Unauthenticated(SwapServeError, PermissionError):
    """A key is missing or wrong."""

    code = "invalid_api_key"


class Forbidden(SwapServeError, PermissionError):
    """The caller is known well enough to be told no."""

    code = "forbidden"

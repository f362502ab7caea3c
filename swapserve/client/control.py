"""The admin API from Python, without an event loop (the command line and scripts use it)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx

from swapserve.errors import SwapServeError
from swapserve.status import EngineStatus, Status

Action = Literal["swap-in", "swap-out", "start", "stop", "pin", "unpin"]

DEFAULT_URL = "http://127.0.0.1:8080"
CONNECT_S = 5.0
SILENCE_S = 45.0
"""An event stream that says nothing for so long, not even a heartbeat, is taken for dead."""


class DaemonUnreachable(SwapServeError, ConnectionError):
    """Nobody answers at the daemon's address, or not in time."""

    code = "daemon_unreachable"
    retryable = True

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(
            f"No SwapServe daemon answers at {url} ({reason}). Start one with 'swapserve"
            " --config FILE serve', or name its address with --url or SWAPSERVE_URL."
        )


class Refused(SwapServeError):
    """The daemon answered with an error; `code` is the daemon's own."""

    def __init__(self, http_status: int, code: str, message: str) -> None:
        self.http_status = http_status
        self.code = code
        super().__init__(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One event of the daemon: its kind and its fields (see `swapserve.events`)."""

    kind: str
    at: float
    data: dict[str, Any]


class ControlClient:
    """Talk to one daemon; use as a context manager or call `close`.

    Every method raises `DaemonUnreachable` or `Refused`.
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, key: str | None = None, timeout_s: float = 900.0
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx.Client(
            base_url=f"{self.base_url}/admin/v1",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            trust_env=False,  # a proxy of the environment is not meant for our own daemon
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def status(self) -> Status:
        """Return everything as it is now."""
        with self._understood():
            return Status.from_json(self._call("GET", "/status").json())

    def engine(self, name: str) -> EngineStatus:
        """Return one engine as it is now."""
        with self._understood():
            return EngineStatus.from_json(self._call("GET", _path(name)).json())

    def command(self, action: Action, name: str, *, wait: bool = True) -> EngineStatus:
        """Give an engine a command; returns when it is done, or handed in without `wait`."""
        params = {"wait": "true" if wait else "false"}
        with self._understood():
            answer = self._call("POST", f"{_path(name)}/{action}", params=params)
            return EngineStatus.from_json(answer.json())

    def logs(self, name: str, lines: int = 100) -> str:
        """Return the last lines of an engine's own log."""
        return self._call("GET", f"{_path(name)}/logs", params={"lines": str(lines)}).text

    def shutdown(self) -> None:
        """Ask the daemon to end; returns before it has."""
        self._call("POST", "/shutdown")

    def events(self, since: float | None = None, *, follow: bool = True) -> Iterator[Received]:
        """Yield events, oldest first.

        Args:
            since: seconds since the epoch; kept events after that time come first.
            follow: go on with new ones until the daemon goes down.
        """
        params = {"follow": "true" if follow else "false"}
        if since is not None:
            params["since"] = repr(since)
        timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        with (
            self._reached(),
            self._http.stream("GET", "/events", params=params, timeout=timeout) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                answer.read()
                raise _refusal(answer)
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    data = json.loads(line.removeprefix("data:"))
                    yield Received(kind=data["event"], at=data["at"], data=data)

    def _call(self, method: str, path: str, params: dict[str, str] | None = None) -> httpx.Response:
        with self._reached():
            answer = self._http.request(method, path, params=params)
        if not answer.is_success:
            raise _refusal(answer)
        return answer

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise DaemonUnreachable(self.base_url, "no answer in time") from error
        except httpx.InvalidURL as error:
            raise DaemonUnreachable(self.base_url, f"bad address: {error}") from error
        except httpx.TransportError as error:
            raise DaemonUnreachable(self.base_url, str(error)) from error

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            reason = f"what answers there is no SwapServe daemon of this version: {error!r}"
            raise DaemonUnreachable(self.base_url, reason) from error


def _path(name: str) -> str:
    return f"/engines/{quote(name, safe='')}"


def _refusal(answer: httpx.Response) -> Refused:
    """Build the error from the daemon's error object, or from whatever else came."""
    try:
        error = answer.json()["error"]
        return Refused(answer.status_code, str(error["code"]), str(error["message"]))
    except (KeyError, TypeError, ValueError):
        message = f"{answer.request.url} answered {answer.status_code}: {answer.text[:200]}"
        return Refused(answer.status_code, "unexpected_answer", message)

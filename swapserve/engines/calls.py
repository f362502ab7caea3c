"""One call of an engine's admin endpoints, and what it means when it fails."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import httpx

CONNECT_TIMEOUT_S = 2.0
_REASON_CHARS = 300
_CLOSE = {"Connection": "close"}
NO_SUCH_CALL = 404

T = TypeVar("T")


class CallFailed(Exception):
    """The engine said no, said something else than it should, or said nothing.

    `status` is its HTTP status; None if it did not answer, so that nobody knows what it did.
    """

    def __init__(self, path: str, reason: str, status: int | None) -> None:
        self.path = path
        self.reason = reason
        self.status = status
        super().__init__(f"{path}: {reason}")


class Calls:
    """Calls to engines, each over a connection of its own (see `base`).

    Cancellation: the engine may carry out the call all the same.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def get(self, address: str, path: str, *, timeout_s: float) -> httpx.Response:
        """Read something.

        Raises:
            CallFailed: no answer, or none with a status of success.
        """
        return await self._call("GET", address, path, timeout_s=timeout_s)

    async def post(
        self,
        address: str,
        path: str,
        *,
        timeout_s: float,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> httpx.Response:
        """Make the engine do something; `params` go into the query, `body` is sent as JSON.

        Raises:
            CallFailed: no answer, or none with a status of success.
        """
        return await self._call(
            "POST", address, path, timeout_s=timeout_s, params=params, body=body
        )

    async def _call(
        self,
        method: Literal["GET", "POST"],
        address: str,
        path: str,
        *,
        timeout_s: float,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._client.request(
                    method,
                    f"http://{address}{path}",
                    params=params,
                    json=body,
                    timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
                    headers=_CLOSE,
                )
        except TimeoutError as error:
            raise CallFailed(path, f"no answer within {timeout_s:g} s", None) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise CallFailed(path, f"no answer ({reason})", None) from error
        if not answer.is_success:
            reason = f"status {answer.status_code}: {answer.text[:_REASON_CHARS]}"
            raise CallFailed(path, reason, answer.status_code)
        return answer


def field(answer: httpx.Response, name: str, kind: type[T]) -> T:
    """Return one field of a JSON answer.

    Raises:
        CallFailed: it is not JSON, or has no such field of that type.
    """
    path = answer.request.url.path
    try:
        value = answer.json()[name]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"it answered without '{name}': {answer.text[:_REASON_CHARS]}"
        raise CallFailed(path, reason, answer.status_code) from error
    if not isinstance(value, kind):
        raise CallFailed(path, f"it answered {name}={value!r}", answer.status_code)
    return value

"""API keys of clients."""

import hashlib
import hmac
from collections.abc import Sequence

from aiohttp import web

from swapserve.errors import Unauthenticated


class Keys:
    """The keys that open the OpenAI endpoints; none: they are open."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, request: web.Request) -> int | None:
        """Let the request pass; return which of the keys it has, None if none is asked for.

        Raises:
            Unauthenticated: a key is needed, and the request has none that is known.
        """
        if not self._digests:
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = [_digest(token.strip())] if scheme.lower() == "bearer" else []
        given.append(_digest(request.headers.get("x-api-key", "")))
        # Every pair is compared, so the time taken does not tell which key was close.
        found = [
            index
            for one in given
            for index, key in enumerate(self._digests)
            if hmac.compare_digest(one, key)
        ]
        if not found:
            raise Unauthenticated(
                "A valid API key is needed: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
                " with one of server.api_keys."
            )
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

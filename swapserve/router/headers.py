"""Which headers cross the proxy, in each direction."""

from collections.abc import Mapping

from multidict import CIMultiDict, MultiMapping

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Belong to one connection. Source: RFC 9110, section 7.6.1."""

NOT_TO_ENGINES = HOP_BY_HOP | {
    "accept-encoding",
    "authorization",
    "content-length",
    "cookie",
    "expect",
    "host",
    "x-api-key",
    "x-swapserve-deadline",
    "x-swapserve-priority",
}
"""Besides: the client's secrets and wishes are ours, and its body may have been changed."""

NOT_TO_CLIENTS = HOP_BY_HOP | {"date", "server", "set-cookie"}


def to_engine(headers: MultiMapping[str], extra: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers of a client's request that its engine sees, and ours."""
    kept = _crossing(headers, NOT_TO_ENGINES)
    kept.setdefault("Content-Type", "application/json")
    # A stream that was opened early with our own headers cannot be compressed afterwards.
    kept["Accept-Encoding"] = "identity"
    kept.update(extra)
    return kept


def to_client(headers: MultiMapping[str]) -> CIMultiDict[str]:
    """Return the headers of an engine's answer that the client sees."""
    return _crossing(headers, NOT_TO_CLIENTS)


def _crossing(headers: MultiMapping[str], dropped: frozenset[str]) -> CIMultiDict[str]:
    named = ",".join(headers.getall("Connection", []))
    dropped = dropped | {token.strip().lower() for token in named.split(",")}
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in dropped
    )

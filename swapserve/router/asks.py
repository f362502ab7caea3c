"""What a request asks of its engine: how urgent it is, by when, how long.

A priority comes from the header, else from the body's `service_tier`, else from the API key. A key
says the most that its requests may ask for. A header that asks for more is refused: whoever wrote
it would never learn that it has no effect. A service tier is what clients send without having been
told to, so one that is too high counts as the key's own.
"""

import re
from collections.abc import Mapping

from swapserve.config.schema import ApiKey
from swapserve.errors import Forbidden, InvalidRequest
from swapserve.messages import Ask
from swapserve.router.body import RequestBody
from swapserve.states import Priority

PRIORITY_HEADER = "x-swapserve-priority"
DEADLINE_HEADER = "x-swapserve-deadline"
_PRIORITIES = {one.name.lower(): one for one in Priority}
_TIERS: Mapping[object, Priority] = {"priority": Priority.URGENT, "flex": Priority.BATCH}
"""Those of OpenAI's tiers that say something about urgency."""
_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}")


def ask_of(
    headers: Mapping[str, str], body: RequestBody, *, key: ApiKey | None, deadline_s: float | None
) -> Ask:
    """Return what a request asks.

    Args:
        headers: the request's, by names in any case.
        body: the request's.
        key: the API key that it came with; None: no key is asked for, and every priority is free.
        deadline_s: the model's own deadline, for a request that brings none.

    Raises:
        InvalidRequest: a header is not understood.
        Forbidden: the key may not ask for that priority.
    """
    return Ask(
        priority=_priority(headers.get(PRIORITY_HEADER), body.service_tier, key),
        deadline_s=_deadline_s(headers.get(DEADLINE_HEADER), deadline_s),
        tokens_in=body.tokens_in,
        tokens_max=body.tokens_max,
        key="" if key is None else key.name,
        conversation=body.prefix,
        streams=body.stream,
    )


def _priority(header: str | None, tier: object, key: ApiKey | None) -> Priority:
    own = Priority.INTERACTIVE if key is None else _PRIORITIES[key.priority]
    if header is None:
        asked = _TIERS.get(tier, own) if isinstance(tier, str) else own
        return asked if key is None else max(asked, own)
    named = _PRIORITIES.get(header.strip().lower())
    if named is None:
        raise InvalidRequest(
            f"The header {PRIORITY_HEADER} is '{header[:64]}'; it must be one of"
            f" {', '.join(_PRIORITIES)}, or be left out.",
            param=PRIORITY_HEADER,
        )
    if key is not None and named < own:
        raise Forbidden(
            f"The API key '{key.name}' may ask for the priority '{key.priority}' at most, not for"
            f" '{named.name.lower()}'. Ask for less in the header {PRIORITY_HEADER}, leave it out,"
            " or have the key's priority raised in server.api_keys."
        )
    return named


def _deadline_s(header: str | None, default_s: float | None) -> float | None:
    if header is None:
        return default_s
    text = header.strip()
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    if seconds <= 0.0:
        raise InvalidRequest(
            f"The header {DEADLINE_HEADER} is '{header[:64]}'; it must be a number of seconds over"
            " 0, such as 2.5, in which the answer has to begin.",
            param=DEADLINE_HEADER,
        )
    return seconds

"""Read what matters in a JSON request body, and change single values without re-writing the rest.

The top level is walked member by member, so that the place of each value is known and a `model`
deeper down, in a string or behind an escape, is never taken for the real one.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from swapserve.errors import InvalidRequest
from swapserve.router.tokens import BYTES_PER_TOKEN

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
PREFIX_CHARS = 4096
LIMITS = ("max_completion_tokens", "max_tokens")
"""Fields that bound an answer's length; the first of them that is given counts."""
MEDIA_TOKENS = 1000.0
"""Rough number of tokens that an image or a sound becomes, whatever its size in bytes."""
LEAST_MEDIA = 1024
"""Shortest text that may be one of these."""
MOST_TOKENS = 1 << 31
FIELDS = frozenset({"model", "stream", "temperature", "seed", "service_tier", *LIMITS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One top-level value and where its text lies, in characters."""

    value: object
    start: int
    end: int


class RequestBody:
    """A JSON object as a client sent it, with the fields the front door looks at.

    Raises:
        InvalidRequest: it is not a JSON object in UTF-8, or one of those fields has a wrong type.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        try:
            text = raw.decode("utf-8")
            members = _walk(text)
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"The request body is not UTF-8 (byte {error.start}).") from error
        except ValueError as error:  # also of a number with thousands of digits
            raise InvalidRequest(f"The request body is not valid JSON: {error}.") from error
        except RecursionError as error:
            raise InvalidRequest("The request body is nested too deeply.") from error
        self.size = len(raw)
        # Only these are kept: a body may hold megabytes of images.
        self._members = [(key, found) for key, found in members if key in FIELDS]
        self.prefix = _prefix(members)
        """Hash of how the conversation or prompt begins; a chat's next turn has the same."""
        self.model = self._model()
        self.stream = self._stream()
        self.samples = self._samples()
        """Whether the answer depends on the engine's own random state."""
        self.tokens_in = _tokens(self.size, members)
        """Length of the prompt, estimated from the body's size."""
        self.tokens_max = self._tokens_max()
        """Longest answer that it allows, if it says so in a way that can be understood."""
        self.service_tier = self._last("service_tier")
        """As sent, whatever its type: the engine judges it."""

    def rewritten(self, *, model: str | None = None, seed: int | None = None) -> bytes:
        """Return the body with the given values put in place; all else stays byte for byte."""
        if model is None and seed is None:
            return self._raw
        text = self._raw.decode("utf-8")
        edits: list[tuple[int, int, str]] = []
        if model is not None:
            edits += [(m.start, m.end, json.dumps(model)) for m in self._all("model")]
        if seed is not None:
            nulls = self._all("seed")
            edits += [(m.start, m.end, str(seed)) for m in nulls]
            if not nulls:
                after_brace = text.index("{") + 1
                edits.append((after_brace, after_brace, f'"seed": {seed}, '))
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new + text[end:]
        return text.encode("utf-8")

    def _all(self, name: str) -> list[Member]:
        return [member for key, member in self._members if key == name]

    def _last(self, name: str) -> object:
        found = self._all(name)
        return found[-1].value if found else None

    def _model(self) -> str:
        model = self._last("model")
        if model is None:
            raise InvalidRequest("The field 'model' is missing.", param="model")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("The field 'model' must be a non-empty string.", param="model")
        return model

    def _stream(self) -> bool:
        stream = self._last("stream")
        if stream is not None and not isinstance(stream, bool):
            raise InvalidRequest("The field 'stream' must be true or false.", param="stream")
        return bool(stream)

    def _samples(self) -> bool:
        temperature, seed = self._last("temperature"), self._last("seed")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float | None):
            raise InvalidRequest("The field 'temperature' must be a number.", param="temperature")
        if isinstance(seed, bool) or not isinstance(seed, int | None):
            raise InvalidRequest("The field 'seed' must be an integer.", param="seed")
        return seed is None and (temperature is None or temperature > 0)

    def _tokens_max(self) -> int | None:
        for name in LIMITS:
            limit = self._last(name)
            if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
                return min(limit, MOST_TOKENS)
        return None


def _tokens(size: int, members: list[tuple[str, Member]]) -> float:
    """Return the estimated length of a prompt; media inside messages count by their number."""
    media = [
        len(text)
        for key, found in members
        if key == "messages" and isinstance(found.value, list)
        for message in found.value
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") != "text"
        for text in _texts(part)
        if len(text) >= LEAST_MEDIA
    ]
    return max(1.0, (size - sum(media)) / BYTES_PER_TOKEN + len(media) * MEDIA_TOKENS)


def _texts(part: dict[str, object]) -> Iterator[str]:
    """Yield the texts of a part of a message: `image_url: {url: ...}` and the like."""
    for value in part.values():
        inner = value.values() if isinstance(value, dict) else (value,)
        yield from (text for text in inner if isinstance(text, str))


def _prefix(members: list[tuple[str, Member]]) -> int:
    given = {key: found.value for key, found in members if key in {"messages", "prompt", "input"}}
    messages = given.pop("messages", None)
    opening: list[object] = list(given.values())
    for message in messages if isinstance(messages, list) else ():
        opening.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break  # what follows is new in each turn
    return zlib.crc32("".join(json.dumps(one)[:PREFIX_CHARS] for one in opening).encode())


def _walk(text: str) -> list[tuple[str, Member]]:
    """Return every top-level member in order, repeated keys included.

    Raises:
        InvalidRequest: valid so far, but not an object.
        json.JSONDecodeError: not JSON.
    """
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        _whole(text, at)
        raise InvalidRequest("The request body must be a JSON object.")
    members: list[tuple[str, Member]] = []
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        if members:
            at = _skip(text, _expect(text, at, ","))
        _expect(text, at, '"')
        key, at = _DECODER.raw_decode(text, at)
        start = _skip(text, _expect(text, _skip(text, at), ":"))
        value, end = _DECODER.raw_decode(text, start)
        members.append((key, Member(value=value, start=start, end=end)))
        at = _skip(text, end)
    if _skip(text, at + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)
    return members


def _whole(text: str, at: int) -> None:
    _, end = _DECODER.raw_decode(text, at)
    if _skip(text, end) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found is not None else at


def _expect(text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, at)
    return at + 1

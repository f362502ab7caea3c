"""How many tokens an answer has, from its bytes as they pass: counted, not parsed."""

import re

MARK = b"\ndata:"
"""Begins each event of a stream but the first, which the caller's tail makes one of them. A line
end inside an event's JSON is escaped, so that no text of a model looks like it."""
TAIL = len(MARK) - 1
"""Bytes of the answer so far that `saw` needs to find a mark across two chunks."""
BYTES_PER_TOKEN = 4.0
"""Rough size of a token in a JSON body, prompt or answer."""
ENDING = 16 << 10
"""Where the usage of an answer is looked for: servers write it last."""

_USAGE = re.compile(rb'"completion_tokens"\s*:\s*([0-9]{1,9})')
# Quotes inside a text are escaped, so that none of a model's words match.
_EMPTY = re.compile(rb'"delta"\s*:\s*\{\s*\}|"(?:content|text)"\s*:\s*(?:""|null)')
# The event that opens a chat with its role, and the one that ends it with a reason.
_MOST_EMPTY = 2
_DONE = b"data: [DONE]"


class TokenCount:
    """The tokens of one answer."""

    __slots__ = ("_before", "_bytes", "_events", "_first", "_last")

    def __init__(self) -> None:
        self._events = 0
        self._bytes = 0
        # Only referred to: nothing is copied while an answer passes.
        self._first = self._before = self._last = b""

    def saw(self, tail: bytes, chunk: bytes) -> None:
        """Take in a chunk; `tail` is the end of what came before it, at least `TAIL` bytes."""
        self._events += chunk.count(MARK) + (tail[-TAIL:] + chunk[:TAIL]).count(MARK)
        self._first = self._first or chunk
        self._before, self._last = self._last, chunk
        self._bytes += len(chunk)

    def total(self, *, stream: bool) -> float:
        """Return the tokens of a whole answer: those that its usage states, else an estimate.

        A stream without usage has one token in each event with content, an answer that is no
        stream so many as its size says.
        """
        ending = (self._before + self._last)[-ENDING:]
        if stated := _USAGE.findall(ending):
            return float(stated[-1])
        if not stream:
            return self._bytes / BYTES_PER_TOKEN
        opening = b"" if self._first is self._before or self._first is self._last else self._first
        empty = len(_EMPTY.findall(opening[:ENDING])) + len(_EMPTY.findall(ending))
        return float(max(0, self._events - min(empty, _MOST_EMPTY) - (_DONE in ending)))

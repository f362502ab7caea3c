"""Logging."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from swapserve import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("swapserve")
    before = (list(root.handlers), root.level, ours.level)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_text_is_one_line_with_time_level_and_logger() -> None:
    stream = io.StringIO()
    log.setup("text", "info", stream)
    logging.getLogger("swapserve.swap.plan").info("%s done", "dump")
    logging.getLogger("swapserve.swap.plan").debug("hidden")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.endswith("info    swap.plan: dump done\n")


def test_json_holds_extra_fields_and_the_exception() -> None:
    stream = io.StringIO()
    log.setup("json", "debug", stream)
    try:
        int("why")
    except ValueError:
        logging.getLogger("swapserve.x").exception("bad", extra={"engine": "a"})
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert {"level": "error", "logger": "swapserve.x", "message": "bad", "engine": "a"}.items() <= (
        found.items()
    )
    assert "ValueError: invalid literal" in found["exception"]


def test_a_second_setup_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.setup("text", "info", first)
    log.setup("json", "info", second)
    logging.getLogger("swapserve").warning("once")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_other_libraries_are_heard_only_when_they_warn() -> None:
    stream = io.StringIO()
    log.setup("text", "debug", stream)
    logging.getLogger("aiohttp").info("chatter")
    logging.getLogger("aiohttp").warning("trouble")
    assert "chatter" not in stream.getvalue()
    assert "trouble" in stream.getvalue()

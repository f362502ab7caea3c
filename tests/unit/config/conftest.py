"""A place to write configuration files, away from the machine's own engines."""

from collections.abc import Callable
from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.schema import Config
from swapserve.errors import ConfigError, ConfigProblem

Write = Callable[[str], Path]
Load = Callable[[str], Config]
Fail = Callable[[str], list[ConfigProblem]]


@pytest.fixture(autouse=True)
def _no_private_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPSERVE_PREFIX", str(tmp_path / "prefix"))
    monkeypatch.setenv("SWAPSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes the file; `TMP` in it becomes the directory."""

    def write(text: str) -> Path:
        path = tmp_path / "swapserve.yaml"
        path.write_text(text.replace("TMP", str(tmp_path)))
        return path

    return write


@pytest.fixture
def load_text(write: Write) -> Load:
    return lambda text: load(write(text))


@pytest.fixture
def fail(write: Write) -> Fail:
    """Return a function that loads a wrong file and gives its problems."""

    def fail(text: str) -> list[ConfigProblem]:
        with pytest.raises(ConfigError) as raised:
            load(write(text))
        return list(raised.value.problems)

    return fail


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Return an executable file named `engine`."""
    path = tmp_path / "engine"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path

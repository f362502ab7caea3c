"""Which program is taken."""

from pathlib import Path

import pytest

from swapserve.system.tools import criu_version, find_criu, find_tool, prefix_dirs


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("SWAPSERVE_PREFIX", str(tmp_path / "prefix"))
    monkeypatch.setattr("swapserve.system.tools._DEFAULT_PREFIX", tmp_path / "default")
    return tmp_path


def test_path_comes_before_the_prefix_and_the_default_prefix_last(places: Path) -> None:
    assert find_tool("criu") is None
    default = program(places / "default/bin/criu")
    assert find_criu() == default
    chosen = program(places / "prefix/bin/criu")
    assert find_criu() == chosen
    first = program(places / "path/criu")
    assert find_criu() == first
    assert prefix_dirs() == (places / "prefix", places / "default")


def test_a_configured_program_is_taken_or_none(places: Path) -> None:
    program(places / "path/criu")
    assert find_criu(places / "absent") is None
    own = program(places / "own/criu")
    assert find_criu(own) == own
    own.chmod(0o644)
    assert find_criu(own) is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version: 4.2.1\nGitID: v4.2.1", (4, 2, 1)),
        ("Warn: x\nVersion: 4.0", (4, 0)),
        ("usage: criu", None),
    ],
)
def test_the_version_is_read_from_what_criu_says(text: str, version: tuple[int, ...]) -> None:
    assert criu_version(text) == version

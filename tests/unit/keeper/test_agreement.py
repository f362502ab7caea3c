"""A running keeper and a new configuration."""

from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.keeper.agreement import digest

CONFIG = """
server: {port: 8080}
devices: {ram: {memory: 1GiB}}
models:
  - name: a
    recipe: generic
    params: {binary: /bin/sh}
    args: [-c, "true"]
"""


def digest_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return digest(load(path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("port: 8080", "port: 8081"),
        ("memory: 1GiB", "memory: 2GiB"),
        ("- name", "- ttl: 5s\n    name"),
    ],
)
def test_what_only_the_daemon_looks_at_may_change(tmp_path: Path, old: str, new: str) -> None:
    assert digest_of(tmp_path, CONFIG.replace(old, new)) == digest_of(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/bin/sh", "/bin/cat"),
        ('"true"', '"false"'),
        ("name: a", "name: b"),
        ("server:", "keeper: {huge_pages: true}\nserver:"),
        ("    args:", "    env: {A: b}\n    args:"),
    ],
)
def test_another_command_line_or_keeper_is_another_configuration(
    tmp_path: Path, old: str, new: str
) -> None:
    assert digest_of(tmp_path, CONFIG.replace(old, new)) != digest_of(tmp_path, CONFIG)

"""Keys of clients, with names and priorities."""

from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.schema import ApiKey
from tests.unit.config.conftest import Fail, Load, Write


def test_a_key_may_say_whose_it_is_and_how_urgent(
    load_text: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "from-env")
    (tmp_path / "key").write_text("from-file\n")
    config = load_text(
        """
server:
  api_keys:
    - plain
    - {key: '${env:MY_KEY}', name: chat, priority: urgent}
    - {file: key}
    - {key: {file: key}, priority: batch}
"""
    )
    assert config.server.api_keys == (
        ApiKey(secret="plain", name="key-1"),
        ApiKey(secret="from-env", name="chat", priority="urgent"),
        ApiKey(secret="from-file", name="key-3"),
        ApiKey(secret="from-file", name="key-4", priority="batch"),
    )
    assert config.server.api_keys[0].priority == "interactive"


@pytest.mark.parametrize(
    ("entry", "key", "found", "expected"),
    [
        ("{key: a, priority: high}", "[0].priority", "'high'", "urgent, interactive, batch"),
        ("{key: a, priority: urgnet}", "[0].priority", "'urgnet'", "'urgent'"),
        ("{key: a, prioritty: batch}", "[0].prioritty", "an unknown key", "'priority'"),
        ("{key: a, name: 'two words'}", "[0].name", "'two words'", "matches"),
        ("{key: a, name: ''}", "[0].name", "''", "matches"),
        ("{name: a}", "[0].key", "nothing", "${env:NAME}"),
        ("{key: ''}", "[0].key", "an empty text", "a key"),
        ("{key: [hush]}", "[0].key", "a list", "a key"),
        ("[hush]", "[0]", "a list", "a key"),
        ("{key: hush, name: b}, {key: hush, name: b}", "[1].name", "api_keys[0]", "its own"),
        ("{key: hush, name: key-2}, hush", "[1].name", "api_keys[0]", "its own"),
    ],
)
def test_a_wrong_entry_is_a_problem_that_shows_no_secret(
    fail: Fail, entry: str, key: str, found: str, expected: str
) -> None:
    (problem,) = fail(f"server: {{host: 0.0.0.0, api_keys: [{entry}]}}")
    assert problem.key == f"server.api_keys{key}"
    assert found in problem.found
    assert expected in problem.expected
    assert "hush" not in str(problem)


def test_every_wrong_entry_is_told_at_once_with_its_line(fail: Fail) -> None:
    problems = fail("server:\n  api_keys:\n    - ''\n    - good\n    - {key: 3, priority: x}\n")
    assert [(one.line, one.key) for one in problems] == [
        (3, "server.api_keys[0]"),
        (5, "server.api_keys[2].key"),
        (5, "server.api_keys[2].priority"),
    ]


def test_keys_that_are_no_list_are_a_problem(fail: Fail) -> None:
    (problem,) = fail("server: {api_keys: hush}")
    assert problem.key == "server.api_keys"
    assert "a list of keys" in problem.expected


def test_without_secrets_names_and_priorities_are_read_all_the_same(write: Write) -> None:
    path = write("server: {api_keys: [{key: '${env:NO_KEY}', name: a, priority: batch}]}")
    (key,) = load(path, secrets=False).server.api_keys
    assert (key.name, key.priority) == ("a", "batch")

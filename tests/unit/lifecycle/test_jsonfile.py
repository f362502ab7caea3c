"""Small files that may be lost."""

from pathlib import Path

import pytest

from swapserve.lifecycle.jsonfile import JsonFile


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    assert JsonFile(path, "x").read() is None
    JsonFile(path, "x").write({"a": [1, None]})
    assert JsonFile(path, "x").read() == {"a": [1, None]}
    assert [one.name for one in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff", b"[" * 200_000, b"9" * 5000])
def test_what_cannot_be_read_is_set_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert JsonFile(path, "thing").read() is None
    assert path.with_suffix(".unreadable").read_bytes() == content
    assert not path.exists()
    assert "event=thing_unreadable" in caplog.text


def test_a_file_that_cannot_be_written_is_told_and_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = JsonFile(tmp_path / "gone" / "file.json", "thing")
    file.write({})
    assert "event=thing_not_written" in caplog.text


def test_the_old_content_stays_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    file = JsonFile(path, "thing")
    file.write({"old": 1})
    path.with_suffix(".tmp").mkdir()
    file.write({"new": 1})
    assert file.read() == {"old": 1}

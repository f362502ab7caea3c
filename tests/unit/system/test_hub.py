"""Downloads against a small hub on the loopback, through the real library."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from swapserve.errors import DownloadError
from swapserve.system.hub import pull
from tests.support.hub_server import Hub, running_hub

REPO = "someone/small-model"
FILES = {
    "config.json": b"{}\n",
    "model.safetensors": bytes(range(256)) * 4096,
    "pytorch_model.bin": b"the same weights again",
    "sub/notes.txt": b"hello",
}


class Reported(NamedTuple):
    done_bytes: int
    total_bytes: int


class Progress:
    def __init__(self) -> None:
        self.reports: list[Reported] = []

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        self.reports.append(Reported(done_bytes, total_bytes))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub(REPO, FILES) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_pulled_model_has_every_file_but_weights_in_other_formats(
    hub: Hub, tmp_path: Path
) -> None:
    progress = Progress()
    dest = tmp_path / "models" / "small"
    assert pull(REPO, dest, progress=progress) == dest
    expected = {name: data for name, data in FILES.items() if name != "pytorch_model.bin"}
    assert content(dest) == expected
    assert [path.name for path in dest.parent.iterdir()] == ["small"]
    total = sum(map(len, expected.values()))
    assert progress.reports[-1] == Reported(total, total)


def test_only_files_that_match_are_pulled(hub: Hub, tmp_path: Path) -> None:
    pull(REPO, tmp_path / "m", progress=Progress(), include=["*.json", "sub/*"])
    assert content(tmp_path / "m").keys() == {"config.json", "sub/notes.txt"}


def test_a_second_pull_asks_for_nothing(hub: Hub, tmp_path: Path) -> None:
    pull(REPO, tmp_path / "m", progress=Progress(), include=["config.json"])
    asked = len(hub.ranges)
    pull(REPO, tmp_path / "m", progress=Progress(), include=["config.json"])
    assert len(hub.ranges) == asked


def test_a_broken_download_is_never_taken_for_a_model_and_goes_on_where_it_stopped(
    hub: Hub, tmp_path: Path
) -> None:
    weights = bytes(range(256)) * 4096 * 12
    hub.files = {"config.json": b"{}\n", "model.safetensors": weights}
    hub.breaks_off_at = 11 * 1024 * 1024
    dest = tmp_path / "m"
    with pytest.raises(DownloadError, match=REPO):
        pull(REPO, dest, progress=Progress(), include=["model.safetensors"])
    assert not dest.exists()
    hub.breaks_off_at, hub.is_refusing = None, False
    hub.ranges.clear()
    pull(REPO, dest, progress=Progress())
    assert content(dest) == hub.files
    assert ("config.json", None) in hub.ranges
    # The library hands on what it received in pieces of 10 MiB.
    assert ("model.safetensors", f"bytes={10 * 1024 * 1024}-") in hub.ranges
    assert len(hub.ranges) == 2


def test_what_was_fetched_of_another_commit_is_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    stale = tmp_path / ".m.partial" / "another-commit"
    stale.mkdir(parents=True)
    (stale / "config.json.partial").write_bytes(b"{")
    pull(REPO, tmp_path / "m", progress=Progress(), include=["config.json"])
    assert content(tmp_path / "m") == {"config.json": FILES["config.json"]}
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_file_name_that_leads_out_of_the_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"../../evil.json": b"{}"}
    with pytest.raises(DownloadError, match=r"evil\.json"):
        pull(REPO, tmp_path / "a" / "m", progress=Progress())
    assert not list(tmp_path.rglob("evil.json"))


def test_an_unknown_repository_is_named_in_the_error(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        pull("someone/else", tmp_path / "m", progress=Progress())
    assert caught.value.repo == "someone/else"
    assert not (tmp_path / "m").exists()


def test_a_hub_that_does_not_answer_gives_our_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match=REPO):
        pull(REPO, tmp_path / "m", progress=Progress())


def test_patterns_that_match_nothing_are_answered_with_what_there_is(
    hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(DownloadError, match=r"no file matches \*\.xyz; there is config\.json"):
        pull(REPO, tmp_path / "m", progress=Progress(), include=["*.xyz"])


def test_of_several_gguf_files_one_must_be_named(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"a-Q4.gguf": b"4", "a-Q8.gguf": b"8"}
    with pytest.raises(DownloadError, match=r"name the wanted files of a-Q4\.gguf, a-Q8\.gguf"):
        pull(REPO, tmp_path / "m", progress=Progress())
    pull(REPO, tmp_path / "m", progress=Progress(), include=["*Q8*"])
    assert content(tmp_path / "m") == {"a-Q8.gguf": b"8"}


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DownloadError, match="1000000 are free"):
        pull(REPO, tmp_path / "m", progress=Progress())
    assert hub.ranges == []


def test_two_downloads_into_one_place_do_not_mix(hub: Hub, tmp_path: Path) -> None:
    stage = tmp_path / ".m.partial"
    stage.mkdir()
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another download"):
            pull(REPO, tmp_path / "m", progress=Progress())
    finally:
        os.close(descriptor)
    pull(REPO, tmp_path / "m", progress=Progress())

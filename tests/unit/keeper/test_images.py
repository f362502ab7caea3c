"""The image store: never half there, within its budget, least recently used first."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from swapserve.errors import ImageError
from swapserve.keeper.images import MANIFEST, ImageStore, Manifest, identity

KIB = 1024


def manifest(engine: str, kind: str = "golden", **changes: object) -> Manifest:
    made = Manifest(
        version=1,
        engine=engine,
        kind="golden" if kind == "golden" else "live",
        fingerprint="f",
        files={},
        binds={},
        bytes=1,
        canary=None,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def store(tmp_path: Path, budget: int = 1 << 40) -> ImageStore:
    made = ImageStore(tmp_path / "images", budget_bytes=budget, min_free_bytes=0)
    made.open()
    return made


def make(images: ImageStore, engine: str, kind: str = "golden", size: int = 64 * KIB) -> None:
    made = manifest(engine, kind)
    staging = images.stage(engine, made.kind, engine=engine, need_bytes=size)
    (staging / "criu" / "pages.img").write_bytes(os.urandom(size))
    images.commit(staging, engine, made)


def test_an_image_is_there_only_when_it_is_complete(tmp_path: Path) -> None:
    images = store(tmp_path)
    staging = images.stage("a", "golden", engine="a", need_bytes=1)
    (staging / "criu" / "pages.img").write_bytes(b"half")
    assert images.manifest("a", "golden") is None
    images.commit(staging, "a", manifest("a"))
    assert images.manifest("a", "golden") == manifest("a")
    assert (tmp_path / "images").stat().st_mode & 0o777 == 0o700


def test_what_was_under_way_is_swept_at_the_next_start(tmp_path: Path) -> None:
    images = store(tmp_path)
    make(images, "a")
    images.stage("a", "live", engine="a", need_bytes=1)
    make(images, "b", "live")
    images.consume_live("b")
    again = store(tmp_path)
    assert again.manifest("a", "golden") is not None
    assert [path.name for path in (tmp_path / "images").glob("*/*")] == ["golden"]


def test_a_live_image_is_consumed_once(tmp_path: Path) -> None:
    images = store(tmp_path)
    make(images, "a", "live")
    used = images.consume_live("a")
    assert (used / "criu" / "pages.img").exists()
    with pytest.raises(FileNotFoundError):
        images.consume_live("a")
    images.drop(used)
    assert not used.exists()


def test_an_image_of_changed_files_is_not_valid(tmp_path: Path) -> None:
    images, model = store(tmp_path), tmp_path / "model.gguf"
    model.write_text("weights")
    staging = images.stage("a", "golden", engine="a", need_bytes=1)
    images.commit(staging, "a", manifest("a", files={str(model): identity(model)}))
    assert images.valid("a", "golden", "f") is not None
    assert images.valid("a", "golden", "another fingerprint") is None
    model.write_text("other weights")
    assert images.valid("a", "golden", "f") is None
    model.unlink()
    assert images.valid("a", "golden", "f") is None


@pytest.mark.parametrize("damage", ["{", '{"version": 1}', ""])
def test_a_damaged_manifest_is_no_image(tmp_path: Path, damage: str) -> None:
    images = store(tmp_path)
    make(images, "a")
    (images.path("a", "golden") / MANIFEST).write_text(damage)
    assert images.manifest("a", "golden") is None


def test_golden_images_of_others_make_room_the_least_recently_used_first(tmp_path: Path) -> None:
    images = store(tmp_path, budget=250 * KIB)
    for age, engine in enumerate(("old", "new")):
        make(images, engine)
        os.utime(images.path(engine, "golden") / MANIFEST, (1000 + age, 1000 + age))
    make(images, "c", "live", size=100 * KIB)
    assert images.manifest("old", "golden") is None
    assert images.manifest("new", "golden") is not None


def aged(images: ImageStore, *engines: str) -> None:
    """Make golden images of these, each used a little later than the one before."""
    for age, engine in enumerate(engines):
        make(images, engine)
        os.utime(images.path(engine, "golden") / MANIFEST, (1000 + age, 1000 + age))


def left(images: ImageStore, *engines: str) -> list[str]:
    """Return those of which there still is a golden image."""
    return [engine for engine in engines if images.manifest(engine, "golden") is not None]


def test_it_is_the_use_of_the_engine_that_counts_not_of_its_image(tmp_path: Path) -> None:
    """One that goes to host memory and back is asked for often, and restored never."""
    images = store(tmp_path, budget=250 * KIB)
    aged(images, "often", "rarely")
    images.used("often")
    images.used("never seen")
    make(images, "c", "live", size=100 * KIB)
    assert left(images, "often", "rarely") == ["often"]


def test_the_image_of_one_that_runs_goes_last(tmp_path: Path) -> None:
    images = store(tmp_path, budget=250 * KIB)
    images.serving = lambda: {"running"}
    aged(images, "running", "away")
    make(images, "c", "live", size=100 * KIB)
    assert left(images, "running", "away") == ["running"]
    make(images, "d", "live", size=100 * KIB)
    assert left(images, "running", "away") == [], "but before a live image finds no room"
    assert images.manifest("c", "live") is not None


def test_a_live_image_never_makes_room(tmp_path: Path) -> None:
    images = store(tmp_path, budget=200 * KIB)
    make(images, "a", "live", size=150 * KIB)
    with pytest.raises(ImageError, match=r"images\.budget"):
        make(images, "b", size=100 * KIB)
    assert images.manifest("a", "live") is not None


def test_passing_the_canary_is_noted_in_the_image(tmp_path: Path) -> None:
    images = store(tmp_path)
    make(images, "a")
    found = images.manifest("a", "golden")
    assert found is not None
    assert not found.canary_passed
    images.mark_canary_passed("a", found)
    again = images.manifest("a", "golden")
    assert again is not None
    assert again.canary_passed

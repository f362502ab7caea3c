"""Checkpoint images on disk: staged, given a manifest, renamed into place; never half there.

IMAGE_DIR/<engine>/golden/{manifest.json, criu/*}    restorable any number of times
IMAGE_DIR/<engine>/live/...                          used once
IMAGE_DIR/<engine>/.staging-*, .old-*                under way; swept at the next start
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swapserve.errors import ImageError
from swapserve.keeper.protocol import ImageKind
from swapserve.keeper.sandbox import SandboxSpec

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an image is of, and what must be as it was for it to be restored.

    Attributes:
        fingerprint: hash of everything known before the start (command, environment, model
            files, versions).
        files: identity of every file the engine had mapped, by host path.
        binds: host path by CRIU key.
        bytes: size on disk when it was made.
        canary: what the engine answered to its canary prompt, as its adapter wrote it.
        canary_passed: whether a restored engine has given that answer since.
        device_bytes: what its GPU state, which is in the image, takes of each GPU.
        gpus: those GPUs, in the order of its configuration.
    """

    version: int
    engine: str
    kind: ImageKind
    fingerprint: str
    files: dict[str, str]
    binds: dict[str, str]
    bytes: int
    canary: dict[str, Any] | None
    canary_passed: bool = False
    device_bytes: dict[str, int] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()


def identity(path: Path) -> str:
    """Return inode, size, mtime and ctime of a file as one word; `gone` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return "gone"
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def fingerprint(
    spec: SandboxSpec, *, recipe: str, files: Iterable[Path], versions: Mapping[str, str]
) -> str:
    """Return the hash that decides whether a golden image still is of this engine.

    Addresses and the names of namespaces and groups are left out: they persist per engine and do
    not change what it computes.
    """
    content = {
        "argv": spec.argv,
        "env": sorted(spec.env.items()),
        "recipe": recipe,
        "binds": [asdict(bind) for bind in spec.binds],
        "files": sorted((str(path), identity(path)) for path in files),
        "versions": {**versions, "kernel": platform.release(), "cpu": _cpu_flags()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cpu_flags() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()


def size_of(directory: Path) -> int:
    """Return the bytes that a directory's files take on disk."""
    if not directory.is_dir():
        return 0
    return sum(file.lstat().st_blocks * 512 for file in directory.rglob("*"))


class ImageStore:
    """All images below one directory, within one budget. Methods block; call them in a thread."""

    def __init__(self, directory: Path, *, budget_bytes: int, min_free_bytes: int) -> None:
        self._dir = directory
        self._budget_bytes = budget_bytes
        self._min_free_bytes = min_free_bytes
        self.serving: Callable[[], Collection[str]] = tuple
        """Tells the engines that run now, by the names of their directories."""

    def open(self) -> None:
        """Create the directory, private to its owner, and sweep what was under way."""
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._dir.chmod(0o700)
        for left in self._dir.glob("*/.*"):
            shutil.rmtree(left, ignore_errors=True)

    def path(self, slug: str, kind: ImageKind) -> Path:
        """Return where an image is or would be."""
        return self._dir / slug / kind

    def manifest(self, slug: str, kind: ImageKind) -> Manifest | None:
        """Return the manifest of a complete image, None if there is none that we can read."""
        try:
            data = json.loads((self.path(slug, kind) / MANIFEST).read_text())
            manifest = Manifest(**{**data, "gpus": tuple(data.get("gpus", ()))})
        except (OSError, ValueError, TypeError):
            return None
        return manifest if manifest.version == MANIFEST_VERSION else None

    def valid(self, slug: str, kind: ImageKind, wanted: str) -> Manifest | None:
        """Return the manifest if nothing the image depends on has changed."""
        manifest = self.manifest(slug, kind)
        if manifest is None or manifest.fingerprint != wanted:
            return None
        if any(identity(Path(path)) != was for path, was in manifest.files.items()):
            return None
        return manifest

    def stage(self, slug: str, kind: ImageKind, *, engine: str, need_bytes: int) -> Path:
        """Make an empty directory for CRIU to dump into, after making room.

        Raises:
            ImageError: no room within the budget or on the file system.
        """
        self._make_room(slug, kind, engine, need_bytes)
        staging = self._dir / slug / f".staging-{kind}"
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "criu").mkdir(mode=0o700, parents=True)
        return staging

    def commit(self, staging: Path, slug: str, manifest: Manifest) -> None:
        """Write the manifest and put the staged image in place of an older one."""
        self._write(staging / MANIFEST, manifest)
        final = self.path(slug, manifest.kind)
        old = final.with_name(f".old-{manifest.kind}")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        staging.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def mark_canary_passed(self, slug: str, manifest: Manifest) -> None:
        """Note in the golden image that a restore of it answered as it should."""
        passed = Manifest(**{**asdict(manifest), "canary_passed": True})
        self._write(self.path(slug, "golden") / MANIFEST, passed)

    def consume_live(self, slug: str) -> Path:
        """Take the live image out of its place for its one restore; `drop` it afterwards.

        Raises:
            FileNotFoundError: there is none.
        """
        used = self._dir / slug / ".old-consumed"
        shutil.rmtree(used, ignore_errors=True)
        self.path(slug, "live").rename(used)
        return used

    def used(self, slug: str) -> None:
        """Note that an engine was of use just now; harmless if it has no golden image."""
        try:
            os.utime(self.path(slug, "golden") / MANIFEST)
        except OSError:
            return

    def drop(self, path: Path) -> None:
        """Delete an image or what is staged of one: out of its place at once, then its bytes."""
        doomed = path.with_name(f".old-{path.name.lstrip('.')}-{os.getpid()}")
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def _write(self, path: Path, manifest: Manifest) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(asdict(manifest), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)

    def _make_room(self, slug: str, kind: ImageKind, engine: str, need_bytes: int) -> None:
        used = size_of(self._dir)
        free = shutil.disk_usage(self._dir).free - self._min_free_bytes
        lacking = max(used + need_bytes - self._budget_bytes, need_bytes - free)
        for golden in self._spare_goldens(slug):
            if lacking <= 0:
                return
            lacking -= size_of(golden)
            self.drop(golden)
        if lacking > 0:
            raise ImageError(
                engine,
                f"{kind} image",
                f"it needs about {need_bytes} bytes, {lacking} more than the budget"
                f" (images.budget {self._budget_bytes}, {used} used) or the disk ({free} free"
                f" beyond images.min_free) leaves. Raise images.budget or free disk space",
            )

    def _spare_goldens(self, slug: str) -> list[Path]:
        """Return the golden images of other engines, the least recently used engine's first.

        It is the use of the engine that counts: one that goes to host memory and back needs its
        image seldom, and still is the one that people ask for. A golden image only saves a cold
        start; a live one holds somebody's answer and stays.
        """
        serving = self.serving()
        others = [path for path in self._dir.glob("*/golden") if path.parent.name != slug]
        return sorted(others, key=lambda path: (path.parent.name in serving, _used_at(path)))


def _used_at(golden: Path) -> int:
    try:
        return (golden / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0  # dropped at this moment

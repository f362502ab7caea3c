"""Fetch models from the Hugging Face hub before an engine needs them.

An engine's sandbox has no way out to a network, so nothing can be fetched later. `HF_ENDPOINT`,
`HF_TOKEN` and the library's other settings hold. Needs the extra `hub`.
"""

import contextlib
import fcntl
import importlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

from swapserve.errors import DownloadError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from another thread, about twice a second."""

PROGRESS_INTERVAL_S = 0.5
RESERVE_BYTES = 64 * 1024 * 1024
"""Left free on the disk besides the model itself."""

DUPLICATES = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "original/*", "onnx/*", "*.gguf")
"""Other forms of the same weights; of no use where there are safetensors."""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size_bytes: int


def pull(
    repo: str,
    dest: Path,
    *,
    progress: Progress,
    include: Sequence[str] = (),
    revision: str | None = None,
) -> Path:
    """Download the model `repo` ("owner/name") into the folder `dest` and return it.

    Nothing has that name before every file is there with the right size. What a failed or
    interrupted download left behind is beside it, and the next one goes on from there.

    Args:
        repo: its name on the hub.
        dest: must not exist yet, unless a download into it was completed: then nothing is done.
        progress: told how far it is.
        include: file name patterns such as `*Q4_K_M.gguf`; default: everything but duplicates of
            the same weights in other formats. Needed where a repository has several GGUF files.
        revision: branch, tag or commit; default: the main branch as it is now.

    Raises:
        DownloadError: the extra is missing, the hub refuses or cannot be reached, nothing matches,
            the disk is too full, or another download into the same place runs.
    """
    if dest.is_dir():
        return dest
    hub = _library(repo)
    dest.parent.mkdir(parents=True, exist_ok=True)
    stage = dest.with_name(f".{dest.name}.partial")
    with _translated_errors(hub, repo):
        commit, files = _listing(hub, repo, revision, include)
    with _alone(repo, stage), _translated_errors(hub, repo):
        _check_space(repo, stage, files)
        with _reported(stage, sum(file.size_bytes for file in files), progress):
            for file in files:
                hub.hf_hub_download(
                    repo,
                    file.name,
                    revision=commit,
                    local_dir=stage,
                    endpoint=os.environ.get("HF_ENDPOINT"),
                )
        _check_sizes(repo, stage, files)
        shutil.rmtree(stage / ".cache", ignore_errors=True)
        stage.rename(dest)
    return dest


def _library(repo: str) -> ModuleType:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise DownloadError(
            repo, "the package huggingface-hub is missing (pip install 'swapserve[hub]')"
        ) from error
    hub.utils.disable_progress_bars()
    return hub


@contextlib.contextmanager
def _alone(repo: str, stage: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the kernel drops when the process ends in any way."""
    stage.mkdir(exist_ok=True)
    descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DownloadError(repo, f"another download into {stage} runs") from error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated_errors(hub: ModuleType, repo: str) -> Iterator[None]:
    """Turn what the library and the HTTP package beneath it raise into our own error."""
    foreign = [
        error
        for error in hub.errors.HfHubHTTPError.__mro__
        if error.__module__.partition(".")[0] not in ("builtins", "huggingface_hub")
    ]
    try:
        yield
    except (OSError, ValueError, *foreign) as error:
        raise DownloadError(repo, str(error).strip() or type(error).__name__) from error


def _listing(
    hub: ModuleType, repo: str, revision: str | None, include: Sequence[str]
) -> tuple[str, list[_File]]:
    """Return the commit and the wanted files; the commit, so that all are of the same one."""
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    info: Any = api.model_info(repo, revision=revision, files_metadata=True)
    files = [_File(entry.rfilename, entry.size or 0) for entry in info.siblings or ()]
    return info.sha, _wanted(repo, files, include)


def _wanted(repo: str, files: Sequence[_File], include: Sequence[str]) -> list[_File]:
    names = ", ".join(sorted(file.name for file in files)) or "nothing"
    if include:
        wanted = [file for file in files if any(fnmatch(file.name, p) for p in include)]
    elif any(file.name.endswith(".safetensors") for file in files):
        wanted = [file for file in files if not any(fnmatch(file.name, p) for p in DUPLICATES)]
    elif sum(file.name.endswith(".gguf") for file in files) > 1:
        raise DownloadError(repo, f"there are several models; name the wanted files of {names}")
    else:
        wanted = list(files)
    if not wanted:
        raise DownloadError(repo, f"no file matches {' '.join(include)}; there is {names}")
    return wanted


def _check_space(repo: str, stage: Path, files: Sequence[_File]) -> None:
    needed = sum(file.size_bytes for file in files) - _size(stage) + RESERVE_BYTES
    free = shutil.disk_usage(stage.parent).free
    if needed > free:
        raise DownloadError(
            repo, f"{needed} bytes are needed in {stage.parent}, of which {free} are free"
        )


def _check_sizes(repo: str, stage: Path, files: Sequence[_File]) -> None:
    for file in files:
        found = (stage / file.name).stat().st_size
        if file.size_bytes not in (0, found):
            raise DownloadError(repo, f"{file.name} has {found} bytes instead of {file.size_bytes}")


def _size(folder: Path) -> int:
    """Return the bytes of all files below, those being written included."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                total += path.stat().st_size
    return total


@contextlib.contextmanager
def _reported(stage: Path, total_bytes: int, progress: Progress) -> Iterator[None]:
    """Report the growth of the stage: the one measure that every version of the library has."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(PROGRESS_INTERVAL_S):
            progress(min(_size(stage), total_bytes), total_bytes)

    watcher = threading.Thread(target=watch, name="pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    progress(total_bytes, total_bytes)

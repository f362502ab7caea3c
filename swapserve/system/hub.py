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
from urllib.parse import urlsplit

from swapserve.errors import DownloadError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from another thread, about twice a second."""

PROGRESS_INTERVAL_S = 0.5
RESERVE_BYTES = 64 * 1024 * 1024
"""Left free on the disk besides the model itself."""

PARTIAL = ".partial"
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
    _require_library(repo)
    with _translated_errors(repo):
        commit, files = _listing(repo, revision, include)
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _alone(repo, dest.with_name(f".{dest.name}.partial")) as workplace:
            stage = _stage(workplace, commit)
            _check_space(repo, stage, files)
            with _reported(stage, sum(file.size_bytes for file in files), progress):
                for file in files:
                    _fetch(repo, commit, file, stage)
            stage.rename(dest)
            workplace.rmdir()
    return dest


def _library() -> ModuleType:
    return importlib.import_module("huggingface_hub")


def _require_library(repo: str) -> None:
    try:
        _library()
    except ImportError as error:
        raise DownloadError(
            repo, "the package huggingface-hub is missing (pip install 'swapserve[hub]')"
        ) from error
    importlib.import_module("huggingface_hub.utils").disable_progress_bars()


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


@contextlib.contextmanager
def _alone(repo: str, workplace: Path) -> Iterator[Path]:
    """Hold a lock on the folder, which the kernel drops when the process ends in any way."""
    workplace.mkdir(exist_ok=True)
    descriptor = os.open(workplace, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(repo, f"another download into {workplace} runs") from error
        yield workplace
    finally:
        os.close(descriptor)


def _stage(workplace: Path, commit: str) -> Path:
    """Return the folder for this commit's files, without what is left of other commits."""
    stage = workplace / commit
    for other in workplace.iterdir():
        if other != stage:
            shutil.rmtree(other)
    stage.mkdir(exist_ok=True)
    return stage


@contextlib.contextmanager
def _translated_errors(repo: str) -> Iterator[None]:
    """Turn what the library and the HTTP package beneath it raise into our own error."""
    foreign = [
        error
        for error in importlib.import_module("huggingface_hub.errors").HfHubHTTPError.__mro__
        if error.__module__.partition(".")[0] not in ("builtins", "huggingface_hub")
    ]
    try:
        yield
    except (OSError, ValueError, *foreign) as error:
        raise DownloadError(repo, str(error).strip() or type(error).__name__) from error


def _listing(repo: str, revision: str | None, include: Sequence[str]) -> tuple[str, list[_File]]:
    """Return the commit and the wanted files; the commit, so that all are of the same one."""
    api = _library().HfApi(endpoint=_endpoint())
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


def _fetch(repo: str, commit: str, file: _File, stage: Path) -> None:
    """Download one file, or the rest of it.

    One plain request for a file: the library's own downloads restart a file from its beginning.
    Source: huggingface_hub 2.4.0, file_download._download_to_tmp_and_move.
    """
    path = stage / file.name
    if not path.resolve().is_relative_to(stage.resolve()):
        raise DownloadError(repo, f"it has a file with the name {file.name!r}")
    if path.exists():
        return
    hub = _library()
    url = hub.hf_hub_url(repo, file.name, revision=commit, endpoint=_endpoint())
    headers = importlib.import_module("huggingface_hub.utils").build_hf_headers()
    metadata = hub.get_hf_file_metadata(url, headers=headers)
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        # The file is elsewhere, behind a signed address: the token is not for them.
        headers.pop("authorization", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("ab") as output:
        importlib.import_module("huggingface_hub.file_download").http_get(
            metadata.location,
            output,
            resume_size=output.tell(),
            headers=headers,
            expected_size=file.size_bytes,
        )
    partial.rename(path)


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

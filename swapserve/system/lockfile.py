"""Keep a second process of the same kind away from one directory."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file with our pid in it; the kernel lets go of it when we end in any way.

    Raises:
        OSError: another process holds it, or it cannot be made.
    """
    with path.open("a+") as lock:  # not "w": the pid in there may be the other one's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            pid = lock.read().strip() or "unknown"
            raise OSError(f"another {what} runs (pid {pid}): {path} is locked") from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield

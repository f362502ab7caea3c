"""Run a tool to its end: own session, output captured, always reaped, never a shell.

Output goes to unlinked temporary files instead of pipes, so a tool that leaves a child behind
(`criu restore -d`) is over when the tool itself is, and no amount of output can block it.
"""

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from select import POLLIN, poll
from typing import IO

from swapserve.errors import CommandError, CommandTimeout
from swapserve.system.process import ended

GRACE_S = 2.0
"""How long a tool may take to end after TERM before it gets KILL."""
TAIL_CHARS = 4000

running: set[int] = set()
"""Tools that this module waits for, so that nobody else collects their exit status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A tool that ended. `status` is its exit status, or the negative number of a signal."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def tail(self) -> str:
        """The last words of the tool: standard error if it said anything there."""
        return (self.stderr.strip() or self.stdout.strip())[-TAIL_CHARS:]


@dataclass(slots=True, kw_only=True)
class _Child:
    """A tool that runs. Its pid stays ours until `reap`, so signals cannot hit a stranger."""

    process: subprocess.Popen[bytes]
    pidfd: int
    stdout: IO[bytes]
    stderr: IO[bytes]
    started: float
    leads_group: bool = True
    reaped: bool = False

    def signal_group(self, number: signal.Signals) -> None:
        if not self.reaped:
            send = os.killpg if self.leads_group else os.kill
            try:
                send(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                # Gone, or it became another user: a set-uid tool ends at its own pace.
                return

    def reap(self) -> int | None:
        """Collect the ended process; None if another waiter of this process took its status."""
        if self.reaped:
            return self.process.returncode
        self.reaped = True
        try:
            end = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        except ChildProcessError:
            self.process.returncode = 0  # only keeps Popen from waiting for it
            return None
        assert end is not None
        exited = end.si_code == os.CLD_EXITED
        self.process.returncode = end.si_status if exited else -end.si_status
        return self.process.returncode


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    pass_fds: Sequence[int] = (),
    preexec: Callable[[], None] | None = None,
    check: bool = True,
) -> Completed:
    """Run a tool and return what it said.

    Args:
        argv: program and arguments; no shell sees them.
        timeout_s: after this time the tool's process group gets TERM, then KILL.
        cwd: its working directory.
        env: its whole environment (None: ours).
        stdin: bytes it reads (None: end of file at once).
        pass_fds: descriptors it inherits under their own numbers.
        preexec: called in the child before the tool is executed (namespaces, cgroups).
        check: whether an exit status other than 0 is an error.

    Raises:
        CommandError: it exited with an error, or could not be started (status 126 or 127).
        CommandTimeout: it did not end in time; it is dead and reaped.

    Cancellation:
        The tool's process group gets TERM, then KILL (at once if cancelled again), and is reaped
        before the cancellation goes on.
    """
    with _started(argv, cwd=cwd, env=env, stdin=stdin, pass_fds=pass_fds, preexec=preexec) as child:
        try:
            async with asyncio.timeout(timeout_s):
                await ended(child.pidfd)
        except TimeoutError:
            await _end(child)
            raise _timeout(argv, child) from None
        except BaseException:
            await _end(child)
            raise
        return _complete(argv, child, check=check)


def run_sync(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    own_session: bool = True,
    check: bool = True,
) -> Completed:
    """Run a tool from code without an event loop (doctor, CLI); otherwise like `run`.

    Without `own_session` it stays in our process group: what kills us in one go kills it too.
    """
    with _started(
        argv, cwd=cwd, env=env, stdin=stdin, pass_fds=(), preexec=None, own_session=own_session
    ) as child:
        try:
            in_time = _ended_within(child.pidfd, timeout_s)
        except BaseException:
            _end_sync(child)
            raise
        if not in_time:
            _end_sync(child)
            raise _timeout(argv, child)
        return _complete(argv, child, check=check)


@contextmanager
def _started(
    argv: Sequence[str],
    *,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    stdin: bytes | None,
    pass_fds: Sequence[int],
    preexec: Callable[[], None] | None,
    own_session: bool = True,
) -> Iterator[_Child]:
    with (
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        source.write(stdin or b"")
        source.seek(0)
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=source,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd,
                env=env,
                pass_fds=tuple(pass_fds),
                preexec_fn=preexec,  # noqa: PLW1509 - our processes run no threads while they fork
                start_new_session=own_session,
            )
        except OSError as error:
            status = 127 if isinstance(error, FileNotFoundError) else 126
            raise CommandError(argv, status, str(error), time.monotonic() - started) from error
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        running.add(process.pid)
        try:
            yield _Child(
                process=process,
                pidfd=pidfd,
                stdout=stdout,
                stderr=stderr,
                started=started,
                leads_group=own_session,
            )
        finally:
            running.discard(process.pid)
            os.close(pidfd)


def _ended_within(pidfd: int, seconds: float) -> bool:
    waiter = poll()
    waiter.register(pidfd, POLLIN)
    return bool(waiter.poll(seconds * 1000))


async def _end(child: _Child) -> None:
    """End the process group and reap the tool, whatever else happens to this task meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    child.signal_group(signal.SIGTERM)
    grace_s: float | None = GRACE_S
    over = False
    while not over:
        try:
            async with asyncio.timeout(grace_s):
                await ended(child.pidfd)
            over = True
        except TimeoutError:
            grace_s = None
        except asyncio.CancelledError as error:
            cancelled, grace_s = error, None
        # Also after its end: the tool's own children share its group.
        child.signal_group(signal.SIGKILL)
    child.reap()
    if cancelled is not None:
        raise cancelled


def _end_sync(child: _Child) -> None:
    child.signal_group(signal.SIGTERM)
    try:
        _ended_within(child.pidfd, GRACE_S)
    finally:
        child.signal_group(signal.SIGKILL)
        child.reap()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _complete(argv: Sequence[str], child: _Child, *, check: bool) -> Completed:
    status = child.reap()
    seconds = time.monotonic() - child.started
    if status is None:
        raise CommandError(argv, -1, "its exit status was taken by another waiter", seconds)
    done = Completed(
        argv=tuple(argv),
        status=status,
        stdout=_read(child.stdout),
        stderr=_read(child.stderr),
        seconds=seconds,
    )
    if check and status != 0:
        raise CommandError(argv, status, done.tail, seconds)
    return done


def _timeout(argv: Sequence[str], child: _Child) -> CommandTimeout:
    seconds = time.monotonic() - child.started
    output = (_read(child.stderr).strip() or _read(child.stdout).strip())[-TAIL_CHARS:]
    tail = f"no end after {seconds:.1f} s, so it was killed. {output}".rstrip()
    status = child.process.returncode
    return CommandTimeout(argv, -1 if status is None else status, tail, seconds)

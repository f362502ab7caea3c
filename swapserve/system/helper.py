"""A helper of ours: a child that answers over a socket and may be ended at any moment."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from select import POLLIN, poll
from typing import IO

from swapserve.system import command

TAIL_BYTES = 2000


@dataclass(slots=True, kw_only=True)
class Helper:
    """A child in a session of its own, until `reap`; what it prints goes to a file without a name.

    Attributes:
        pid: its process, and its process group.
        pidfd: readable once it has ended.
        channel: our end of the socket, which does not block; the child's own ends with ours.
    """

    pid: int
    pidfd: int
    channel: socket.socket
    _process: subprocess.Popen[bytes]
    _output: IO[bytes]
    _reaped: bool = False

    def alive(self) -> bool:
        """Whether it runs at this moment."""
        if self._reaped:
            return False
        waiter = poll()
        waiter.register(self.pidfd, POLLIN)
        return not waiter.poll(0)

    def kill(self) -> None:
        """Kill its whole process group; harmless when it is gone."""
        if not self._reaped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """Return the last of what it printed."""
        size = os.fstat(self._output.fileno()).st_size
        said = os.pread(self._output.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES))
        return said.decode(errors="replace").strip()

    def reap(self) -> str:
        """Collect it once it has ended, with what is left of its group; say how it ended."""
        self.kill()
        self._reaped = True
        command.running.discard(self.pid)
        status = self._process.wait()
        os.close(self.pidfd)
        self.channel.close()
        self._output.close()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit {status}"


def start_helper(argv: Sequence[str], *, env: Mapping[str, str]) -> Helper:
    """Start one; the number of its end of the socket is its last argument.

    Raises:
        OSError: it cannot be started.
    """
    ours, theirs = socket.socketpair()
    output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `reap`
    try:
        with theirs:
            process = subprocess.Popen(
                [*argv, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                env=env,
                cwd="/",
                start_new_session=True,
            )
        pidfd = os.pidfd_open(process.pid)
    except BaseException:
        ours.close()
        output.close()
        raise
    command.running.add(process.pid)
    ours.setblocking(False)
    return Helper(pid=process.pid, pidfd=pidfd, channel=ours, _process=process, _output=output)

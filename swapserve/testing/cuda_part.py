"""The part of the test engine that holds GPU memory: its ranks, asked together and in order."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from swapserve.testing.cuda_rank import SOCKET
from swapserve.testing.engine import CRASH_STATUS

PAUSE_POLL_S = 0.005
END_TIMEOUT_S = 2.0
"""For ranks whose front has gone away; one whose driver is locked may not notice."""
_LINE_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How much a rank holds, and when it initialises CUDA."""

    rank: int
    weights_mb: int
    cache_mb: int
    delay: float = 0.0
    trigger: Path | None = None

    def argv(self) -> list[str]:
        """Return its command line."""
        words = [sys.executable, "-m", "swapserve.testing.cuda_rank"]
        words += [f"--rank={self.rank}", f"--delay={self.delay}"]
        words += [f"--weights-mb={self.weights_mb}", f"--cache-mb={self.cache_mb}"]
        return words if self.trigger is None else [*words, f"--trigger={self.trigger}"]


class RankGone(Exception):
    """A rank has ended."""


class Link:
    """A rank's process and the socket to it."""

    def __init__(
        self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = pid
        self.has_answered = False
        """Whether it has initialised CUDA: it answers nothing before."""
        self._reader = reader
        self._writer = writer
        self._answers: asyncio.Queue[Any] = asyncio.Queue()

    @classmethod
    async def start(cls, options: RankOptions) -> "Link":
        """Start a rank: spawned, as CUDA does not survive a fork."""
        ours, theirs = socket.socketpair()
        with theirs:
            pid = _spawn(options.argv(), theirs)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LINE_LIMIT)
        return cls(pid, reader, writer)

    def send(self, message: dict[str, Any]) -> None:
        """Ask; the answers come in the order of the questions."""
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def answer(self) -> Any:  # noqa: ANN401
        """Return the next answer."""
        return await self._answers.get()

    async def listen(self) -> None:
        """Take answers as they come, until the process ends or its driver fails; then raise.

        Raises:
            RankGone: always.
        """
        while line := await self._read():
            self.has_answered = True
            answer = json.loads(line)
            if "error" in answer:
                raise RankGone(answer["error"])
            self._answers.put_nowait(answer["answer"])
        raise RankGone

    async def _read(self) -> bytes:
        try:
            return await self._reader.readline()
        except ConnectionError:
            return b""

    async def close(self) -> None:
        """Let it end, and reap it; kill it where it does not."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()
        deadline = time.monotonic() + END_TIMEOUT_S
        while not _has_ended(self.pid):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            await asyncio.sleep(PAUSE_POLL_S)


def _spawn(argv: list[str], link: socket.socket) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, link.fileno(), SOCKET)]
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; reaps it."""
    return os.waitpid(pid, os.WNOHANG) != (0, 0)


@dataclass(slots=True)
class _Question:
    message: dict[str, Any]
    answers: "asyncio.Future[list[Any]]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class VramPart:
    """Weights and cache on the devices of all ranks, and the sequences that are computed there.

    The engine ends when a rank does, as real ones do.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.paused = False
        """While true no token is computed; requests wait."""
        self._links = links
        self._questions: asyncio.Queue[_Question] = asyncio.Queue()
        self._free: list[int] = []
        self._sequences: set[int] = set()
        self._aborted: set[int] = set()

    @classmethod
    @asynccontextmanager
    async def started(cls, ranks: Sequence[RankOptions]) -> AsyncIterator["VramPart"]:
        """Start the ranks, wait until each holds its memory; end them with the block."""
        links = [await Link.start(options) for options in ranks]
        part = cls(links)
        try:
            async with asyncio.TaskGroup() as tasks:
                own = [tasks.create_task(part.watch(link)) for link in links]
                own.append(tasks.create_task(part._pump()))
                about = (await part.about())[0]
                part._free = list(range(about["slots"]))
                yield part
                for task in own:
                    task.cancel()
        finally:
            for link in links:
                await link.close()

    @property
    def running(self) -> int:
        """Sequences that it works on."""
        return len(self._sequences)

    async def about(self) -> list[dict[str, Any]]:
        """Return pid, device and slots of each rank; waits while the driver is locked."""
        return await self._ask(do="about")

    @property
    def pids(self) -> list[int]:
        """Return the ranks' pids, as the front sees them."""
        return [link.pid for link in self._links]

    async def sequence(self, prompt: str, seed: int | None, count: int) -> AsyncGenerator[bytes]:
        """Compute the states of a new sequence one by one, to the end or until it is aborted."""
        slot = self._free.pop(0)
        self._sequences.add(slot)
        try:
            await self._until_resumed()
            await self._ask(do="begin", slot=slot, prompt=prompt, seed=seed)
            for index in range(count):
                await self._until_resumed()
                if slot in self._aborted:
                    return
                states = await self._ask(do="step", slot=slot, index=index)
                yield bytes.fromhex("".join(sorted(set(states))))
        finally:
            self._sequences.discard(slot)
            self._aborted.discard(slot)
            self._free.append(slot)

    async def release(self, tags: Collection[str], *, keep: bool) -> None:
        """Give the memory of these tags back; with `keep`, its content stays in host memory."""
        await self._ask(do="release", tags=sorted(tags), keep=keep)

    async def reacquire(self, tags: Collection[str]) -> None:
        """Allocate it again: with its content if that was kept, else with nonsense."""
        await self._ask(do="reacquire", tags=sorted(tags))

    async def reload(self) -> None:
        """Load the weights into their memory."""
        await self._ask(do="load_weights")

    async def weights_are_whole(self) -> bool:
        """Whether each byte of the weights is as it should be, on each rank."""
        return all(await self._ask(do="weights_are_whole"))

    async def spin(self, seconds: float) -> None:
        """Keep the devices busy for so long."""
        await self._ask(do="spin", seconds=seconds)

    async def abort(self) -> None:
        """End all sequences after the token that they are at."""
        self._aborted |= self._sequences

    def crash(self, reason: str) -> NoReturn:
        """End the engine."""
        sys.stderr.write(f"{reason}\n")
        sys.stderr.flush()
        os._exit(CRASH_STATUS)

    async def watch(self, link: Link) -> None:
        """End the engine when a rank ends."""
        try:
            await link.listen()
        except RankGone as error:
            self.crash(f"rank {link.pid} has ended: {error}")

    async def _until_resumed(self) -> None:
        while self.paused:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_POLL_S)

    async def _ask(self, **message: Any) -> list[Any]:  # noqa: ANN401
        """Ask all ranks and return their answers; who asked may leave meanwhile."""
        question = _Question(message)
        self._questions.put_nowait(question)
        return await question.answers

    async def _pump(self) -> None:
        """Ask one thing after the other, so that no answer meets another question."""
        while True:
            question = await self._questions.get()
            for link in self._links:
                link.send(question.message)
            answers = [await link.answer() for link in self._links]
            if not question.answers.done():
                question.answers.set_result(answers)

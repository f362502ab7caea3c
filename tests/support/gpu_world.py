"""A daemon on the stand-in driver, what goes wrong around it, and what must hold in the end."""

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, pidfd_send_signal
from subprocess import TimeoutExpired
from typing import Any, Literal

import aiohttp
import psutil

from swapserve.keeper.record import Record
from swapserve.states import EngineState
from swapserve.status import EngineStatus
from swapserve.system.process import ProcessRef
from swapserve.testing.cuda_engine import expected_tokens
from tests.support.daemon import Daemon
from tests.support.gpu_daemon import GpuSite
from tests.support.leaks import wait_for
from tests.support.oracle import Answer, completion, stream

ANSWER_TIMEOUT_S = 90.0
"""After everything that went wrong is over, nothing may be open any longer."""
SETTLE_TIMEOUT_S = 20.0
END_TIMEOUT_S = 30.0
RACE_S = 3.0
MIB = 1 << 20
AT_REST = {EngineState.READY, EngineState.SWAPPED_OUT, EngineState.STOPPED, EngineState.FAILED}
Part = Literal["front", "rank"]


@dataclass(slots=True, eq=False)
class Asked:
    """A stream, and what it must say."""

    number: int
    model: str
    tokens: int
    daemon: int
    """Which of the daemons was asked."""
    work: "Future[Answer]"
    answer: Answer | None = None
    cancelled: bool = False

    @property
    def expected(self) -> str:
        return "".join(expected_tokens(prompt(self.number), None, self.tokens))

    def __str__(self) -> str:
        return f"stream {self.number} of '{self.model}', {self.tokens} tokens"


@dataclass(slots=True, eq=False)
class Commanded:
    """An operator's command."""

    words: str
    daemon: int
    work: "Future[tuple[int, Any]]"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process with CUDA state, as the stand-in keeps it."""

    pid: int
    state: str


@dataclass(slots=True)
class Loop:
    """An event loop in a thread of its own, with a client for the daemon."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def submit(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)


@contextmanager
def looping() -> Iterator[Loop]:
    """Run an event loop beside the test."""
    here = Loop()
    thread = threading.Thread(target=here.loop.run_forever, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        here.submit(_end_others()).result()
        here.loop.call_soon_threadsafe(here.loop.stop)
        thread.join()
        here.loop.close()


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def prompt(number: int) -> str:
    return f" prompt {number}"


class GpuWorld:
    """The daemon of a site, its clients and operators, and what is done to it."""

    def __init__(self, here: GpuSite, loop: Loop) -> None:
        self.here = here
        self.asked: list[Asked] = []
        self._loop = loop
        self._commanded: list[Commanded] = []
        self._killed: set[int] = set()
        self._daemons = 0
        self._ended: set[int] = set()
        """Those of the daemons that were killed."""
        self._orphaned: set[int] = set()
        """Those whose keeper was killed: they end, but tell whom they serve."""
        self._foreign_since: list[float] = []
        self._begun = time.monotonic()
        self.steps: list[str] = []
        self.daemon = self._start()

    # ------------------------------------------------------------ clients

    def ask(self, model: str, tokens: int) -> Asked:
        """Start a stream."""
        self._note(f"ask {model} for {tokens} as stream {len(self.asked)}")
        number = len(self.asked)
        body = completion(model, tokens, prompt=prompt(number))
        holder: list[Asked] = []
        work = self._loop.submit(self._stream(self.daemon.completions, body, holder))
        holder.append(Asked(number, model, tokens, self._daemons, work))
        self.asked.append(holder[0])
        return holder[0]

    async def _stream(self, url: str, body: dict[str, Any], holder: list[Asked]) -> Answer:
        timeout = aiohttp.ClientTimeout(total=2 * ANSWER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as http:

            def keep(answer: Answer) -> None:
                holder[0].answer = answer

            return await stream(http, url, body, on_piece=keep)

    def open(self) -> list[Asked]:
        """Return the streams that have not ended."""
        return [one for one in self.asked if not one.work.done()]

    def leave(self, one: Asked) -> None:
        """Let a client go away."""
        self._note(f"cancel {one}")
        one.cancelled = True
        one.work.cancel()

    def command(self, verb: str, model: str) -> None:
        """Give an operator's command, and do not wait for it."""
        self._note(f"{verb} {model}")
        url = f"{self.daemon.url}/admin/v1/engines/{model}/{verb}"
        work = self._loop.submit(self._post(url))
        self._commanded.append(Commanded(f"{verb} {model}", self._daemons, work))

    async def _post(self, url: str) -> tuple[int, Any]:
        timeout = aiohttp.ClientTimeout(total=2 * ANSWER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.post(url) as answer:
            return answer.status, await answer.json()

    # ------------------------------------------------------ what goes wrong

    def fault(self, op: str, kind: str, nth: int) -> None:
        self._note(f"fault {op} {kind} nth={nth}")
        self.here.gpus.fault(op, kind, nth=nth)

    def foreign(self, share: float) -> None:
        """Let something else take a share of the GPU, or give it back."""
        self._note(f"foreign {share}")
        self._foreign_since.append(time.time())
        uuid, size = self.here.gpus.uuids[0], self.here.gpus.config.memory[0]
        taken = ((uuid, 1, int(size * share)),) if share else ()
        self.here.gpus.set_config(foreign=taken)

    def kill_engine(self, model: str, part: Part) -> None:
        """Kill one process of an engine, if it has one."""
        pid = self.daemon.engine(model).pid
        members = _members(pid) if pid is not None else []
        self._note(f"kill {part} of {model}: {members}")
        victim = members[:1] if part == "front" else members[1:2]
        self._killed.update(member.pid for member in members)  # they end with each other
        for member in victim:
            _kill(member)

    def kill_daemon(self) -> None:
        self._note("kill the daemon")
        self._ended.add(self._daemons)
        self.daemon.kill()
        self.daemon = self._start()

    def kill_keeper(self) -> None:
        """Kill the keeper; the daemon then ends by itself."""
        keeper = self.here.site.keeper_pid()
        self._note(f"kill the keeper {keeper}")
        assert keeper is not None
        self._orphaned.add(self._daemons)
        _kill(ProcessRef.of(keeper))
        try:
            status = self.daemon.process.wait(END_TIMEOUT_S)
        except TimeoutExpired:
            raise AssertionError("the daemon does not end without its keeper") from None
        assert status == 1, f"the daemon ended with {status}"
        self.daemon = self._start()

    def wait(self, seconds: float) -> None:
        self._note(f"wait {seconds}")
        time.sleep(seconds)

    def _start(self) -> Daemon:
        site = self.here.site
        if site.keeper_pid() is None:
            argv = ("-m", "tests.support.hasty_keeper", str(site.config))
            keeper = site.run(*argv, log=site.directory / "keeper.log")
            path = str(site.socket)
            alive = "the keeper listens"
            wait_for(alive, lambda: keeper.poll() is None and _listens(path), detail=site.logs)
        self._daemons += 1
        return site.start()

    # ------------------------------------------------------- what must hold

    def settle(self) -> None:
        """End what goes wrong, wait until nothing is under way, and check everything."""
        self._note("settle")
        self.here.gpus.set_config(foreign=())
        for engine in self.daemon.status().engines:
            self.daemon.command("unpin", engine.name)
        for commanded in self._commanded:
            self._check_command(commanded)
        for one in self.asked:
            self._check_stream(one)
        self.here.gpus.clear_faults()  # each would have struck once
        wait_for("all is at rest", self._is_at_rest, SETTLE_TIMEOUT_S, self.daemon.status)
        self._note("at rest")
        self._check_books()
        self._check_service()
        self._check_books()
        assert self.daemon.stop() == 0
        ended = "the keeper and its engines ended"
        wait_for(ended, lambda: self.here.site.keeper_pid() is None, SETTLE_TIMEOUT_S)
        self._note("stopped")
        self._check_calls()
        assert not any(self.here.gpus.sweep().values()), self.here.gpus.sweep()
        assert not [record for record in self._records() if record.process]

    def _check_command(self, commanded: Commanded) -> None:
        try:
            status, answer = commanded.work.result(ANSWER_TIMEOUT_S)
        except aiohttp.ClientError as error:
            if commanded.daemon not in self._ended | self._orphaned:
                raise AssertionError(commanded.words) from error
            return
        except TimeoutError:
            raise AssertionError(f"{commanded.words}: no answer\n{self.daemon.status()}") from None
        assert status == 200 or answer["error"]["code"], f"{commanded.words}: {status} {answer}"

    def _check_stream(self, one: Asked) -> None:
        error: object = None
        try:
            answer = one.work.result(ANSWER_TIMEOUT_S)
        except CancelledError:
            assert one.cancelled
        except aiohttp.ClientError as failure:
            error = failure
        except TimeoutError:
            raise AssertionError(f"{one}: silence\n{self.daemon.status()}") from None
        else:
            one.answer = answer
            error = answer.error
        said = one.answer.text if one.answer else ""
        assert one.expected.startswith(said), f"{one} said {said!r}, not {one.expected!r}"
        if one.cancelled:
            return
        if isinstance(error, Exception):
            not_let_in = one.daemon in self._orphaned and not said
            assert one.daemon in self._ended or not_let_in, f"{one}: {error!r}"
        elif error is not None:
            assert isinstance(error, dict)
            assert error["code"], f"{one}: {error}"
            assert error["message"], f"{one}: {error}"
            self._note(f"{one}: {error['code']}: {error['message'][:200]}")
        else:
            assert one.answer is not None
            assert one.answer.done, f"{one}: it just ended after {said!r}"
            assert said == one.expected

    def _is_at_rest(self) -> bool:
        engines = self.daemon.status().engines
        return all(
            engine.state in AT_REST and engine.active + engine.waiting + engine.suspended == 0
            for engine in engines
        )

    def _check_books(self) -> None:
        # The keeper may still settle what one before it left half way.
        wait_for("nothing is stuck", lambda: not self._stuck(), SETTLE_TIMEOUT_S, self._stuck)
        wait_for("the ledger is right", lambda: not self._owed(), SETTLE_TIMEOUT_S, self._owed)

    def _stuck(self) -> list[Owner]:
        """Return processes that are locked or away and not held as suspended by the keeper."""
        held = {
            ref.pid
            for record in self._records()
            if record.gpu == "in_host_memory" and record.frozen
            for ref in record.cuda
        }
        return [
            owner
            for owner in owners(self.here.gpus.directory)
            if owner.state != "running" and (owner.state != "checkpointed" or owner.pid not in held)
        ]

    def _owed(self) -> dict[str, tuple[int, int]]:
        """Return devices whose ledger is not what there is: its bytes, and the bytes there are."""
        status = self.daemon.status()
        devices = {device.name: device for device in status.devices}
        used = self.here.gpus.sweep()[self.here.gpus.uuids[0]]
        gpu, ram = devices["gpu0"], devices["host"]
        slack = self.here.gpus.config.context_bytes * len(self._names())
        rests = sum(engine.host_bytes for engine in status.engines)
        owed = {}
        if gpu.reserved_bytes or not 0 <= gpu.committed_bytes - used <= slack:
            owed["gpu0"] = (gpu.reserved_bytes + gpu.committed_bytes, used)
        if ram.reserved_bytes or ram.committed_bytes != rests:
            owed["host"] = (ram.reserved_bytes + ram.committed_bytes, rests)
        return owed

    def _check_service(self) -> None:
        """The next request to each engine is served."""
        for name in (*self._names(), self._names()[0]):
            if self._engine(name).state in {EngineState.STOPPED, EngineState.FAILED}:
                self.daemon.command("start", name)
            one = self.ask(name, 8)
            self._check_stream(one)
            assert one.answer is not None
            assert one.answer.error is None, f"{one}: {one.answer.error}\n{self._engine(name)}"

    def _check_calls(self) -> None:
        assert not self.here.gpus.illegal()
        calls = self.here.gpus.calls()
        # Of a call that never came back it is not written down what went wrong.
        excused = self._killed | {call.pid for call in calls if call.fault or call.ended is None}
        for hazard in map(json.loads, self.here.gpus.hazards()):
            raced = any(abs(hazard["time"] - at) < RACE_S for at in self._foreign_since)
            if hazard["hazard"] == "restore without room" and raced:
                continue
            assert hazard["pid"] in excused, f"{hazard}, excused: {excused}"

    # ------------------------------------------------------------- helpers

    def _names(self) -> list[str]:
        return [model["name"] for model in self.here.site.models]

    def _engine(self, name: str) -> EngineStatus:
        return self.daemon.engine(name)

    def _records(self) -> list[Record]:
        """Return what the keeper has written down of the engines that it ever started."""
        kept = self.here.site.directory / "state" / "keeper"
        known = [name for name in self._names() if (kept / f"{name}.json").exists()]
        return [self.here.record(name) for name in known]

    def _note(self, words: str) -> None:
        self.steps.append(f"{time.time():.3f} {time.monotonic() - self._begun:7.3f} {words}")

    def tell(self) -> None:
        """Print what was done, and when."""
        sys.stderr.write("\n".join([*self.steps, ""]))


def owners(directory: Path) -> list[Owner]:
    """Return the living processes with CUDA state, by the stand-in's own books."""
    found = []
    for path in (directory / "owners").iterdir():
        with suppress(OSError, ValueError):
            pid, _, state, *_ = path.read_text().split()
            found.append(Owner(int(pid), state))
    return found


def _members(pid: int) -> list[ProcessRef]:
    """Return an engine's processes, the front one first."""
    try:
        front = psutil.Process(pid)
        tree = [front, *front.children(recursive=True)]
        ours = [one for one in tree if any("testing.cuda_" in word for word in one.cmdline())]
        return [ProcessRef.of(one.pid) for one in ours]
    except (psutil.Error, ProcessLookupError):
        return []


def _kill(ref: ProcessRef) -> None:
    with suppress(ProcessLookupError):
        pidfd = ref.open()
        try:
            pidfd_send_signal(pidfd, SIGKILL)
        finally:
            os.close(pidfd)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return True

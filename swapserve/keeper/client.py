"""The daemon's side of the keeper's socket, and how a keeper is started when none runs."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swapserve.config.schema import Config
from swapserve.errors import (
    CriuError,
    CudaError,
    DeviceBusy,
    ImageError,
    KeeperError,
    KeeperUnavailable,
    StartFailed,
    SwapServeError,
)
from swapserve.ids import EngineName
from swapserve.keeper.agreement import digest
from swapserve.keeper.protocol import (
    PROTOCOL_VERSION,
    Exited,
    Holding,
    ImageKind,
    Measured,
    VerbReport,
)
from swapserve.system.detached import spawn_detached

SOCKET_NAME = "keeper.sock"
CONNECT_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0
QUERY_TIMEOUT_S = 30.0
VERB_MARGIN_S = 60.0
"""Added to the keeper's own limits: it answers late rather than never."""
LINE_LIMIT = 1 << 20
_POLL_S = 0.02


class KeeperClient:
    """Calls verbs. `run` must be running for answers to arrive; `exited` hears of crashes."""

    def __init__(self, config: Config, exited: Callable[[Exited], None]) -> None:
        self._path = config.paths.run_dir / SOCKET_NAME
        self._limits = config.keeper
        self._gpu_bytes = {
            model.name: sum(config.devices[name].memory_bytes for name in model.devices)
            for model in config.models.values()
            if model.gpus
        }
        self._agreement = digest(config)
        self._exited = exited
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.pid = 0
        self.profile = ""

    async def connect(self) -> None:
        """Open the socket.

        Raises:
            KeeperUnavailable: nobody answers there.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                self._reader, self._writer = await asyncio.open_unix_connection(
                    self._path, limit=LINE_LIMIT
                )
        except (OSError, TimeoutError) as error:
            raise KeeperUnavailable(f"no keeper answers on {self._path}: {error}") from error

    async def run(self) -> None:
        """Hand on answers and events until the keeper is gone.

        Raises:
            KeeperUnavailable: always, in the end; every call under way gets it too.
        """
        assert self._reader is not None
        try:
            while line := await self._reader.readline():
                self._receive(json.loads(line))
        except OSError:
            pass
        finally:
            gone = KeeperUnavailable("the keeper closed the connection")
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(gone)
            self._pending.clear()
            self.close()  # so that later calls fail at once
        raise gone

    def close(self) -> None:
        """Close the socket; verbs under way run on in the keeper."""
        if self._writer is not None:
            self._writer.close()

    # -------------------------------------------------------------- verbs

    async def hello(self) -> dict[str, Any]:
        """Learn who the keeper is.

        Raises:
            KeeperError: it speaks another version of the protocol, or was started with other
                engines, programs or paths than the configuration now has.
        """
        said = await self._call("hello", timeout_s=QUERY_TIMEOUT_S)
        if said["version"] != PROTOCOL_VERSION:
            raise KeeperError(
                f"the running keeper (pid {said['pid']}) speaks protocol {said['version']}, this"
                f" daemon {PROTOCOL_VERSION}. Stop it with `kill {said['pid']}` (this ends its"
                " engines), then start again"
            )
        if said["agreement"] != self._agreement:
            raise KeeperError(
                f"the running keeper (pid {said['pid']}) was started with another configuration:"
                " engines, their command lines, paths, keeper or images differ. Stop it with"
                f" `kill {said['pid']}` (this ends its engines), then start again"
            )
        self.pid, self.profile = said["pid"], said["profile"]
        return said

    async def holding(self, engine: EngineName, *, settled: bool = False) -> Holding:
        """Ask what there is of an engine; `settled` waits for the verb under way."""
        limits = self._limits
        longest = max(limits.dump_timeout_s, limits.restore_timeout_s) + VERB_MARGIN_S
        limit = longest + 2 * self._gpu_s(engine) if settled else QUERY_TIMEOUT_S
        data = await self._call("holding", limit, engine=engine, settled=settled)
        return Holding.from_json(data)

    async def spawn(self, engine: EngineName) -> VerbReport:
        """Start it cold."""
        return await self._verb("spawn", VERB_MARGIN_S * 2, engine=engine)

    async def suspend(self, engine: EngineName) -> VerbReport:
        """Move its GPU state to host memory and freeze it."""
        return await self._verb("suspend", VERB_MARGIN_S + self._gpu_s(engine), engine=engine)

    async def resume(self, engine: EngineName) -> VerbReport:
        """Bring its GPU state back and let it run."""
        return await self._verb("resume", VERB_MARGIN_S + self._gpu_s(engine), engine=engine)

    async def dump(
        self, engine: EngineName, kind: ImageKind, canary: dict[str, Any] | None = None
    ) -> VerbReport:
        """Write an image."""
        limit = self._dump_s() + 2 * self._gpu_s(engine)  # a golden image: there and back
        return await self._verb("dump", limit, engine=engine, kind=kind, canary=canary)

    async def restore(
        self, engine: EngineName, kind: ImageKind, *, resume: bool = True
    ) -> VerbReport:
        """Restore an image; without `resume` it stays suspended, off its GPUs."""
        limit = self._limits.restore_timeout_s + VERB_MARGIN_S + self._gpu_s(engine)
        return await self._verb("restore", limit, engine=engine, kind=kind, resume=resume)

    async def discard(self, engine: EngineName) -> VerbReport:
        """Kill it."""
        return await self._verb("discard", VERB_MARGIN_S + self._gpu_s(engine), engine=engine)

    async def stop(self, engine: EngineName, grace_s: float) -> VerbReport:
        """End it."""
        limit = grace_s + VERB_MARGIN_S + self._gpu_s(engine)
        return await self._verb("stop", limit, engine=engine, grace_s=grace_s)

    async def drop_image(self, engine: EngineName, kind: ImageKind) -> VerbReport:
        """Delete an image."""
        return await self._verb("drop_image", VERB_MARGIN_S, engine=engine, kind=kind)

    async def canary_passed(self, engine: EngineName) -> None:
        """Note that the golden image is good."""
        await self._call("canary_passed", QUERY_TIMEOUT_S, engine=engine)

    async def measure(self, engine: EngineName) -> Measured:
        """Return what it takes now."""
        data = await self._call("measure", QUERY_TIMEOUT_S, engine=engine)
        return Measured.from_json(data)

    async def log_tail(self, engine: EngineName, lines: int) -> str:
        """Return the end of its own output."""
        data = await self._call("log_tail", QUERY_TIMEOUT_S, engine=engine, lines=lines)
        return str(data["text"])

    async def shutdown(self) -> None:
        """Make the keeper end itself and every engine."""
        await self._call("shutdown", QUERY_TIMEOUT_S)

    # ------------------------------------------------------------ the wire

    def _dump_s(self) -> float:
        return self._limits.dump_timeout_s + VERB_MARGIN_S

    def _gpu_s(self, engine: EngineName) -> float:
        """Return how long moving all of an engine's GPUs could take, waiting for them included.

        Twice: another engine may be on its way just then.
        """
        if engine not in self._gpu_bytes:
            return 0.0
        moving = self._gpu_bytes[engine] / self._limits.cuda_rate_bytes
        return 2 * (moving + self._limits.cuda_lock_timeout_s)

    async def _verb(self, verb: str, timeout_s: float, **fields: Any) -> VerbReport:  # noqa: ANN401
        return VerbReport.from_json(await self._call(verb, timeout_s, **fields))

    async def _call(self, verb: str, timeout_s: float, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
        if self._writer is None or self._writer.is_closing():
            raise KeeperUnavailable("the keeper is not connected")
        self._number += 1
        number = self._number
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            line = json.dumps({"id": number, "verb": verb, **fields})
            self._writer.write(line.encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise KeeperError(f"the keeper did not answer {verb} within {timeout_s} s") from error
        finally:
            self._pending.pop(number, None)

    def _receive(self, message: dict[str, Any]) -> None:
        if message.get("event") == "exited":
            self._exited(
                Exited(engine=message["engine"], pid=message["pid"], status=message["status"])
            )
            return
        future = self._pending.get(message["id"])
        if future is None or future.done():
            return  # whoever asked has left
        if "ok" in message:
            future.set_result(message["ok"])
        else:
            future.set_exception(_error(message["error"]))


def _error(data: dict[str, Any]) -> SwapServeError:
    """Build the exception that the keeper raised."""
    code, message = data["code"], data["message"]
    engine, tail = str(data.get("engine", "")), str(data.get("log_tail", ""))
    if code == CriuError.code:
        return CriuError(engine, data["phase"], message, tail, killed=bool(data["killed"]))
    if code == CudaError.code:
        return CudaError(engine, data["phase"], message, tail, lost=bool(data["lost"]))
    if code == DeviceBusy.code:
        return DeviceBusy(engine, data["uuid"], int(data["needed"]), int(data["free"]))
    if code == ImageError.code:
        return ImageError(engine, data["phase"], message, tail)
    if code == StartFailed.code:
        return StartFailed(engine, message, tail)
    return KeeperError(message)


async def ensure(config: Config) -> bool:
    """Start a keeper unless one runs; return whether this started it.

    It gets its own session, so killing the daemon does not kill it.

    Raises:
        KeeperUnavailable: it did not come up; the message has the end of its log.
    """
    path = config.paths.run_dir / SOCKET_NAME
    if await _answers(path):
        return False
    logs = config.paths.state_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "swapserve.keeper.server", str(config.source.absolute())]
    child = spawn_detached(argv, log=logs / "keeper.log")
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await _answers(path):
                if child.poll() is not None:
                    break
                await asyncio.sleep(_POLL_S)
            else:
                return True
    except TimeoutError:
        child.terminate()
    raise KeeperUnavailable(f"the keeper did not start. Its log ends:\n{_tail(logs)}")


def _tail(logs: Path) -> str:
    lines = (logs / "keeper.log").read_text(errors="replace").splitlines()
    return "\n".join(lines[-12:])


async def _answers(path: Path) -> bool:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_unix_connection(path)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True

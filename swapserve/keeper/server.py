"""The keeper: small, privileged, and the parent of every engine.

`python -m swapserve.keeper.server CONFIG` listens on `RUN_DIR/keeper.sock` for the daemon alone
(peer credentials), carries out the fixed verbs of `HeldEngine` for the engines of its own,
root-owned configuration, and reports exits. It takes no command line, path or environment from
the daemon. TERM ends it and every engine; being killed leaves the engines, and the next keeper
adopts them.
"""

import asyncio
import json
import logging
import os
import pwd
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from swapserve.config.check import check_ownership, config_files
from swapserve.config.load import load
from swapserve.config.schema import Config
from swapserve.errors import (
    CommandError,
    ConfigError,
    CriuError,
    CudaError,
    DeviceBusy,
    KeeperError,
    StartFailed,
    SwapError,
    SwapServeError,
)
from swapserve.ids import EngineName
from swapserve.keeper import containers, network, record
from swapserve.keeper.agreement import digest
from swapserve.keeper.context import Context
from swapserve.keeper.engine import HeldEngine
from swapserve.keeper.place import new_record
from swapserve.keeper.protocol import PROTOCOL_VERSION, Exited, ImageKind, VerbReport
from swapserve.system import command, linux, process
from swapserve.system.lockfile import only_one
from swapserve.system.process import ProcessRef

SOCKET_NAME = "keeper.sock"
LOCK_NAME = "keeper.lock"
LINE_LIMIT = 1 << 20
STOP_TIMEOUT_S = 60.0
"""Longest end of one engine, beyond the time that GPU state of all of them needs to leave."""

log = logging.getLogger(__name__)


class Keeper:
    """Holds all engines and answers the daemon."""

    def __init__(self, config_path: Path, config: Config) -> None:
        self._config_path = config_path
        self._agreement = digest(config)
        self._context = Context(config)
        self._context.images.serving = self._serving
        self._engines: dict[EngineName, HeldEngine] = {}
        self._listeners: set[asyncio.StreamWriter] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until TERM; then end every engine.

        Raises:
            OSError: directories or socket cannot be made, or another keeper runs.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        linux.become_subreaper()
        run_dir = self._context.config.paths.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        with only_one(run_dir / LOCK_NAME, "keeper"):
            await self._context.open()
            try:
                await self._keep(run_dir / SOCKET_NAME)
            finally:
                await self._context.close()

    async def _keep(self, path: Path) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await self._take_over()
            server = await self._listen(path)
            log.info("event=keeper_ready pid=%d profile=%s", os.getpid(), self._context.profile)
            await self._stopping.wait()
            server.close()
            await self._end_all()
            for writer in tuple(self._listeners):
                writer.close()
        path.unlink(missing_ok=True)

    # ------------------------------------------------------------ engines

    async def _take_over(self) -> None:
        """Adopt what an earlier keeper left of our engines, sweep what belongs to none."""
        found = {path: record.load(path) for path in self._context.records_dir.glob("*.json")}
        ours = self._context.config.models
        for path, kept in found.items():
            if kept is None or EngineName(kept.engine) not in ours:
                path.unlink()
        known = {old.engine: old for old in found.values() if old is not None}
        taken = {old.index for old in known.values() if old.index is not None}
        for name, model in ours.items():
            boxed = model.sandbox and model.launch == "process"
            wants_network = self._context.can_sandbox and boxed
            old = known.get(name)
            if old is None or (old.index is not None) != wants_network:
                index = self._context.free_index(taken) if wants_network else None
                old = new_record(model, index=index)
                if index is not None:
                    taken.add(index)
                    await self._reserve(index)
            engine = HeldEngine(
                model,
                self._context,
                old,
                start_watch=self._start,
                exited=self._announce,
                held=self._running,
            )
            self._engines[name] = engine
            engine.recover()
        if self._context.can_sandbox:
            keep = {net.name for held in self._engines.values() if (net := held.place.network)}
            for orphan in await network.sweep(self._context.tag, keep):
                log.info("event=swept namespace=%s", orphan)

        await self._sweep_containers()

    def _running(self) -> dict[str, ProcessRef]:
        return {name: root for name, held in self._engines.items() if (root := held.root)}

    def _serving(self) -> set[str]:
        return {held.place.slug for held in tuple(self._engines.values()) if held.serves}

    async def _sweep_containers(self) -> None:
        """Remove what a killed keeper left of containers that belong to no engine of ours."""
        models = self._context.config.models.values()
        if not any(model.launch == "container" for model in models):
            return
        ours = set(self._running())  # one that was just being started is removed, too
        for tool in await self._context.runtimes.tools():
            try:
                for engine in await containers.sweep(tool, self._context.tag, ours):
                    log.info("event=swept container_of=%s", engine)
            except KeeperError as error:
                log.warning("event=not_swept tool=%s error=%s", tool.kind, error)

    async def _reserve(self, index: int) -> None:
        """Make a network before its engine's first start: so another keeper sees it is taken."""
        try:
            await self._context.network(index).make()
        except CommandError as error:  # the start, which needs it, will say so to whoever asked
            log.warning("event=network_not_made error=%s", error)

    async def _end_all(self) -> None:
        for ours in (True, False):  # those of others are let go, and may need the room for it
            async with asyncio.TaskGroup() as ending:
                for engine in self._engines.values():
                    if engine.owned is ours:
                        ending.create_task(self._end(engine))

    async def _end(self, engine: HeldEngine) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S + self._context.leaving_s()):
                await engine.idle()
                await engine.forget()
        except (SwapServeError, OSError, TimeoutError):
            log.exception("event=end_failed engine=%s", engine.model.name)

    def _start(self, work: Awaitable[None]) -> None:
        """Run a piece of work of an engine in the keeper's own task group."""

        async def guarded() -> None:
            try:
                await work
            except (OSError, SwapServeError):
                log.exception("event=background_work_failed")

        assert self._tasks is not None
        self._tasks.create_task(guarded())

    def _reap_orphans(self) -> None:
        roots = {root.pid for engine in self._engines.values() if (root := engine.root)}
        if count := process.reap_orphans(roots | command.running):
            log.info("event=reaped_orphans count=%d", count)

    def _announce(self, exited: Exited) -> None:
        line = _line({"event": "exited", "engine": exited.engine, "pid": exited.pid,
                      "status": exited.status})  # fmt: skip
        for writer in tuple(self._listeners):
            writer.write(line)

    # ------------------------------------------------------------- socket

    async def _listen(self, path: Path) -> asyncio.Server:
        path.unlink(missing_ok=True)
        old_mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._serve, path, limit=LINE_LIMIT)
        finally:
            os.umask(old_mask)
        user = self._context.config.server.user
        if user is not None and os.geteuid() == 0:
            os.chown(path, pwd.getpwnam(user).pw_uid, -1)
        return server

    def _may_connect(self, writer: asyncio.StreamWriter) -> bool:
        peer = writer.get_extra_info("socket")
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("3i", credentials)
        allowed = {0, os.geteuid()}
        if user := self._context.config.server.user:
            allowed.add(pwd.getpwnam(user).pw_uid)
        return uid in allowed

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._may_connect(writer):
            log.warning("event=refused_connection reason=uid")
            writer.close()
            return
        self._listeners.add(writer)
        try:
            while line := await reader.readline():
                self._receive(line, writer)
        except (OSError, ValueError) as error:  # gone, or a line beyond the limit
            log.warning("event=connection_lost error=%s", error)
        finally:
            self._listeners.discard(writer)
            writer.close()

    def _receive(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(line)
            number, verb = int(request.pop("id")), str(request.pop("verb"))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("event=bad_request")
            writer.close()
            return
        assert self._tasks is not None
        # In the keeper's own group: a verb outlives the connection that asked for it.
        self._tasks.create_task(self._answer(number, verb, request, writer))

    async def _answer(
        self, number: int, verb: str, request: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        answer: dict[str, Any]
        try:
            answer = {"id": number, "ok": await self._carry_out(verb, request)}
        except SwapServeError as error:
            answer = {"id": number, "error": _as_json(error)}
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.exception("event=verb_failed verb=%s", verb)
            answer = {"id": number, "error": _as_json(KeeperError(f"{verb}: {error}"))}
        if not writer.is_closing():
            writer.write(_line(answer))
        self._reap_orphans()

    async def _carry_out(self, verb: str, request: dict[str, Any]) -> dict[str, Any]:
        if verb == "hello":
            return {
                "version": PROTOCOL_VERSION,
                "pid": os.getpid(),
                "profile": self._context.profile,
                "criu": self._context.criu.version if self._context.criu else None,
                "engines": sorted(self._engines),
                "agreement": self._agreement,
            }
        if verb == "shutdown":
            self._stopping.set()
            return {}
        engine = self._engines.get(EngineName(str(request.get("engine"))))
        if engine is None:
            raise KeeperError(f"no engine {request.get('engine')!r} in {self._config_path}")
        action = _VERBS.get(verb)
        if action is None:
            raise KeeperError(f"unknown verb {verb!r}")
        return await action(engine, request)


Action = Callable[[HeldEngine, dict[str, Any]], Awaitable[dict[str, Any]]]


def _reporting(work: Callable[[HeldEngine, dict[str, Any]], Awaitable[VerbReport]]) -> Action:
    async def action(engine: HeldEngine, request: dict[str, Any]) -> dict[str, Any]:
        return (await work(engine, request)).as_json()

    return action


def _kind(request: dict[str, Any]) -> ImageKind:
    """Return the kind of image asked for; it becomes part of a path, so no other word will do."""
    kind = request.get("kind")
    if kind not in ("live", "golden"):
        raise KeeperError(f"{kind!r} is no kind of image")
    return "golden" if kind == "golden" else "live"


async def _holding(engine: HeldEngine, request: dict[str, Any]) -> dict[str, Any]:
    if request.get("settled"):
        await engine.idle()
    return (await asyncio.to_thread(engine.holding)).as_json()


async def _measure(engine: HeldEngine, _: dict[str, Any]) -> dict[str, Any]:
    return (await engine.measure()).as_json()


async def _log_tail(engine: HeldEngine, request: dict[str, Any]) -> dict[str, Any]:
    return {"text": await engine.log_tail(int(request["lines"]))}


async def _canary_passed(engine: HeldEngine, _: dict[str, Any]) -> dict[str, Any]:
    await engine.mark_canary_passed()
    return {}


_VERBS: dict[str, Action] = {
    "holding": _holding,
    "measure": _measure,
    "log_tail": _log_tail,
    "canary_passed": _canary_passed,
    "spawn": _reporting(lambda engine, _: engine.spawn()),
    "suspend": _reporting(lambda engine, _: engine.suspend()),
    "resume": _reporting(lambda engine, _: engine.resume()),
    "dump": _reporting(lambda engine, r: engine.dump(_kind(r), r.get("canary"))),
    "restore": _reporting(
        lambda engine, r: engine.restore(_kind(r), resume=r.get("resume") is not False)
    ),
    "discard": _reporting(lambda engine, _: engine.discard()),
    "stop": _reporting(lambda engine, r: engine.stop(float(r["grace_s"]))),
    "drop_image": _reporting(lambda engine, r: engine.drop_image(_kind(r))),
}


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _as_json(error: SwapServeError) -> dict[str, Any]:
    data: dict[str, Any] = {"code": error.code, "message": str(error)}
    if isinstance(error, SwapError | StartFailed):
        data["engine"] = error.engine
    if isinstance(error, SwapError):
        data |= {"phase": error.phase, "message": error.message, "log_tail": error.log_tail}
    if isinstance(error, CriuError):
        data["killed"] = error.killed
    if isinstance(error, CudaError):
        data["lost"] = error.lost
    if isinstance(error, DeviceBusy):
        data |= {"uuid": error.uuid, "needed": error.needed_bytes, "free": error.free_bytes}
    if isinstance(error, StartFailed):
        data |= {"message": error.reason, "log_tail": error.log_tail}
    return data


def main(argv: list[str]) -> int:
    """Load the configuration and keep; 2 if it cannot be used."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s keeper %(levelname)s %(message)s", stream=sys.stderr
    )
    path = Path(argv[1])
    try:
        config = load(path, check_binaries=False, secrets=False)
        if os.geteuid() == 0:
            check_ownership(*config_files(config))
    except ConfigError as error:
        log.error("event=bad_config\n%s", error)  # noqa: TRY400 - the problems say it all
        return 2
    try:
        asyncio.run(Keeper(path, config).run())
    except* (OSError, ValueError, SwapServeError) as group:
        for leaf in group.exceptions:
            log.error("event=keeper_failed error=%s", leaf)  # noqa: TRY400 - it says it all
        status = 1
    else:
        status = 0
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))

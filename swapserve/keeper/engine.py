"""One engine in the keeper's hands: the verbs that start, freeze, dump, restore and end it.

One verb at a time; each runs to its end whoever asked for it. `Holding` says what is there now.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swapserve.config.schema import ModelConfig
from swapserve.errors import CommandError, CriuError, ImageError, KeeperError, StartFailed
from swapserve.keeper import record as records
from swapserve.keeper import sandbox
from swapserve.keeper.context import Context
from swapserve.keeper.criu import NETNS_KEY
from swapserve.keeper.images import (
    MANIFEST,
    MANIFEST_VERSION,
    Manifest,
    fingerprint,
    identity,
    size_of,
)
from swapserve.keeper.network import Network
from swapserve.keeper.protocol import Exited, Held, Holding, ImageKind, VerbReport
from swapserve.keeper.record import Record
from swapserve.keeper.sandbox import SandboxSpec
from swapserve.system import host, process
from swapserve.system.cgroup import Cgroup
from swapserve.system.command import run
from swapserve.system.process import ProcessRef

SPAWN_TIMEOUT_S = 60.0
FREEZE_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 30.0
LOG_LIMIT_BYTES = 32 << 20

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Phases:
    """Seconds by phase of the verb under way."""

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account the block's time to a phase."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    def report(self, moved_bytes: int = 0) -> VerbReport:
        """Return the finished verb's report."""
        total = time.monotonic() - self.started
        return VerbReport(seconds=total, phases=dict(self.seconds), bytes=moved_bytes)


class HeldEngine:
    """One engine. `start_watch` runs a coroutine in the keeper's task group."""

    def __init__(
        self,
        model: ModelConfig,
        context: Context,
        record: Record,
        *,
        start_watch: Callable[[Awaitable[None]], None],
        exited: Callable[[Exited], None],
    ) -> None:
        self.model = model
        self._context = context
        self._record = record
        self._start_watch = start_watch
        self._exited = exited
        self._verb: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._gone = asyncio.Event()
        self._gone.set()
        self._end_expected = False
        self._slug = sandbox.slug(model.name)
        self._group: Cgroup | None = context.group(model.name)

    # ------------------------------------------------------------ facts

    @property
    def network(self) -> Network | None:
        """Its network namespace, None if it shares the host's."""
        index = self._record.index
        return None if index is None else self._context.network(index)

    @property
    def address(self) -> str:
        """Where the daemon reaches it, `host:port`."""
        network = self.network
        return f"{network.engine_ip if network else '127.0.0.1'}:{self._record.port}"

    @property
    def can_dump(self) -> bool:
        """Whether images of it are possible here."""
        return self._record.index is not None and self._context.criu is not None

    def holding(self) -> Holding:
        """Say what there is of it now (reads files: call it in a thread)."""
        images = self._context.images
        golden = self._valid_golden()
        live = images.manifest(self._slug, "live")
        process = self._record.process
        if process is not None:
            held = Held.FROZEN if self._record.frozen else Held.RUNNING
        else:
            held = Held.LIVE_IMAGE if live is not None else Held.NOTHING
        return Holding(
            engine=self.model.name,
            held=held,
            verb=self._verb,
            pid=process.pid if process else None,
            address=self.address,
            golden=golden is not None,
            live_image_bytes=live.bytes if live else 0,
            golden_image_bytes=golden.bytes if golden else 0,
            restored_from=self._record.restored_from,
            can_dump=self.can_dump,
            canary=golden.canary if golden else None,
            canary_passed=golden.canary_passed if golden else False,
        )

    def log_tail(self, lines: int) -> str:
        """Return the last lines of the engine's own output."""
        path = self._log_path()
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - lines * 400))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    async def idle(self) -> None:
        """Wait until no verb is under way."""
        await self._idle.wait()

    # ------------------------------------------------------------ verbs

    async def spawn(self) -> VerbReport:
        """Start the engine cold.

        Raises:
            KeeperError: it is already there.
            StartFailed: it could not be executed; nothing of it is left.
        """
        async with self._doing("spawn", running=False) as phases:
            spec = await self._prepare(phases)
            self._context.images.drop(self._context.images.path(self._slug, "live"))
            with phases.phase("spawn"):
                pid = await self._execute(spec)
            self._adopt(ProcessRef.of(pid), restored_from=None)
            return phases.report()

    async def freeze(self) -> VerbReport:
        """Stop every thread of the engine; its memory stays where it is."""
        async with self._doing("freeze", running=True) as phases:
            await self._freeze(True, phases)
            return phases.report()

    async def thaw(self) -> VerbReport:
        """Let a frozen engine run on."""
        async with self._doing("thaw", running=True) as phases:
            await self._freeze(False, phases)
            return phases.report()

    async def dump(self, kind: ImageKind, canary: dict[str, Any] | None) -> VerbReport:
        """Write an image: `live` ends the process, `golden` leaves it running.

        Raises:
            KeeperError: it does not run, or images of it are not possible here.
            ImageError: no room for the image; the engine runs on.
            CriuError: the engine runs on unless it says otherwise.
        """
        async with self._doing("dump", running=True) as phases:
            return await self._dump(kind, canary, phases)

    async def restore(self, kind: ImageKind) -> VerbReport:
        """Bring the engine back from an image; a live image is used up, also by a failure.

        Raises:
            KeeperError: it is already there.
            ImageError: there is no such image, or the golden one no longer fits.
            CriuError: nothing of it runs.
        """
        async with self._doing("restore", running=False) as phases:
            return await self._restore(kind, phases)

    async def discard(self) -> VerbReport:
        """Kill the engine at once, without a word to it."""
        async with self._doing("discard", running=True) as phases:
            with phases.phase("kill"):
                await self._kill()
            return phases.report()

    async def stop(self, grace_s: float) -> VerbReport:
        """End the engine if it runs (TERM, then KILL) and drop its live image."""
        async with self._doing("stop", running=None) as phases:
            if self._record.process is not None:
                with phases.phase("terminate"):
                    await self._terminate(grace_s)
            live = self._context.images.path(self._slug, "live")
            await asyncio.to_thread(self._context.images.drop, live)
            return phases.report()

    async def drop_image(self, kind: ImageKind) -> VerbReport:
        """Delete an image."""
        async with self._doing("drop_image", running=None) as phases:
            path = self._context.images.path(self._slug, kind)
            with phases.phase("delete"):
                await asyncio.to_thread(self._context.images.drop, path)
            return phases.report()

    async def mark_canary_passed(self) -> None:
        """Note that a restore of the present golden image answered as it should."""
        manifest = await asyncio.to_thread(self._valid_golden)
        if manifest is not None:
            self._context.images.mark_canary_passed(self._slug, manifest)

    async def measure(self) -> process.Memory:
        """Measure the memory of the whole tree.

        Raises:
            KeeperError: it does not run.
        """
        if self._record.process is None:
            raise KeeperError(f"'{self.model.name}' does not run")
        try:
            return await asyncio.to_thread(process.memory, self._record.process.pid)
        except ProcessLookupError as error:
            raise KeeperError(f"'{self.model.name}' has just ended") from error

    async def recover(self) -> None:
        """Take over what an earlier keeper left: adopt a process that still runs."""
        ref = self._record.process
        if ref is None:
            return
        if ref.alive():
            self._adopt(ref, restored_from=self._record.restored_from, keep_frozen=True)
            log.info("event=adopted engine=%s pid=%d", self.model.name, ref.pid)
            return
        self._record.process = None
        await self._bury()

    async def forget(self) -> None:
        """End everything and remove namespace, group and record; images stay."""
        await self.stop(0.0 if self._record.frozen else self._grace_s())
        if network := self.network:
            await network.remove()
        if self._group is not None:
            self._group.remove()
        self._context.record_path(self.model.name).unlink(missing_ok=True)

    # ---------------------------------------------------------- the work

    @asynccontextmanager
    async def _doing(self, verb: str, *, running: bool | None) -> AsyncIterator[Phases]:
        name = self.model.name
        if self._verb is not None:
            raise KeeperError(f"'{name}' cannot {verb} while it is in {self._verb}")
        if running is True and self._record.process is None:
            raise KeeperError(f"'{name}' cannot {verb}: it does not run")
        if running is False and self._record.process is not None:
            raise KeeperError(f"'{name}' cannot {verb}: it already runs")
        self._verb = verb
        self._idle.clear()
        try:
            yield Phases()
        finally:
            self._verb = None
            self._idle.set()

    async def _prepare(self, phases: Phases) -> SandboxSpec:
        """Make network, directories and log, and return the spec."""
        with phases.phase("sandbox"):
            directory = self._log_path().parent
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            _rotate(self._log_path())
            spec = self._spec()
            if network := self.network:
                await network.make()
                await asyncio.to_thread(sandbox.prepare_root, spec)
            return spec

    def _spec(self) -> SandboxSpec:
        group = self._group.path if self._group else None
        log_dir = self._log_path().parent
        network = self.network
        if network is None:
            return sandbox.plain(self.model, log_dir=log_dir, cgroup=group, port=self._record.port)
        return sandbox.sandboxed(
            self.model,
            root=self._root(),
            log_dir=log_dir,
            netns=network.path,
            cgroup=group,
            port=self._record.port,
        )

    async def _execute(self, spec: SandboxSpec) -> int:
        argv = [sys.executable, "-m", "swapserve.keeper.sandbox_init"]
        try:
            done = await run(
                argv, timeout_s=SPAWN_TIMEOUT_S, stdin=json.dumps(spec.as_json()).encode()
            )
            pid: int = json.loads(done.stdout)["pid"]
        except (CommandError, ValueError, KeyError) as error:
            reason = error.output_tail if isinstance(error, CommandError) else str(error)
            raise StartFailed(self.model.name, reason) from error
        return pid

    async def _freeze(self, on: bool, phases: Phases) -> None:
        assert self._record.process is not None
        with phases.phase("freeze" if on else "thaw"):
            if self._group is not None:
                await self._group.freeze(on, timeout_s=FREEZE_TIMEOUT_S)
            else:
                number = signal.SIGSTOP if on else signal.SIGCONT
                for pid in process.tree(self._record.process.pid):
                    os.kill(pid, number)
        self._record.frozen = on
        self._save()

    async def _dump(
        self, kind: ImageKind, canary: dict[str, Any] | None, phases: Phases
    ) -> VerbReport:
        criu, network, ref = self._context.criu, self.network, self._record.process
        if criu is None or network is None or ref is None:
            why = self._context.criu_missing if network else "it has no sandbox"
            raise KeeperError(f"no image of '{self.model.name}' is possible: {why}")
        images, spec = self._context.images, self._spec()
        with phases.phase("prepare"):
            need = (await self.measure()).dump
            stage = asyncio.to_thread(
                images.stage, self._slug, kind, engine=self.model.name, need_bytes=need
            )
            staging = await stage
            files = await asyncio.to_thread(self._mapped, ref.pid, spec)
        self._end_expected = kind == "live"
        try:
            with phases.phase("dump"):
                await criu.dump(
                    self.model.name,
                    ref.pid,
                    staging / "criu",
                    netns_inode=network.inode,
                    binds=spec.binds,
                    leave_running=kind == "golden",
                    frozen_group=self._group.path if self._group and self._record.frozen else None,
                    timeout_s=self._context.config.keeper.dump_timeout_s,
                )
        except CriuError as error:
            self._end_expected = False
            await asyncio.to_thread(images.drop, staging)
            if error.killed:
                await network.unlock(self._context.nft)
            raise
        with phases.phase("commit"):
            size = await asyncio.to_thread(size_of, staging)
            manifest = Manifest(
                version=MANIFEST_VERSION,
                engine=self.model.name,
                kind=kind,
                fingerprint=self._fingerprint(spec),
                files=files,
                binds={bind.key: bind.source for bind in spec.binds},
                netns_key=NETNS_KEY,
                bytes=size,
                canary=canary,
            )
            await asyncio.to_thread(images.commit, staging, self._slug, manifest)
        if kind == "live":
            with phases.phase("reap"):
                await self._wait_gone()
        return phases.report(size)

    async def _restore(self, kind: ImageKind, phases: Phases) -> VerbReport:
        criu, network, images = self._context.criu, self.network, self._context.images
        if criu is None or network is None:
            raise KeeperError(f"'{self.model.name}' has no sandbox, or there is no CRIU")
        spec = await self._prepare(phases)
        with phases.phase("validate"):
            manifest, directory = await asyncio.to_thread(self._take_image, kind, spec)
        try:
            with phases.phase("restore"), self._context.huge_pages.during_restore():
                pid = await criu.restore(
                    self.model.name,
                    directory / "criu",
                    pidfile=self._context.engine_dir(self.model.name) / "pid",
                    netns=network.path,
                    binds=manifest.binds,
                    root=self._root(),
                    group=self._group,
                    timeout_s=self._context.config.keeper.restore_timeout_s,
                )
            with phases.phase("verify"):
                self._record.frozen = False
                self._adopt(ProcessRef.of(pid), restored_from=kind)
                await asyncio.to_thread(self._gather, pid)
        except (CriuError, ProcessLookupError, OSError) as error:
            await self._clear_after_failed_restore(network)
            if isinstance(error, CriuError):
                raise
            raise CriuError(self.model.name, "restore", str(error)) from error
        finally:
            if kind == "live":
                # Off the way of the first token: the bytes go while the engine already answers.
                self._start_watch(asyncio.to_thread(images.drop, directory))
        return phases.report(manifest.bytes)

    def _take_image(self, kind: ImageKind, spec: SandboxSpec) -> tuple[Manifest, Path]:
        images = self._context.images
        name = self.model.name
        if kind == "golden":
            manifest = images.valid(self._slug, kind, self._fingerprint(spec))
            if manifest is None:
                raise ImageError(name, "restore", "there is no golden image that still fits")
            directory = images.path(self._slug, kind)
            os.utime(directory / MANIFEST)  # least recently used goes first
            return manifest, directory
        manifest = images.manifest(self._slug, kind)
        if manifest is None:
            raise ImageError(name, "restore", "there is no live image")
        return manifest, images.consume_live(self._slug)

    def _gather(self, root: int) -> None:
        """Verify that every restored process is in the engine's group, moving strays there."""
        if self._group is None:
            return
        inside = self._group.pids()
        for pid in process.tree(root):
            if pid not in inside:
                self._group.add(pid)

    async def _clear_after_failed_restore(self, network: Network) -> None:
        if self._record.process is not None:
            await self._kill()
        elif self._group is not None:
            self._group.kill()
        await network.unlock(self._context.nft)

    async def _kill(self) -> None:
        self._end_expected = True
        ref = self._record.process
        if ref is not None and not (self._group is not None and self._group.kill()):
            for pid in reversed(process.tree(ref.pid)):
                _signal(pid, signal.SIGKILL)
        await self._wait_gone()

    async def _terminate(self, grace_s: float) -> None:
        self._end_expected = True
        ref = self._record.process
        assert ref is not None
        if grace_s > 0 and not self._record.frozen:
            _signal(ref.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await self._gone.wait()
            except TimeoutError:
                log.warning("event=kill_after_grace engine=%s", self.model.name)
        if not self._gone.is_set():
            await self._kill()

    async def _wait_gone(self) -> None:
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError as error:
            message = f"the processes of '{self.model.name}' did not end"
            raise KeeperError(message) from error

    # ------------------------------------------------------- its process

    def _adopt(
        self, ref: ProcessRef, *, restored_from: ImageKind | None, keep_frozen: bool = False
    ) -> None:
        self._record.process = ref
        self._record.restored_from = restored_from
        self._record.frozen = self._record.frozen and keep_frozen
        self._end_expected = False
        self._gone.clear()
        self._save()
        self._start_watch(self._watch(ref))

    async def _watch(self, ref: ProcessRef) -> None:
        """Wait for the engine's end, reap it, and say so if nobody asked for it."""
        status = "unknown"
        try:
            pidfd = ref.open()
        except ProcessLookupError:
            pidfd = None
        if pidfd is not None:
            try:
                await process.ended(pidfd)
                status = process.reap(pidfd)
            finally:
                os.close(pidfd)
        self._record.process = None
        self._record.frozen = False
        expected = self._end_expected
        if not expected:
            await self._bury()
        self._save()
        self._gone.set()
        if not expected:
            log.warning("event=exited engine=%s status=%s", self.model.name, status)
            self._exited(Exited(engine=self.model.name, pid=ref.pid, status=status))

    async def _bury(self) -> None:
        """Kill what an ended engine left behind (its first process takes its namespace along)."""
        if self._group is not None and self._group.pids():
            self._group.kill()
        self._save()

    # ---------------------------------------------------------- helpers

    def _root(self) -> Path:
        return self._context.engine_dir(self.model.name) / "root"

    def _log_path(self) -> Path:
        return self._context.log_dir(self.model.name) / sandbox.LOG_NAME

    def _grace_s(self) -> float:
        own = self.model.stop_grace_s
        return self.model.recipe.stop_grace_s if own is None else own

    def _save(self) -> None:
        records.save(self._context.record_path(self.model.name), self._record)

    def _valid_golden(self) -> Manifest | None:
        if not self.can_dump:
            return None
        return self._context.images.valid(self._slug, "golden", self._fingerprint(self._spec()))

    def _fingerprint(self, spec: SandboxSpec) -> str:
        criu = self._context.criu
        return fingerprint(
            spec,
            recipe=self.model.recipe.name,
            files=sandbox.model_files(self.model),
            versions={"criu": criu.version if criu else ""},
        )

    def _mapped(self, root: int, spec: SandboxSpec) -> dict[str, str]:
        """Return the identity of every host file that the tree has mapped."""
        shown = tuple(bind.target for bind in spec.binds)
        paths = (path for path in process.mapped_files(root) if path.startswith(shown))
        return {path: identity(Path(path)) for path in paths}


def new_record(model: ModelConfig, *, index: int | None) -> Record:
    """Return the record of an engine that was never seen before."""
    if index is not None:
        return Record(engine=model.name, index=index, port=model.port or model.recipe.port)
    return Record(engine=model.name, index=None, port=model.port or host.free_port())


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _rotate(path: Path) -> None:
    """Keep an engine's log bounded: copy and truncate, because a frozen image has it open."""
    if not path.exists():
        path.touch(mode=0o640)
    elif path.stat().st_size > LOG_LIMIT_BYTES:
        path.with_suffix(".log.1").write_bytes(path.read_bytes())
        os.truncate(path, 0)

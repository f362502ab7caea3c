"""Engines in containers of podman or docker.

The runtime's own processes (conmon, containerd) are the parents; SwapServe sees the container's
first process by its host pid, freezes it by its cgroup, and asks the runtime for the rest. A
container outlives the keeper and is known again by name and labels; one of the same name without
the labels is somebody else's and is never touched.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

from swapserve.config.recipes import launch_argv, launch_env, launch_read_only_paths
from swapserve.config.schema import ModelConfig
from swapserve.errors import CommandError, KeeperError, StartFailed
from swapserve.keeper import sandbox, seccomp
from swapserve.keeper.launch import LOG_TAIL_LINES, Launched, is_frozen, own_group
from swapserve.keeper.phases import Phases
from swapserve.keeper.runtimes import (
    ENGINE_LABEL,
    TAG_LABEL,
    ContainerSpec,
    ContainerState,
    ContainerTool,
)
from swapserve.keeper.sandbox import CACHE_DIR, Bind
from swapserve.system.process import ProcessRef

_EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - in the container's own network

log = logging.getLogger(__name__)


class ContainerLauncher:
    """One engine in a container.

    Args:
        model: with an image.
        tool: asks for the tool to run it with (KeeperError: there is none).
        tag: of this keeper; part of the container's name and labels.
        port: of 127.0.0.1, at which it is to be reached.
        cache: directory for what it compiles and keeps; its home directory.
        seccomp_file: where to write the profile.
        gpu_paths: further host paths that engines on a GPU are shown, writable.
    """

    owned = True

    def __init__(
        self,
        model: ModelConfig,
        tool: Callable[[], Awaitable[ContainerTool]],
        *,
        tag: str,
        port: int,
        cache: Path,
        seccomp_file: Path,
        gpu_paths: tuple[Path, ...] = (),
    ) -> None:
        self._model = model
        self._find_tool = tool
        self._tag = tag
        self._port = port
        self._cache = cache
        self._seccomp_file = seccomp_file
        self._gpu_paths = gpu_paths
        self.name = f"swapserve-{tag}-{sandbox.slug(model.name)}"

    async def launch(self, phases: Phases) -> Launched:
        """Run a new container; see `Launcher.launch`."""
        try:
            with phases.phase("container"):
                tool = await self._find_tool()
                await self._make_room(tool)
                await asyncio.to_thread(self._prepare)
                return await self._run(tool)
        except (KeeperError, OSError) as error:
            raise self._start_failed(str(error)) from error

    async def find(self, known: ProcessRef | None) -> Launched | None:
        """Return the container of an earlier keeper, if its first process is still the same."""
        state = await self._ours(await self._find_tool())
        if state is None or not state.running:
            return None
        try:
            launched = await asyncio.to_thread(self._launched, state)
        except ProcessLookupError:
            return None
        return launched if known in {None, launched.root} else None

    async def end(self, grace_s: float) -> None:
        """Stop and remove the container; see `Launcher.end`."""
        tool = await self._find_tool()
        state = await self._ours(tool)
        if state is None:
            return
        await take_away(tool, state, grace_s)
        if await self._ours(tool) is not None:
            raise KeeperError(f"{tool.kind} has not removed the container {self.name}")

    async def pause(self, on: bool) -> bool:
        """Freeze or thaw it by the runtime; see `Launcher.pause`."""
        tool = await self._find_tool()
        state = await self._ours(tool)
        if state is None or not state.running:
            raise KeeperError(f"the container {self.name} does not run")
        if state.paused != on:
            await tool.pause(state.id, on)
        return True

    async def log_tail(self, lines: int) -> str:
        """Return the last lines that the runtime keeps of its output."""
        try:
            tool = await self._find_tool()
            state = await self._ours(tool)
            return "" if state is None else await tool.logs(state.id, lines)
        except KeeperError as error:
            log.warning("event=no_log engine=%s error=%s", self._model.name, error)
            return ""

    async def exit_status(self) -> str:
        """Return how it ended, as far as the runtime knows."""
        try:
            state = await self._ours(await self._find_tool())
        except KeeperError as error:
            log.warning("event=no_exit_status engine=%s error=%s", self._model.name, error)
            return "unknown"
        if state is None or state.running:
            return "unknown"
        return _ended(state)

    def spec(self) -> ContainerSpec:
        """Return the container that `launch` runs."""
        model = self._model
        assert model.container_image is not None
        inside = model.recipe.port
        env = {"HOME": CACHE_DIR, "XDG_CACHE_HOME": CACHE_DIR}
        if not model.gpus:
            # Images ask for every GPU, and NVIDIA's runtime would grant it
            # (NVIDIA Container Toolkit, "Specialized Configurations").
            env["NVIDIA_VISIBLE_DEVICES"] = "void"
        return ContainerSpec(
            name=self.name,
            labels={TAG_LABEL: self._tag, ENGINE_LABEL: model.name},
            image=model.container_image,
            argv=launch_argv(model, host=_EVERY_ADDRESS, port=inside),
            env=env | launch_env(model, host=_EVERY_ADDRESS, port=inside),
            mounts=mounts(model, self._cache, self._gpu_paths),
            host_port=self._port,
            port=inside,
            gpus=model.gpus,
            shm_bytes=model.recipe.shm_bytes,
            seccomp=self._seccomp_file,
            extra=model.recipe.container_args,
        )

    # ---------------------------------------------------------- the work

    async def _ours(self, tool: ContainerTool) -> ContainerState | None:
        """Return the container of our name, if it is ours."""
        state = await tool.inspect(self.name)
        return state if state is not None and self._is_ours(state.labels) else None

    def _is_ours(self, labels: Mapping[str, str]) -> bool:
        whose = (labels.get(TAG_LABEL), labels.get(ENGINE_LABEL))
        return whose == (self._tag, self._model.name)

    async def _make_room(self, tool: ContainerTool) -> None:
        """Remove what is left of an earlier start; refuse what is not ours, or not there."""
        state = await tool.inspect(self.name)
        if state is not None and not self._is_ours(state.labels):
            raise KeeperError(
                f"{tool.kind} has a container {self.name} already, which SwapServe has not made;"
                f" remove it: `{tool.kind} rm {self.name}`"
            )
        if state is not None:
            log.info("event=removed_container name=%s status=%s", self.name, state.status)
            await self.end(0.0)
        image = self._model.container_image or ""
        if not await tool.has_image(image):
            raise KeeperError(
                f"{tool.kind} has no image {image}; fetch it: `{tool.kind} pull {image}`"
            )

    def _prepare(self) -> None:
        seccomp.write(self._seccomp_file)
        self._cache.mkdir(parents=True, exist_ok=True, mode=0o750)

    async def _run(self, tool: ContainerTool) -> Launched:
        try:
            await tool.run(self.spec())
            state = await self._ours(tool)
            if state is not None and state.running:
                return await asyncio.to_thread(self._launched, state)
            reason = "it ended at once" if state is None else _why(state)
        except CommandError as error:
            reason = error.output_tail
        except ProcessLookupError:
            reason = "it ended at once"
        tail = await self.log_tail(LOG_TAIL_LINES)
        await self._clear_away(tool)
        raise self._start_failed(f"{tool.kind}: {reason}", tail)

    async def _clear_away(self, tool: ContainerTool) -> None:
        try:
            if (state := await self._ours(tool)) is not None:
                await take_away(tool, state, 0.0)
        except KeeperError:  # the next start tries again; the reason of this one counts
            log.exception("event=container_left name=%s", self.name)

    def _launched(self, state: ContainerState) -> Launched:
        root = ProcessRef.of(state.pid)
        return Launched(
            root=root,
            group=own_group(root.pid),
            address=f"127.0.0.1:{self._port}",
            frozen=state.paused or is_frozen(root.pid),
        )

    def _start_failed(self, reason: str, tail: str = "") -> StartFailed:
        return StartFailed(self._model.name, reason, tail)


def mounts(model: ModelConfig, cache: Path, gpu_paths: tuple[Path, ...]) -> tuple[Bind, ...]:
    """Return the host paths that a container is shown, each at its own path but the cache.

    The model's files and the recipe's paths are read-only. A file of a hub's cache is a link to
    another one, which is shown, too.
    """
    shown = sandbox.model_places(model) | set(launch_read_only_paths(model))
    binds = [Bind(source=str(path), target=str(path), read_only=True) for path in sorted(shown)]
    binds.append(Bind(source=str(cache), target=CACHE_DIR, read_only=False))
    if model.gpus:
        binds += [Bind(source=str(one), target=str(one), read_only=False) for one in gpu_paths]
    return tuple(binds)


def _why(state: ContainerState) -> str:
    if state.error:
        return state.error
    return f"it ended at once ({_ended(state)})"


def _ended(state: ContainerState) -> str:
    return f"exit {state.exit_code}{', out of memory' if state.out_of_memory else ''}"


async def take_away(tool: ContainerTool, state: ContainerState, grace_s: float) -> None:
    """End a container, frozen or not, and remove it.

    Raises:
        KeeperError: it may still be there.
    """
    if state.paused:  # podman stops no paused container, docker only after the grace
        await tool.pause(state.id, False)
    if state.running:  # stopped first: podman's `rm --force` waits 10 s for an answer to TERM
        hears = grace_s > 0 and not await asyncio.to_thread(is_frozen, state.pid)
        await tool.stop(state.id, grace_s if hears else 0.0)
    await tool.remove(state.id)


async def sweep(tool: ContainerTool, tag: str, engines: Collection[str]) -> list[str]:
    """Remove a keeper's containers of engines that it no longer has; return these engines.

    Raises:
        KeeperError: some may be left.
    """
    removed = []
    for container in await tool.tagged(tag):
        state = await tool.inspect(container)
        if state is None or state.labels.get(TAG_LABEL) != tag:
            continue
        engine = state.labels.get(ENGINE_LABEL, "")
        if engine not in engines:
            await take_away(tool, state, 0.0)
            removed.append(engine)
    return removed

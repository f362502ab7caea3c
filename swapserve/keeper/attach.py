"""Engines that others have started: found by pid, port or container, frozen, never ended.

Which process is an engine's first one is found out in `roots`. It is known from then on by pid and
start time, so that its end is the end of the attachment, whatever gets its number or port later.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from swapserve.config.check_launch import attach_target
from swapserve.config.schema import ModelConfig
from swapserve.errors import KeeperError, StartFailed
from swapserve.keeper import roots
from swapserve.keeper.launch import Launched, is_frozen, own_group
from swapserve.keeper.phases import Phases
from swapserve.keeper.roots import RefusedError
from swapserve.keeper.runtimes import ContainerState, ContainerTool
from swapserve.system import listeners, process
from swapserve.system.listeners import Listener
from swapserve.system.process import ProcessRef

log = logging.getLogger(__name__)


class AttachedLauncher:
    """One attached engine.

    Args:
        model: with `attach`.
        tools: asks for the container tools that may know a container by name.
        held: first process of every other engine of this keeper, by name.
    """

    owned = False

    def __init__(
        self,
        model: ModelConfig,
        tools: Callable[[], Awaitable[Sequence[ContainerTool]]],
        held: Callable[[], Mapping[str, ProcessRef]],
    ) -> None:
        assert model.attach is not None
        self._model = model
        self._kind, self._which = attach_target(model.attach)
        self._tools = tools
        self._held = held
        self._first: ProcessRef | None = None
        """What `pid:N` meant when it was attached to."""

    async def launch(self, phases: Phases) -> Launched:
        """Find the engine and make sure that it may be frozen.

        Raises:
            StartFailed: it is not there, or is refused, with the reason.
        """
        with phases.phase("attach"):
            try:
                state = await self._container() if self._kind == "container" else None
                launched = await asyncio.to_thread(self._attach, state)
            except (RefusedError, KeeperError) as error:
                raise StartFailed(self._model.name, f"{self._model.attach}: {error}") from error
        if self._kind == "pid":
            self._first = launched.root
        log.info(
            "event=attached engine=%s pid=%d group=%s",
            self._model.name,
            launched.root.pid,
            launched.group.path if launched.group else None,
        )
        return launched

    async def find(self, known: ProcessRef | None) -> Launched | None:
        """Return the engine as an earlier keeper had attached to it."""
        if known is None or not known.alive():
            return None
        state = None
        if self._kind == "container":
            try:
                state = await self._container(running=False)
            except RefusedError as error:
                raise KeeperError(f"{self._model.attach}: {error}") from error
        if self._kind == "pid":
            self._first = known
        try:
            return await asyncio.to_thread(self._launched, known, state)
        except RefusedError as error:
            raise KeeperError(f"{self._model.attach}: {error}") from error

    async def end(self, grace_s: float) -> None:
        """Leave it alone: it is not ours."""

    async def pause(self, on: bool) -> bool:
        """Refuse: a pause by a runtime would look like its operator's own."""
        return False

    async def log_tail(self, lines: int) -> str:
        """Return nothing: its output goes where its operator sent it."""
        return ""

    async def exit_status(self) -> str:
        """Say nothing: only its parent learns how it ended."""
        return "unknown"

    # ------------------------------------------------------------ which one

    async def _container(self, *, running: bool = True) -> ContainerState:
        tools = await self._tools()
        if not tools:
            raise RefusedError("neither podman nor docker answers here")
        found = [
            (tool, state)
            for tool in tools
            if (state := await tool.inspect(self._which)) is not None
        ]
        if not found:
            names = " nor ".join(tool.kind for tool in tools)
            raise RefusedError(f"{names} has a container of that name")
        if len(found) > 1:
            raise RefusedError("podman and docker both have one: set keeper.container_runtime")
        ((tool, state),) = found
        if running and state.paused:
            raise RefusedError(f"it is paused: `{tool.kind} unpause {self._which}`")
        if running and not state.running:
            raise RefusedError(f"it does not run ({state.status})")
        return state

    def _attach(self, state: ContainerState | None) -> Launched:
        """Find the first process and check it (blocks)."""
        listener = None
        if state is not None:
            pid = state.pid
        elif self._kind == "pid":
            pid = int(self._which)
        else:
            pid, listener = roots.listening_on(int(self._which))
        root = roots.identify(pid)
        if self._kind == "pid" and self._first not in {None, root}:
            raise RefusedError("that process has ended, and another one has its number now")
        roots.check(root, self._held())
        launched = self._launched(root, state, listener)
        if launched.frozen:
            raise RefusedError("it is stopped or frozen by somebody else")
        return launched

    def _launched(
        self,
        root: ProcessRef,
        state: ContainerState | None,
        listener: Listener | None = None,
    ) -> Launched:
        address = listener.reached_at if listener else self._address(root.pid, state)
        frozen = is_frozen(root.pid) or (state is not None and state.paused)
        return Launched(root=root, group=own_group(root.pid), address=address, frozen=frozen)

    def _address(self, root: int, state: ContainerState | None) -> str:
        if self._kind == "port":
            port = int(self._which)
        elif self._model.port is not None:
            port = self._model.port
        else:
            return _only_address(root, state)
        there = [one for one in listeners.listening(process.tree(root)) if one.port == port]
        return there[0].reached_at if there else f"127.0.0.1:{port}"


def _only_address(root: int, state: ContainerState | None) -> str:
    """Return the one place where an engine can be reached."""
    if state is not None and state.published:
        places = {f"{_reached(host)}:{port}" for host, port in state.published}
    else:
        found = listeners.listening(process.tree(root))
        ports = {one.port for one in found}
        places = {found[0].reached_at} if len(ports) == 1 else {f"port {p}" for p in ports}
    if len(places) == 1:
        return places.pop()
    many = ", ".join(sorted(places))
    what = f"it listens on more than one port ({many})" if many else "it listens on no TCP port"
    raise RefusedError(f"{what} of this machine; say with `port` where it serves")


def _reached(host: str) -> str:
    bare = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{bare}]" if ":" in bare else bare

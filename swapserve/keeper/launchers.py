"""Which launcher an engine has, by its configuration."""

from collections.abc import Callable, Mapping

from swapserve.errors import KeeperError, StartFailed
from swapserve.keeper.apptainer import ApptainerLauncher
from swapserve.keeper.attach import AttachedLauncher
from swapserve.keeper.containers import ContainerLauncher
from swapserve.keeper.context import Context
from swapserve.keeper.launch import Launched, Launcher
from swapserve.keeper.phases import Phases
from swapserve.keeper.place import Place
from swapserve.keeper.runtimes import ContainerTool, Runtimes
from swapserve.system.process import ProcessRef

SECCOMP_NAME = "seccomp.json"


def launcher_of(
    place: Place,
    context: Context,
    runtimes: Runtimes,
    *,
    port: int,
    held: Callable[[], Mapping[str, ProcessRef]],
) -> Launcher | None:
    """Return an engine's launcher; None for a process of this machine.

    Args:
        place: where it lives.
        context: of the keeper.
        runtimes: what runs containers here.
        port: of 127.0.0.1, for a container.
        held: first process of every other engine, by name.
    """
    model = place.model
    if model.launch == "attached":
        return AttachedLauncher(model, runtimes.tools, held)
    if model.launch == "container":
        return BoxedLauncher(place, context, runtimes, port=port)
    return None


class BoxedLauncher:
    """An engine in a container of whatever runs containers here, found out at its first use."""

    owned = True

    def __init__(self, place: Place, context: Context, runtimes: Runtimes, *, port: int) -> None:
        self._place = place
        self._context = context
        self._runtimes = runtimes
        self._port = port
        self._chosen: ContainerLauncher | ApptainerLauncher | None = None

    async def launch(self, phases: Phases) -> Launched:
        """Start it; see `Launcher.launch`."""
        try:
            chosen = await self._launcher()
        except KeeperError as error:
            raise StartFailed(self._place.model.name, str(error)) from error
        return await chosen.launch(phases)

    async def find(self, known: ProcessRef | None) -> Launched | None:
        """Return what an earlier keeper left; see `Launcher.find`."""
        return await (await self._launcher()).find(known)

    async def end(self, grace_s: float) -> None:
        """End and remove it; see `Launcher.end`."""
        await (await self._launcher()).end(grace_s)

    async def pause(self, on: bool) -> bool:
        """Freeze or thaw it by its runtime; see `Launcher.pause`."""
        return await (await self._launcher()).pause(on)

    async def log_tail(self, lines: int) -> str:
        """Return the last lines of its output; see `Launcher.log_tail`."""
        try:
            return await (await self._launcher()).log_tail(lines)
        except KeeperError:
            return ""

    async def exit_status(self) -> str:
        """Return how it ended; see `Launcher.exit_status`."""
        try:
            return await (await self._launcher()).exit_status()
        except KeeperError:
            return "unknown"

    async def _launcher(self) -> ContainerLauncher | ApptainerLauncher:
        if self._chosen is None:
            found = await self._runtimes.tool()
            if isinstance(found, ContainerTool):
                self._chosen = self._container(found)
            else:
                self._chosen = ApptainerLauncher(
                    self._place.model,
                    found,
                    port=self._port,
                    group=self._place.group,
                    log=self._place.log,
                    cache=self._place.cache,
                    work=self._place.dir / "work",
                    seccomp_file=self._context.config.paths.run_dir / SECCOMP_NAME,
                    gpu_paths=self._context.config.keeper.gpu_paths,
                    log_tail=self._place.log_tail,
                )
        return self._chosen

    def _container(self, tool: ContainerTool) -> ContainerLauncher:
        async def known() -> ContainerTool:
            return tool

        return ContainerLauncher(
            self._place.model,
            known,
            tag=self._context.tag,
            port=self._port,
            cache=self._place.cache,
            seccomp_file=self._context.config.paths.run_dir / SECCOMP_NAME,
            gpu_paths=self._context.config.keeper.gpu_paths,
        )

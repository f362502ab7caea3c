"""podman and docker: their command lines, and what they answer.

Both take the same words but where this file says otherwise. Tried with podman 4.3.1 and with
docker 28.2.2 (daemon 20.10.24); options as in podman-run(1) and Docker's reference of
`docker container run`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swapserve.config.schema import KeeperConfig
from swapserve.errors import CommandError, KeeperError
from swapserve.keeper.sandbox import Bind
from swapserve.system.command import Completed, run
from swapserve.system.tools import find_tool

ToolName = Literal["podman", "docker"]
TOOLS: tuple[ToolName, ...] = ("podman", "docker")

TAG_LABEL = "io.swapserve.keeper"
ENGINE_LABEL = "io.swapserve.engine"
LOG_LIMIT = "32m"
STOP_MARGIN_S = 20.0
"""Beyond the grace: for KILL and for the runtime's own work."""
_LOOK_TIMEOUT_S = 30.0
"""For calls that only ask."""
# No entry, whatever else is wrong. podman says `no such container NAME`, docker capitalises.
_NO_CONTAINER = "no such container"
_NO_IMAGE = ("no such image", "image not known")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """A container to run."""

    name: str
    labels: Mapping[str, str]
    image: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    mounts: tuple[Bind, ...]
    host_port: int
    port: int
    gpus: tuple[str, ...]
    shm_bytes: int
    seccomp: Path
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerState:
    """What a tool says of one container.

    Attributes:
        id: whole identifier; another container may get the name, never this.
        status: `created`, `running`, `paused`, `restarting`, `exited`, `dead` ...
        pid: host pid of its first process, 0 if there is none.
        exit_code: of its last run.
        out_of_memory: whether the kernel killed it for memory.
        error: why it could not be started.
        labels: as given to it.
        published: addresses of this machine that lead to its ports.
    """

    id: str
    status: str
    pid: int
    exit_code: int = 0
    out_of_memory: bool = False
    error: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    published: tuple[tuple[str, int], ...] = ()

    @property
    def running(self) -> bool:
        """Whether it has a process, paused or not."""
        return self.status in {"running", "paused"} and self.pid > 0

    @property
    def paused(self) -> bool:
        """Whether its runtime holds it frozen."""
        return self.status == "paused"


def run_words(kind: ToolName, spec: ContainerSpec) -> list[str]:
    """Return the words after the program that start a container in the background.

    - `--pull=never`: a start must not wait for a download, nor take another image than yesterday.
    - The port is published on loopback alone.
    - No capability, no gain of privileges by exec, the profile of `seccomp`.
    - `--pids-limit=-1`: podman's default of 2048 is less than an engine's threads on a large host.
    - Its log is kept by the tool, bounded; a log driver set for the whole host might not answer.
    """
    words = ["run", "--detach", "--pull=never", f"--name={spec.name}"]
    words += [f"--label={name}={value}" for name, value in spec.labels.items()]
    words += [
        "--restart=no",
        f"--log-driver={'k8s-file' if kind == 'podman' else 'json-file'}",
        f"--log-opt=max-size={LOG_LIMIT}",
        f"--publish=127.0.0.1:{spec.host_port}:{spec.port}",
        "--ipc=private",
        f"--shm-size={spec.shm_bytes}",
        "--pids-limit=-1",
        "--cap-drop=all",
        "--security-opt=no-new-privileges",
        f"--security-opt=seccomp={spec.seccomp}",
    ]
    words += _gpu_words(kind, spec.gpus)
    for mount in spec.mounts:
        read_only = ",readonly" if mount.read_only else ""
        words.append(f"--mount=type=bind,source={mount.source},target={mount.target}{read_only}")
    words += [f"--env={name}={value}" for name, value in spec.env.items()]
    words += spec.extra
    return [*words, f"--entrypoint={spec.argv[0]}", spec.image, *spec.argv[1:]]


def _gpu_words(kind: ToolName, gpus: tuple[str, ...]) -> list[str]:
    if not gpus:
        return []
    if kind == "podman":  # devices of the Container Device Interface, with names by UUID
        return [f"--device=nvidia.com/gpu={uuid}" for uuid in gpus]
    # The value is a line of CSV; quotes keep the list of devices one field (docker/cli
    # opts/gpus.go).
    return [f'--gpus="device={",".join(gpus)}"']


class ContainerTool:
    """One of the two, found on this machine. Each call has a timeout.

    Raises, from every call but `run`: KeeperError, if it failed or said what is not understood;
    then nobody knows what is there.
    """

    def __init__(self, kind: ToolName, program: Path, *, timeout_s: float) -> None:
        self.kind = kind
        self.program = program
        self._timeout_s = timeout_s

    async def answers(self) -> None:
        """Ask for its version (docker: its daemon's).

        Raises:
            KeeperError: why it cannot be used.
        """
        side = "Client" if self.kind == "podman" else "Server"
        await self._ask("version", f"--format={{{{.{side}.Version}}}}")

    async def has_image(self, image: str) -> bool:
        """Whether an image is on this machine."""
        done = await self._ask("image", "inspect", "--format={{.Id}}", image, check=False)
        if done.status == 0:
            return True
        if any(words in done.stderr.lower() for words in _NO_IMAGE):
            return False
        raise self._failed(done)

    async def run(self, spec: ContainerSpec) -> None:
        """Make and start a container.

        Raises:
            CommandError: it failed, or took too long; something of the container may be there.
        """
        await run([str(self.program), *run_words(self.kind, spec)], timeout_s=self._timeout_s)

    async def inspect(self, name: str) -> ContainerState | None:
        """Look at a container; None if there is none of that name or id."""
        done = await self._ask("container", "inspect", name, check=False)
        if done.status != 0:
            if _NO_CONTAINER in done.stderr.lower():
                return None
            raise self._failed(done)
        try:
            (data,) = json.loads(done.stdout)
            return _state(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{self.kind} container inspect said what is no container: {error!r}"
            raise KeeperError(f"{message}: {done.stdout[:200]!r}") from error

    async def stop(self, container: str, grace_s: float) -> None:
        """Ask a container to end, kill it after the grace (rounded up to seconds)."""
        grace = max(0, -int(-grace_s // 1))
        await self._ask("stop", "-t", f"{grace}", container, timeout_s=grace + STOP_MARGIN_S)

    async def remove(self, container: str) -> None:
        """Remove a container, killing it if it runs; harmless if there is none."""
        done = await self._ask("rm", "--force", container, check=False, timeout_s=self._timeout_s)
        if done.status != 0 and _NO_CONTAINER not in done.stderr.lower():
            raise self._failed(done)

    async def pause(self, container: str, on: bool) -> None:
        """Freeze or thaw a container."""
        await self._ask("pause" if on else "unpause", container)

    async def logs(self, container: str, lines: int) -> str:
        """Return the last lines of its output."""
        done = await self._ask("logs", f"--tail={lines}", container)
        # Both streams come back each on its own; engines write to standard error.
        return "\n".join(part.rstrip() for part in (done.stdout, done.stderr) if part.strip())

    async def tagged(self, tag: str) -> list[str]:
        """Return the ids of a keeper's containers, running or not."""
        done = await self._ask(
            "ps", "--all", "--quiet", "--no-trunc", f"--filter=label={TAG_LABEL}={tag}"
        )
        return done.stdout.split()

    async def _ask(
        self, *words: str, check: bool = True, timeout_s: float | None = None
    ) -> Completed:
        argv = [str(self.program), *words]
        if timeout_s is None:
            timeout_s = min(_LOOK_TIMEOUT_S, self._timeout_s)
        try:
            done = await run(argv, timeout_s=timeout_s, check=False)
        except CommandError as error:  # it could not be executed, or did not end
            raise KeeperError(f"{self.kind} {words[0]}: {error.output_tail}") from error
        if check and done.status != 0:
            raise self._failed(done)
        return done

    def _failed(self, done: Completed) -> KeeperError:
        return KeeperError(f"{self.kind} {done.argv[1]} ended with {done.status}: {done.tail}")


def _state(data: dict[str, Any]) -> ContainerState:
    state = data["State"]
    ports = (data.get("NetworkSettings") or {}).get("Ports") or {}
    return ContainerState(
        id=str(data["Id"]),
        status=str(state["Status"]),
        pid=int(state["Pid"]),
        exit_code=int(state.get("ExitCode", 0)),
        out_of_memory=bool(state.get("OOMKilled", False)),
        error=str(state.get("Error") or ""),
        labels=dict((data.get("Config") or {}).get("Labels") or {}),
        published=tuple(
            (str(one["HostIp"] or "127.0.0.1"), int(one["HostPort"]))
            for bound in ports.values()
            for one in bound or ()
            if one.get("HostPort")
        ),
    )


class Runtimes:
    """The container tools of this machine, as the configuration chooses them."""

    def __init__(self, keeper: KeeperConfig) -> None:
        self._keeper = keeper
        self._chosen: ContainerTool | Path | None = None

    async def tool(self) -> ContainerTool | Path:
        """Return what runs containers here: a tool, or the program of apptainer.

        Raises:
            KeeperError: there is none, with the reason for each.
        """
        if self._chosen is None:
            self._chosen = await self._choose()
        return self._chosen

    async def tools(self) -> list[ContainerTool]:
        """Return every tool that may know a container by name, and answers; none is no error."""
        found = []
        for kind in TOOLS:
            if self._keeper.container_runtime in {"auto", kind}:
                try:
                    found.append(await self._tool(kind))
                except KeeperError:
                    continue
        return found

    async def _choose(self) -> ContainerTool | Path:
        reasons = []
        choice = self._keeper.container_runtime
        for kind in TOOLS:
            if choice in {"auto", kind}:
                try:
                    return await self._tool(kind)
                except KeeperError as error:
                    reasons.append(str(error))
        if choice in {"auto", "apptainer"}:
            program = self._program("apptainer")
            if program is not None:
                return program
            reasons.append("no apptainer on PATH")
        raise KeeperError(f"nothing here runs containers: {'; '.join(reasons)}")

    async def _tool(self, kind: ToolName) -> ContainerTool:
        program = self._program(kind)
        if program is None:
            raise KeeperError(f"no {kind} on PATH")
        tool = ContainerTool(kind, program, timeout_s=self._keeper.container_timeout_s)
        await tool.answers()
        return tool

    def _program(self, kind: str) -> Path | None:
        named = self._keeper.container_runtime == kind
        return find_tool(kind, self._keeper.container_program if named else None)

"""Engines in containers: the same tests on the stub and on what really runs here.

The stub (`tests/support/container_runtime.py`) is always there. podman and docker are tested where
they run; tests that need faults, or GPUs, have only the stub.
"""

import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from swapserve.errors import KeeperError, StartFailed
from swapserve.keeper.apptainer import ApptainerLauncher
from swapserve.keeper.attach import AttachedLauncher
from swapserve.keeper.containers import ContainerLauncher, sweep
from swapserve.keeper.context import Context
from swapserve.keeper.launch import Launched
from swapserve.keeper.launchers import launcher_of
from swapserve.keeper.phases import Phases
from swapserve.keeper.place import Place, new_record
from swapserve.keeper.runtimes import ContainerTool, Runtimes
from swapserve.system import host, linux, process
from swapserve.system.cgroup import Cgroup, mount_point
from swapserve.system.process import ProcessRef
from swapserve.system.tools import find_tool
from swapserve.testing.engine import expected_tokens
from tests.support.containers import (
    GPU,
    IMAGE,
    ROOT,
    Ground,
    boxed,
    ground,
    image_directory,
    said,
    started,
    why_not,
)
from tests.support.leaks import wait_for

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for cgroups and namespaces"),
]
HEALTH_TIMEOUT_S = 30.0
REFUSED = """
import ctypes, errno, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def said(name, result):
    print(name, result, errno.errorcode.get(ctypes.get_errno(), ""), flush=True)
said("io_uring", libc.syscall(425, 1, None))
said("unshare", libc.unshare(0x10000000))
said("clone", libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0))
thread = threading.Thread(target=lambda: said("thread", 0))
thread.start()
thread.join()
subprocess.run([sys.executable, "-c", "print('child', flush=True)"])
sys.exit(3)
"""
WAIT = "import time; time.sleep(600)"


@pytest.fixture(
    scope="module",
    params=[
        "stub-podman",
        "stub-docker",
        pytest.param("podman", marks=pytest.mark.containers),
        pytest.param("docker", marks=pytest.mark.containers),
    ],
)
def here(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    name = str(request.param)
    real = not name.startswith("stub-")
    kind = "podman" if name.endswith("podman") else "docker"
    if real and (reason := why_not(kind)):
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp(name)
    with ground("podman" if kind == "podman" else "docker", directory, real=real) as made:
        yield made


@pytest.fixture(params=["podman", "docker"])
def stub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    with ground(request.param, tmp_path, real=False) as made:
        yield made


@asynccontextmanager
async def running(launcher: ContainerLauncher) -> AsyncIterator[Launched]:
    """Start an engine and wait until it answers; afterwards nothing of it is left."""
    try:
        launched = await launcher.launch(Phases())
        await healthy(launched.address)
        yield launched
    finally:
        await launcher.end(0.0)


async def healthy(address: str) -> None:
    async with httpx.AsyncClient() as http:

        async def answered() -> bool:
            return await answers(http, address)

        await until(answered)


async def until(probe: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(HEALTH_TIMEOUT_S):
        while not await probe():  # noqa: ASYNC110 - it is another program that is waited for
            await anyio.sleep(0.05)


async def over(launcher: ContainerLauncher) -> None:
    async def known() -> bool:
        return await launcher.exit_status() != "unknown"

    await until(known)


async def answers(http: httpx.AsyncClient, address: str) -> bool:
    try:
        return (await http.get(f"http://{address}/health", timeout=2)).is_success
    except httpx.TransportError:
        return False


async def text_of(address: str, name: str = "a") -> str:
    body = {"model": name, "prompt": "hello", "max_tokens": 5, "temperature": 0}
    async with httpx.AsyncClient(timeout=20) as http:
        answer = await http.post(f"http://{address}/v1/completions", json=body)
    return str(answer.json()["choices"][0]["text"])


def left(here: Ground, launcher: ContainerLauncher) -> bool:
    """Whether the tool still has a container of that name."""
    return said(str(here.tool.program), "container", "inspect", launcher.name).returncode == 0


async def stranger(here: Ground, launcher: ContainerLauncher, **changes: Any) -> ProcessRef:
    """Run a container of that name that SwapServe has not made."""
    spec = launcher.spec()
    launcher._prepare()
    await here.tool.run(replace(spec, labels={"org.example": "else"}, **changes))
    state = await here.tool.inspect(launcher.name)
    assert state is not None
    return ProcessRef.of(state.pid)


# --------------------------------------------------------------------- a life


async def test_an_engine_lives_in_a_container(here: Ground) -> None:
    launcher = here.launcher()
    async with running(launcher) as launched:
        assert launched.root.alive()
        assert launched.frozen is False
        assert await text_of(launched.address) == "".join(expected_tokens("hello", None, 5))
        assert launched.address.startswith("127.0.0.1:")
        assert (
            Path(f"/proc/{launched.root.pid}/ns/pid").readlink()
            != Path("/proc/self/ns/pid").readlink()
        )
        with anyio.fail_after(25):
            await launcher.end(20.0)
        wait_for("the process has ended", lambda: not launched.root.alive(), 5)
    assert not left(here, launcher)
    await launcher.end(5.0)  # harmless


async def test_it_is_frozen_by_its_own_cgroup(here: Ground) -> None:
    async with running(here.launcher()) as launched, httpx.AsyncClient() as http:
        group = launched.group
        assert group is not None
        assert launched.root.pid in group.pids()
        assert os.getpid() not in group.pids()
        await group.freeze(True, timeout_s=5)
        with pytest.raises(httpx.TimeoutException):
            await http.get(f"http://{launched.address}/health", timeout=0.5)
        await group.freeze(False, timeout_s=5)
        assert await text_of(launched.address) == "".join(expected_tokens("hello", None, 5))


async def test_a_frozen_one_is_ended_at_once(here: Ground) -> None:
    launcher = here.launcher()
    async with running(launcher) as launched:
        assert launched.group is not None
        await launched.group.freeze(True, timeout_s=5)
        with anyio.fail_after(8):  # less than podman's own grace
            await launcher.end(60.0)
        assert not launched.root.alive()
    assert not left(here, launcher)


async def test_it_has_no_rights(here: Ground) -> None:
    async with running(here.launcher()) as launched:
        lines = Path(f"/proc/{launched.root.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        if here.real:
            assert status["Seccomp"] == "2"


async def test_io_uring_and_new_namespaces_are_refused_and_threads_are_not(here: Ground) -> None:
    if not here.real:
        pytest.skip("the stub checks the profile, but has none of its own")
    launcher = here.launcher(argv=[sys.executable, "-c", REFUSED])
    try:
        await launcher.launch(Phases())
        await over(launcher)
        words = await launcher.log_tail(20)
    except StartFailed as failed:  # it had ended when the start looked
        words = failed.log_tail
    finally:
        await launcher.end(0.0)
    assert "io_uring -1 ENOSYS" in words
    assert "unshare -1 EPERM" in words
    assert "clone -1 EPERM" in words
    assert "thread 0" in words
    assert "child" in words


async def test_two_models_have_containers_of_their_own(here: Ground) -> None:
    first, second = here.launcher("a"), here.launcher("b")
    async with running(first) as one, running(second) as other:
        assert one.root != other.root
        assert one.address != other.address
        assert one.group is not None
        assert other.group is not None
        assert one.group.path != other.group.path
        await first.end(5.0)
        assert await text_of(other.address, "b") == "".join(expected_tokens("hello", None, 5))


async def test_its_output_and_its_end_are_told(here: Ground) -> None:
    launcher = here.launcher()
    async with running(launcher) as launched:
        wait_for("it says where it listens", lambda: "8000" in _log(here, launcher), 5)
        assert "8000" in await launcher.log_tail(5)
        assert await launcher.exit_status() == "unknown"
        os.kill(launched.root.pid, signal.SIGKILL)
        wait_for("it has ended", lambda: not launched.root.alive(), 5)
        await over(launcher)
        assert await launcher.exit_status() == "exit 137"
        assert await launcher.find(None) is None
    assert await launcher.log_tail(5) == ""


def _log(here: Ground, launcher: ContainerLauncher) -> str:
    done = said(str(here.tool.program), "logs", "--tail=5", launcher.name)
    return done.stdout + done.stderr


async def test_a_runtime_can_pause_it_and_a_paused_one_is_seen_and_ended(here: Ground) -> None:
    launcher = here.launcher()
    async with running(launcher) as launched, httpx.AsyncClient() as http:
        assert await launcher.pause(True)
        assert await launcher.pause(True)  # as it is
        found = await launcher.find(launched.root)
        assert found is not None
        assert found.frozen
        with pytest.raises(httpx.TimeoutException):
            await http.get(f"http://{launched.address}/health", timeout=0.5)
        assert await launcher.pause(False)
        assert await answers(http, launched.address)
        assert await launcher.pause(True)
        with anyio.fail_after(25):
            await launcher.end(1.0)
        assert not launched.root.alive()
    assert not left(here, launcher)


# ------------------------------------------------------------ whose container


async def test_a_later_keeper_finds_it_by_name_and_labels(here: Ground) -> None:
    async with running(here.launcher()) as launched:
        later = here.launcher()
        for known in (None, launched.root):
            found = await later.find(known)
            assert found is not None
            assert found.root == launched.root
            assert found.frozen is False
        assert await later.find(ProcessRef.of(os.getpid())) is None
        assert await here.launcher(tag="t2").find(None) is None


async def test_a_new_start_replaces_what_an_earlier_keeper_left(here: Ground) -> None:
    async with running(here.launcher()) as old, running(here.launcher()) as new:
        assert not old.root.alive()
        assert new.root.alive()


async def test_a_container_of_somebody_else_with_our_name_is_not_touched(here: Ground) -> None:
    launcher = here.launcher()
    theirs = await stranger(here, launcher)
    try:
        with pytest.raises(StartFailed, match="SwapServe has not made"):
            await launcher.launch(Phases())
        assert await launcher.find(None) is None
        await launcher.end(0.0)
        with pytest.raises(KeeperError, match="does not run"):
            await launcher.pause(True)
        assert theirs.alive()
    finally:
        await here.tool.remove(launcher.name)
    wait_for("it has ended", lambda: not theirs.alive(), 5)


async def test_what_belongs_to_no_engine_is_swept(here: Ground) -> None:
    tag = f"sweep-{os.getpid()}"
    kept, gone, other = (
        here.launcher("kept", tag="sweep"),
        here.launcher("gone", tag="sweep"),
        here.launcher("gone", tag="another"),
    )
    async with running(kept) as one, running(gone) as two, running(other) as three:
        assert await sweep(here.tool, tag, {"kept"}) == ["gone"]
        assert one.root.alive()
        assert not two.root.alive()
        assert three.root.alive()
        assert await sweep(here.tool, tag, {"kept"}) == []


# ------------------------------------------------------------- what cannot start


async def test_an_image_that_is_not_there_is_named(here: Ground) -> None:
    launcher = here.launcher(image="localhost/none:1")
    with pytest.raises(StartFailed, match=f"{here.tool.kind} pull localhost/none:1"):
        await launcher.launch(Phases())
    assert not left(here, launcher)


async def test_a_program_that_is_not_in_the_image_leaves_nothing(here: Ground) -> None:
    launcher = here.launcher(argv=["/usr/bin/no-such-engine"])
    with pytest.raises(StartFailed, match="no-such-engine"):
        await launcher.launch(Phases())
    assert not left(here, launcher)


async def test_a_path_that_is_not_there_leaves_nothing(here: Ground) -> None:
    launcher = here.launcher(read_only_paths=["/no/such/path"])
    with pytest.raises(StartFailed, match="/no/such/path"):
        await launcher.launch(Phases())
    assert not left(here, launcher)


async def test_an_engine_that_ends_at_once_leaves_its_last_words(here: Ground) -> None:
    launcher = here.launcher(argv=[sys.executable, "-c", "import sys; sys.exit('no weights')"])
    try:
        await launcher.launch(Phases())
    except StartFailed as error:  # it had ended when the start looked
        assert "no weights" in error.log_tail  # noqa: PT017
        assert not left(here, launcher)
    else:  # it had not
        await over(launcher)
        assert await launcher.exit_status() == "exit 1"
        assert "no weights" in await launcher.log_tail(5)
    finally:
        await launcher.end(0.0)
    assert not left(here, launcher)


async def test_an_option_that_no_runtime_knows_is_told(here: Ground) -> None:
    launcher = here.launcher(container_args=["--no-such-option"])
    with pytest.raises(StartFailed, match="unknown flag: --no-such-option"):
        await launcher.launch(Phases())
    assert not left(here, launcher)


async def test_a_port_that_is_taken_leaves_nothing(here: Ground) -> None:
    async with running(here.launcher("a")) as first:
        launcher = here.launcher("b")
        launcher._port = int(first.address.rpartition(":")[2])
        with pytest.raises(StartFailed, match=r"port|address already in use"):
            await launcher.launch(Phases())
        assert not left(here, launcher)


# -------------------------------------------------------------- attached to


def attached(here: Ground, name: str, **extra: object) -> AttachedLauncher:
    (config,) = boxed(here.directory, here.tool.kind, IMAGE, "x").models.values()
    model = replace(config, attach=f"container:{name}", **extra)  # type: ignore[arg-type]

    async def tools() -> list[ContainerTool]:
        return [here.tool]

    return AttachedLauncher(model, tools, dict)


async def test_a_container_that_others_run_is_attached_to_by_name(here: Ground) -> None:
    launcher = here.launcher()
    theirs = await stranger(here, launcher)
    try:
        engine = attached(here, launcher.name)
        launched = await engine.launch(Phases())
        assert launched.root == theirs
        await healthy(launched.address)
        assert launched.group is not None
        await launched.group.freeze(True, timeout_s=5)
        found = await attached(here, launcher.name).find(launched.root)
        assert found is not None
        assert (found.root, found.address, found.frozen) == (theirs, launched.address, True)
        with pytest.raises(StartFailed, match="frozen"):
            await attached(here, launcher.name).launch(Phases())
        await launched.group.freeze(False, timeout_s=5)
        await engine.end(0.0)
        assert theirs.alive()
    finally:
        await here.tool.remove(launcher.name)
    assert await engine.find(theirs) is None


async def test_a_container_that_does_not_run_is_not_attached_to(here: Ground) -> None:
    launcher = here.launcher()
    await stranger(here, launcher)
    try:
        await here.tool.pause(launcher.name, True)
        with pytest.raises(StartFailed, match="paused"):
            await attached(here, launcher.name).launch(Phases())
        await here.tool.pause(launcher.name, False)
        await here.tool.stop(launcher.name, 1.0)
        with pytest.raises(StartFailed, match="exited"):
            await attached(here, launcher.name).launch(Phases())
    finally:
        await here.tool.remove(launcher.name)
    with pytest.raises(StartFailed, match="has a container of that name"):
        await attached(here, launcher.name).launch(Phases())


# ------------------------------------------------------- faults, by the stub


def hasty(here: Ground, launcher: ContainerLauncher, timeout_s: float = 1.5) -> None:
    """Let the launcher wait only that long for the runtime."""
    tool = ContainerTool(here.tool.kind, here.tool.program, timeout_s=timeout_s)

    async def impatient() -> ContainerTool:
        return tool

    launcher._find_tool = impatient


@pytest.mark.parametrize("fault", ["hang", "hang_after"])
async def test_a_runtime_that_hangs_in_the_start_leaves_nothing(stub: Ground, fault: str) -> None:
    assert stub.stub is not None
    stub.stub.fault(run=fault)
    launcher = stub.launcher()
    hasty(stub, launcher)
    with anyio.fail_after(15), pytest.raises(StartFailed, match="no end after"):
        await launcher.launch(Phases())
    assert not left(stub, launcher)
    async with running(stub.launcher()):  # the next one works
        pass


@pytest.mark.parametrize("verb", ["image", "container", "run"])
async def test_a_runtime_that_fails_fails_the_start(stub: Ground, verb: str) -> None:
    assert stub.stub is not None
    stub.stub.fault(**{verb: "fail"})
    with pytest.raises(StartFailed, match="Is it running"):
        await stub.launcher().launch(Phases())
    assert stub.stub.containers() == {}


@pytest.mark.parametrize("fault", ["fail", "garbage", "hang"])
async def test_what_a_runtime_does_not_tell_is_not_taken_for_gone(stub: Ground, fault: str) -> None:
    assert stub.stub is not None
    launcher = stub.launcher()
    async with running(launcher) as launched:
        hasty(stub, launcher)
        for call in (launcher.find(launched.root), launcher.end(0.0), launcher.pause(True)):
            stub.stub.fault(container=fault)
            with pytest.raises(KeeperError):
                await call
        stub.stub.fault(container=fault)
        assert await launcher.exit_status() == "unknown"
        assert launched.root.alive()


async def test_a_container_that_cannot_be_removed_is_told(stub: Ground) -> None:
    assert stub.stub is not None
    launcher = stub.launcher()
    async with running(launcher):
        stub.stub.fault(rm="fail")
        with pytest.raises(KeeperError, match="Is it running"):
            await launcher.end(0.0)


async def test_a_log_that_cannot_be_had_is_empty(stub: Ground) -> None:
    assert stub.stub is not None
    launcher = stub.launcher()
    async with running(launcher):
        stub.stub.fault(logs="fail")
        assert await launcher.log_tail(5) == ""


async def test_a_keeper_killed_in_the_start_leaves_one_that_the_next_finds(stub: Ground) -> None:
    assert stub.stub is not None
    stub.stub.fault(run="hang_after")
    launcher = stub.launcher()
    program = f"""
import asyncio
from pathlib import Path
from swapserve.keeper.runtimes import ContainerTool
from tests.integration.test_containers import ground_of
from swapserve.keeper.phases import Phases
launcher = ground_of({stub.tool.kind!r}, {str(stub.directory)!r}, {launcher._tag!r})
asyncio.run(launcher.launch(Phases()))
"""
    keeper = started(sys.executable, "-c", program)
    try:
        wait_for("it runs", lambda: _status(stub, launcher) == "running", 20)
    finally:
        keeper.kill()
        keeper.wait()
    found = await launcher.find(None)
    try:
        assert found is not None
        assert found.root.alive()
        assert found.group is not None
    finally:
        await launcher.end(0.0)


def _status(here: Ground, launcher: ContainerLauncher) -> str | None:
    assert here.stub is not None
    one = here.stub.containers().get(launcher.name)
    return None if one is None else str(one["status"])


def ground_of(kind: str, directory: str, tag: str) -> ContainerLauncher:
    """Return the launcher of a stub that is there already, for a keeper that is killed."""
    program = Path(directory) / "stub" / "bin" / kind
    tool = ContainerTool("podman" if kind == "podman" else "docker", program, timeout_s=60)
    launcher = Ground(tool, Path(directory), None).launcher()
    launcher._tag = tag
    launcher.name = f"swapserve-{tag}-a"
    return launcher


async def test_the_configuration_says_what_runs_the_container(stub: Ground) -> None:
    program = str(stub.tool.program)
    config = boxed(stub.directory, stub.tool.kind, IMAGE, "a", program=program)
    context = Context(config)
    (model,) = config.models.values()
    record = new_record(model, index=None)
    place = Place(model, context, record)
    runtimes = Runtimes(config.keeper)
    made = launcher_of(place, context, runtimes, port=record.port, held=dict)
    assert made is not None
    assert made.owned
    launched = await made.launch(Phases())
    try:
        assert launched.address == place.address
        await healthy(launched.address)
        later = launcher_of(place, context, runtimes, port=record.port, held=dict)
        assert later is not None
        found = await later.find(launched.root)
        assert found is not None
        assert found.root == launched.root
        assert "8000" in await later.log_tail(5)
        assert await later.exit_status() == "unknown"
        assert await later.pause(True)
        assert await later.pause(False)
    finally:
        await made.end(1.0)
    assert not launched.root.alive()


async def test_without_a_runtime_the_start_says_so(stub: Ground) -> None:
    assert stub.stub is not None
    program = str(stub.tool.program)
    config = boxed(stub.directory, stub.tool.kind, IMAGE, "a", program=program)
    context = Context(config)
    (model,) = config.models.values()
    place = Place(model, context, new_record(model, index=None))
    made = launcher_of(place, context, Runtimes(config.keeper), port=1, held=dict)
    assert made is not None
    stub.stub.fault(version="fail fail fail fail")
    with pytest.raises(StartFailed, match=r"nothing here runs containers: .*Is it running"):
        await made.launch(Phases())
    with pytest.raises(KeeperError):
        await made.find(None)
    assert await made.log_tail(5) == ""
    assert await made.exit_status() == "unknown"


# ------------------------------------------------------------------ GPUs


async def test_a_gpu_is_asked_for_by_its_uuid(stub: Ground) -> None:
    assert stub.stub is not None
    launcher = stub.launcher(device="gpu0")
    with pytest.raises(StartFailed, match=r"unresolvable CDI|could not select device driver"):
        await launcher.launch(Phases())
    assert not left(stub, launcher)
    stub.stub.add("gpus", GPU)
    async with running(launcher) as launched:
        environ = Path(f"/proc/{launched.root.pid}/environ").read_bytes().split(b"\0")
        assert f"CUDA_VISIBLE_DEVICES={GPU}".encode() in environ


# ------------------------------------------------------------------- apptainer


@pytest.fixture
def apptainer(tmp_path: Path) -> Iterator[Callable[..., ApptainerLauncher]]:
    """Return what makes launchers for an image that is a directory."""
    if reason := why_not("apptainer"):
        pytest.skip(reason)
    program = find_tool("apptainer")
    assert program is not None
    image = image_directory(tmp_path)
    mount = mount_point()
    group = Cgroup(mount / f"test-apptainer-{os.getpid()}") if mount else None
    if group is not None:
        group.make()
    log = tmp_path / "log" / "engine.log"

    def make(**recipe: Any) -> ApptainerLauncher:
        where = str(recipe.pop("image", image))
        (model,) = boxed(tmp_path, "apptainer", where, "a", **recipe).models.values()
        return ApptainerLauncher(
            model,
            program,
            port=host.free_port(),
            group=group,
            log=log,
            cache=tmp_path / "cache",
            work=tmp_path / "work",
            seccomp_file=tmp_path / "seccomp.json",
            log_tail=lambda _: log.read_text(),
        )

    linux.become_subreaper()  # as the keeper is
    yield make
    process.reap_orphans(set())
    if group is not None:
        wait_for("its group is empty", lambda: not group.pids(), 10)
        group.remove()


@pytest.mark.containers
async def test_an_engine_lives_in_a_container_of_apptainer(
    apptainer: Callable[..., ApptainerLauncher],
) -> None:
    made = apptainer(env={"PYTHONPATH": str(ROOT), "WITH_COMMA": "a,b $HOME"})
    launched = await made.launch(Phases())
    try:
        await healthy(launched.address)
        assert await text_of(launched.address) == "".join(expected_tokens("hello", None, 5))
        assert launched.group is not None
        tree = process.tree(launched.root.pid)
        assert set(tree) <= launched.group.pids()
        engine = tree[-1]
        lines = Path(f"/proc/{engine}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        environ = Path(f"/proc/{engine}/environ").read_bytes().split(b"\0")
        assert b"WITH_COMMA=a,b $HOME" in environ
        assert b"HOME=/cache" in environ
        await launched.group.freeze(True, timeout_s=5)
        found = await made.find(launched.root)
        assert found is not None
        assert (found.root, found.frozen) == (launched.root, True)
        await launched.group.freeze(False, timeout_s=5)
        assert await text_of(launched.address) == "".join(expected_tokens("hello", None, 5))
    finally:
        with anyio.fail_after(15):
            await made.end(10.0)  # TERM is handed on
    assert not launched.root.alive()
    await made.end(1.0)  # harmless
    assert await made.find(launched.root) is None


@pytest.mark.containers
async def test_apptainer_refuses_io_uring_and_no_threads(
    apptainer: Callable[..., ApptainerLauncher],
) -> None:
    made = apptainer(argv=[sys.executable, "-c", REFUSED.replace("sys.exit(3)", WAIT)])
    await made.launch(Phases())

    async def whole() -> bool:
        return "child" in await made.log_tail(20)

    try:
        await until(whole)
        words = await made.log_tail(20)
        assert "io_uring -1 EPERM" in words  # of its own choice
        assert "unshare -1 EPERM" in words
        assert "clone -1 EPERM" in words
        assert "thread 0" in words
    finally:
        await made.end(0.0)


@pytest.mark.containers
async def test_a_frozen_engine_of_apptainer_is_killed(
    apptainer: Callable[..., ApptainerLauncher],
) -> None:
    made = apptainer()
    launched = await made.launch(Phases())
    try:
        await healthy(launched.address)
        assert launched.group is not None
        await launched.group.freeze(True, timeout_s=5)
    finally:
        with anyio.fail_after(8):
            await made.end(60.0)
    wait_for("all of it has ended", lambda: not launched.group or not launched.group.pids(), 5)


@pytest.mark.containers
async def test_an_image_that_apptainer_has_not_is_named(
    apptainer: Callable[..., ApptainerLauncher],
) -> None:
    with pytest.raises(StartFailed, match=r"/no/such\.sif"):
        await apptainer(image="/no/such.sif").launch(Phases())

"""Engines that others have started: found, frozen, never ended. With a real llama-server."""

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from swapserve.config.load import load
from swapserve.config.schema import ModelConfig
from swapserve.errors import StartFailed
from swapserve.ids import EngineName
from swapserve.keeper.attach import AttachedLauncher
from swapserve.keeper.launch import own_group
from swapserve.keeper.phases import Phases
from swapserve.keeper.runtimes import ContainerTool
from swapserve.system import host, process
from swapserve.system.cgroup import Cgroup, mount_point
from swapserve.system.process import ProcessRef
from swapserve.testing.models import cached
from tests.support.daemon import cache_dir, needs_llama
from tests.support.leaks import wait_for
from tests.support.llama_server import llama_server
from tests.support.orphan import orphan

pytestmark = pytest.mark.anyio
NOBODY = 65534
LISTEN = """
import socket, sys, time
sockets = []
for where in sys.argv[1:]:
    address, _, port = where.rpartition("@")
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if ":" in address:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind((address, int(port)))
    made.listen()
    sockets.append(made)
print("ready", flush=True)
time.sleep(600)
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def model(tmp_path: Path, attach: str, port: int | None = None) -> ModelConfig:
    path = tmp_path / "attach.yaml"
    path.write_text(
        'devices: {ram: {memory: 1GiB}}\nmodels: [{name: a, recipe: llamacpp, attach: "pid:1"}]\n'
    )
    return replace(load(path).models[EngineName("a")], attach=attach, port=port)


def launcher(
    tmp_path: Path,
    attach: str,
    port: int | None = None,
    held: Mapping[str, ProcessRef] | None = None,
) -> AttachedLauncher:
    async def no_tools() -> list[ContainerTool]:
        return []

    return AttachedLauncher(model(tmp_path, attach, port), no_tools, lambda: held or {})


async def refused(tmp_path: Path, attach: str, why: str, **extra: object) -> None:
    made = launcher(tmp_path, attach, **extra)  # type: ignore[arg-type]
    with pytest.raises(StartFailed, match=why) as failed:
        await made.launch(Phases())
    assert attach in str(failed.value)


@contextmanager
def listening(tmp_path: Path, *places: str, **how: bool) -> Iterator[ProcessRef]:
    """Run somebody's program that listens at `address@port`s."""
    log = tmp_path / f"log{time.monotonic_ns()}"
    with orphan([sys.executable, "-c", LISTEN, *places], log, **how) as made:
        wait_for("it listens", lambda: "ready" in log.read_text(), 20, log.read_text)
        yield made


def free(count: int = 1) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


# --------------------------------------------------------------- a real engine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ProcessRef, int]]:
    """A llama-server that somebody else has started: its process and its port."""
    weights = cached("gguf", cache_dir() / "models", seed=1, size="tiny")
    port = host.free_port()
    argv = [str(llama_server()), "-m", str(weights), "--host", "127.0.0.1", "--port", str(port),
            "-np", "1", "-t", "1"]  # fmt: skip
    log = tmp_path_factory.mktemp("llama") / "log"
    with orphan(argv, log) as made:
        wait_for("it is healthy", lambda: _healthy(f"127.0.0.1:{port}"), 60, log.read_text)
        yield made, port


def _healthy(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/health", timeout=1).is_success
    except httpx.TransportError:
        return False


class TestLlamaServer:
    pytestmark = needs_llama

    @pytest.mark.parametrize("kind", ["pid", "port"])
    async def test_it_is_attached_to_and_goes_on(
        self, tmp_path: Path, served: tuple[ProcessRef, int], kind: str
    ) -> None:
        root, port = served
        made = launcher(tmp_path, f"{kind}:{root.pid if kind == 'pid' else port}")
        launched = await made.launch(Phases())
        assert launched.root == root
        assert launched.address == f"127.0.0.1:{port}"
        assert launched.frozen is False
        await made.end(0.0)  # it is not ours
        assert await made.pause(True) is False
        assert _healthy(launched.address)

    async def test_a_later_keeper_finds_it_even_frozen(
        self, tmp_path: Path, served: tuple[ProcessRef, int]
    ) -> None:
        root, port = served
        for pid in process.tree(root.pid):
            os.kill(pid, signal.SIGSTOP)
        try:
            wait_for("it is stopped", lambda: process.stopped(root.pid), 5)
            found = await launcher(tmp_path, f"port:{port}").find(root)
            assert found is not None
            assert (found.root, found.frozen) == (root, True)
            assert found.address == f"127.0.0.1:{port}"
            await refused(tmp_path, f"port:{port}", "stopped or frozen")
        finally:
            for pid in process.tree(root.pid):
                os.kill(pid, signal.SIGCONT)
        assert _healthy(f"127.0.0.1:{port}")

    @needs_root
    async def test_one_in_a_cgroup_of_its_own_is_frozen_by_that(
        self, tmp_path: Path, served: tuple[ProcessRef, int]
    ) -> None:
        root, port = served
        with own_cgroup("one") as group:
            group.add(root.pid)
            try:
                launched = await launcher(tmp_path, f"port:{port}").launch(Phases())
                assert launched.group is not None
                assert launched.group.path == group.path
                await launched.group.freeze(True, timeout_s=5)
                await refused(tmp_path, f"port:{port}", "stopped or frozen")
                await launched.group.freeze(False, timeout_s=5)
                assert _healthy(launched.address)
            finally:
                _back(root.pid)


@contextmanager
def own_cgroup(name: str) -> Iterator[Cgroup]:
    mount = mount_point()
    if mount is None:
        pytest.skip("no cgroup v2")
    group = Cgroup(mount / f"test-attach-{os.getpid()}-{name}")
    group.make()
    try:
        yield group
    finally:
        wait_for("the group is empty", lambda: not group.pids(), 10)
        group.remove()


def _back(pid: int) -> None:
    mount = mount_point()
    assert mount is not None
    Cgroup(mount).add(pid)


# ----------------------------------------------------------------- where it is


async def test_one_that_ended_is_not_there_until_another_listens(tmp_path: Path) -> None:
    (port,) = free()
    made = launcher(tmp_path, f"port:{port}")
    with listening(tmp_path, f"127.0.0.1@{port}") as first:
        assert (await made.launch(Phases())).root == first
    with pytest.raises(StartFailed, match="nobody listens there"):
        await made.launch(Phases())
    assert await made.find(first) is None
    with listening(tmp_path, f"127.0.0.1@{port}") as second:
        assert (await made.launch(Phases())).root == second


@pytest.mark.parametrize(
    ("listens", "reached"),
    [("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::1", "[::1]"), ("::", "[::1]")],
)
async def test_the_address_is_where_it_listens(tmp_path: Path, listens: str, reached: str) -> None:
    (port,) = free()
    with listening(tmp_path, f"{listens}@{port}") as root:
        for attach in (f"port:{port}", f"pid:{root.pid}"):
            launched = await launcher(tmp_path, attach).launch(Phases())
            assert launched.root == root
            assert launched.address == f"{reached}:{port}"


async def test_a_pid_with_several_ports_needs_one_named(tmp_path: Path) -> None:
    one, other = free(2)
    with listening(tmp_path, f"127.0.0.1@{one}", f"127.0.0.1@{other}") as root:
        await refused(tmp_path, f"pid:{root.pid}", "more than one port")
        launched = await launcher(tmp_path, f"pid:{root.pid}", port=other).launch(Phases())
        assert launched.address == f"127.0.0.1:{other}"
    with listening(tmp_path) as root:
        await refused(tmp_path, f"pid:{root.pid}", "listens on no TCP port")


# ------------------------------------------------------------ which process


FORKED = """
import os, socket, sys, time
made = socket.socket(); made.bind(("127.0.0.1", int(sys.argv[1]))); made.listen()
for _ in range(2):
    if os.fork() == 0:
        break
print("ready", flush=True)
time.sleep(600)
"""
SPAWNED = """
import multiprocessing, socket, sys, time
def serve(port):
    made = socket.socket(); made.bind(("127.0.0.1", port)); made.listen()
    print("ready", flush=True)
    time.sleep(600)
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=serve, args=(int(sys.argv[1]),))
    worker.start(); worker.join()
"""
UNRELATED = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
time.sleep(600)
"""
REUSED = """
import socket, sys, time
made = socket.socket(); made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
made.bind(("127.0.0.1", int(sys.argv[1]))); made.listen()
print("ready", flush=True)
time.sleep(600)
"""


@contextmanager
def program(tmp_path: Path, text: str, *words: str) -> Iterator[ProcessRef]:
    file, log = tmp_path / f"engine{time.monotonic_ns()}.py", tmp_path / "log"
    file.write_text(text)
    with orphan([sys.executable, str(file), *words], log) as made:
        wait_for("it is ready", lambda: "ready" in log.read_text(), 20, log.read_text)
        yield made


async def test_workers_that_inherit_the_socket_have_their_parent_as_root(tmp_path: Path) -> None:
    (port,) = free()
    with program(tmp_path, FORKED, str(port)) as root:
        assert len(process.tree(root.pid)) == 3
        assert (await launcher(tmp_path, f"port:{port}").launch(Phases())).root == root


async def test_a_worker_of_multiprocessing_has_its_program_as_root(tmp_path: Path) -> None:
    (port,) = free()
    with program(tmp_path, SPAWNED, str(port)) as root:
        assert (await launcher(tmp_path, f"port:{port}").launch(Phases())).root == root


async def test_a_program_that_merely_started_the_engine_is_not_its_root(tmp_path: Path) -> None:
    # A notebook, a test, a script in the same language: freezing it is nobody's wish.
    (port,) = free()
    with program(tmp_path, UNRELATED, LISTEN, f"127.0.0.1@{port}") as starter:
        launched = await launcher(tmp_path, f"port:{port}").launch(Phases())
        assert launched.root != starter
        assert launched.root.pid in process.tree(starter.pid)
        assert launched.group is None or starter.pid not in launched.group.pids()


async def test_a_shell_is_not_its_root(tmp_path: Path) -> None:
    (port,) = free()
    log = tmp_path / "log"
    words = [sys.executable, "-c", LISTEN, f"127.0.0.1@{port}"]
    with orphan(["/bin/sh", "-c", '"$0" "$@"; exit 1', *words], log) as shell:
        wait_for("it listens", lambda: "ready" in log.read_text(), 20, log.read_text)
        launched = await launcher(tmp_path, f"port:{port}").launch(Phases())
        assert process.tree(shell.pid) == [shell.pid, launched.root.pid]


async def test_parent_and_child_of_one_compiled_program_are_one_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine"  # as `ollama serve` and `ollama runner` are one file
    shutil.copy(Path(sys.executable).resolve(), engine)
    monkeypatch.setenv("PYTHONHOME", sys.base_prefix)
    (port,) = free()
    log = tmp_path / "log"
    words = [engine, "-c", UNRELATED.replace("sys.executable", f"{str(engine)!r}"), LISTEN]
    with orphan([*map(str, words), f"127.0.0.1@{port}"], log) as root:
        wait_for("it listens", lambda: "ready" in log.read_text(), 20, log.read_text)
        assert (await launcher(tmp_path, f"port:{port}").launch(Phases())).root == root


@needs_root
async def test_all_of_one_service_is_one_engine(tmp_path: Path) -> None:
    (port,) = free()
    with (
        own_cgroup("llm.service") as group,
        program(tmp_path, UNRELATED, LISTEN, f"127.0.0.1@{port}") as root,
    ):
        for pid in process.tree(root.pid):
            group.add(pid)
        launched = await launcher(tmp_path, f"port:{port}").launch(Phases())
        assert launched.root == root
        assert launched.group is not None
        assert launched.group.path == group.path


@pytest.mark.parametrize("name", ["docker-proxy", "conmon", "rootlessport"])
async def test_the_published_port_of_a_container_says_to_name_the_container(
    tmp_path: Path, name: str
) -> None:
    (port,) = free()
    text = f"open('/proc/self/comm', 'w').write({name!r})\n{REUSED}"
    with program(tmp_path, text, str(port)):
        await refused(tmp_path, f"port:{port}", "container:NAME")


async def test_two_programs_at_one_port_are_refused(tmp_path: Path) -> None:
    (port,) = free()
    with program(tmp_path, REUSED, str(port)) as one:
        (tmp_path / "log").unlink()
        with program(tmp_path, REUSED, str(port)) as other:
            numbers = ", ".join(str(pid) for pid in sorted((one.pid, other.pid)))
            await refused(tmp_path, f"port:{port}", rf"several processes .*{numbers}")


# ---------------------------------------------------------------- refused


async def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    await refused(tmp_path, "pid:1", "first process")
    await refused(tmp_path, f"pid:{os.getpid()}", "SwapServe itself")
    await refused(tmp_path, f"pid:{os.getppid()}", "SwapServe itself|first process")
    await refused(tmp_path, "pid:4194304", "no such process")
    await refused(tmp_path, "container:x", "neither podman nor docker")


@needs_root
async def test_a_thread_of_the_kernel_is_refused(tmp_path: Path) -> None:
    if not Path("/proc/2/exe").is_symlink() or "kthreadd" not in Path("/proc/2/comm").read_text():
        pytest.skip("no kernel threads are seen in this PID namespace")
    await refused(tmp_path, "pid:2", "kernel")


async def test_a_thread_is_refused(tmp_path: Path) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        await refused(tmp_path, f"pid:{thread.native_id}", f"thread of process {os.getpid()}")
    finally:
        stop.set()
        thread.join()


@contextmanager
def child() -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def test_our_own_child_is_refused(tmp_path: Path) -> None:
    with child() as pid:
        await refused(tmp_path, f"pid:{pid}", "started by SwapServe")


async def test_an_engine_that_is_held_already_is_refused(tmp_path: Path) -> None:
    (port,) = free()
    with program(tmp_path, FORKED, str(port)) as root:
        child = ProcessRef.of(process.tree(root.pid)[-1])
        for held in (root, child):
            for pid in (root.pid, child.pid):
                await refused(tmp_path, f"pid:{pid}", "engine of 'other'", held={"other": held})


@pytest.fixture
def as_nobody() -> Iterator[Callable[[], None]]:
    """Become another user for the rest of a test; its threads too."""
    yield lambda: os.seteuid(NOBODY)
    os.seteuid(0)


@needs_root
async def test_an_engine_of_another_user_is_refused_without_rights(
    tmp_path: Path, as_nobody: Callable[[], None]
) -> None:
    (port,) = free()
    with listening(tmp_path, f"127.0.0.1@{port}") as root:
        by_pid = launcher(tmp_path, f"pid:{root.pid}")
        by_port = launcher(tmp_path, f"port:{port}")
        as_nobody()
        try:
            with pytest.raises(StartFailed, match="of user root"):
                await by_pid.launch(Phases())
            with pytest.raises(StartFailed, match="cannot be seen"):
                await by_port.launch(Phases())
        finally:
            os.seteuid(0)


async def test_a_number_that_another_process_has_by_now_is_refused(tmp_path: Path) -> None:
    (port,) = free()
    with listening(tmp_path, f"127.0.0.1@{port}") as root:
        made = launcher(tmp_path, f"pid:{root.pid}")
        made._first = replace(root, start_ticks=root.start_ticks - 1)  # who had it before
        with pytest.raises(StartFailed, match="another one has its number"):
            await made.launch(Phases())
        assert await made.find(made._first) is None


# ------------------------------------------------------------------- cgroups


@needs_root
async def test_a_group_with_a_stranger_in_it_is_not_the_engines_own(tmp_path: Path) -> None:
    first, second = free(2)
    with (
        own_cgroup("shared") as group,
        listening(tmp_path, f"127.0.0.1@{first}") as one,
        listening(tmp_path, f"127.0.0.1@{second}") as other,
    ):
        group.add(one.pid)
        found = own_group(one.pid)
        assert found is not None
        assert found.path == group.path
        group.add(other.pid)
        assert own_group(one.pid) is None
        below = Cgroup(group.path / "below")
        below.make()
        below.add(other.pid)
        assert own_group(one.pid) is None  # freezing it would freeze what is below
        for pid in (one.pid, other.pid):
            _back(pid)
        assert own_group(one.pid) is None

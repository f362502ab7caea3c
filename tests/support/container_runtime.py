"""A stand-in for podman and docker: strict about its arguments, with real processes behind it.

Installed under the name of the tool it stands for (`install`), it takes the words that SwapServe
uses and no others: an unknown option, a missing value or a wrong order ends it with what the real
one says, and the real one's exit status (as podman 4.3.1 and docker 28.2.2 answered). What it keeps
is on disk below its directory. A container is a real process tree: a supervisor that outlives the
call, as conmon and containerd-shim do, its own cgroup, its own network, PID and IPC namespaces
where it may make them, and published ports that really lead inside. It has no file system of its
own: images are names.

Faults: `faults.json` in its directory, `{verb: [kind, ...]}`, each used once. `fail`: an error;
`hang`: no end, nothing done; `hang_after`: done, then no end; `garbage`: done, but says nonsense.
"""

import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swapserve.system import linux
from swapserve.system.cgroup import Cgroup, mount_point
from tests.support.leaks import wait_for

DIRECTORY = "SWAPSERVE_STUB_RUNTIME"
CLONE_NEWIPC = 0x08000000
Flags = dict[str, list[str]]

VALUED = {
    "run": "name label restart log-driver log-opt publish ipc shm-size pids-limit cap-drop"
    " security-opt device mount env entrypoint pull volume",
    "version": "format",
    "image": "format",
    "container": "",
    "stop": "t time",
    "rm": "",
    "pause": "",
    "unpause": "",
    "logs": "tail",
    "ps": "filter",
}
SWITCHES = {"run": "detach", "rm": "force", "ps": "all quiet no-trunc"}


class Fail(Exception):
    """End with a message and a status, as the real tool does."""

    def __init__(self, message: str, status: int, *, out: str = "") -> None:
        self.message = message
        self.status = status
        self.out = out
        super().__init__(message)


@dataclass
class Stub:
    """One call of the tool."""

    kind: str
    directory: Path
    faults: list[str] = field(default_factory=list)

    @property
    def podman(self) -> bool:
        return self.kind == "podman"

    # ------------------------------------------------------------ state

    @contextmanager
    def locked(self) -> Iterator[dict[str, Any]]:
        """Yield all containers by id; what the block changes is kept."""
        path = self.directory / "containers.json"
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            containers = json.loads(path.read_text()) if path.exists() else {}
            yield containers
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(containers))
            temporary.rename(path)

    def find(self, containers: dict[str, Any], name: str) -> dict[str, Any]:
        for one in containers.values():
            if name in {one["name"], one["id"]}:
                found: dict[str, Any] = one
                return found
        if self.podman:
            raise Fail(
                f'Error: no container with name or ID "{name}" found: no such container', 125
            )
        raise Fail(f"Error response from daemon: No such container: {name}", 1)

    def error(self, text: str, status: int = 125) -> Fail:
        if self.podman:
            return Fail(f"Error: {text}", status)
        return Fail(f"docker: Error response from daemon: {text}", status)

    # ---------------------------------------------------------- arguments

    def parse(self, verb: str, words: Sequence[str]) -> tuple[Flags, list[str]]:
        """Split options from what follows the first word that is none."""
        flags: Flags = {}
        words = list(words)
        while words and words[0].startswith("-") and words[0] != "-":
            word = words.pop(0)
            name, equals, value = word.lstrip("-").partition("=")
            long = word.startswith("--")
            if long != (len(name) > 1):
                raise self.unknown(verb, word)
            if name in SWITCHES.get(verb, "").split() and not equals:
                flags.setdefault(name, []).append("")
            elif name in VALUED[verb].split() or (name == "gpus" and not self.podman):
                if not equals:
                    if not words:
                        raise Fail(f"{self.prefix}flag needs an argument: {word}", 125)
                    value = words.pop(0)
                flags.setdefault(name, []).append(value)
            else:
                raise self.unknown(verb, word)
        if verb != "run" and any(word.startswith("-") for word in words):
            raise Fail("the stub wants options before names", 125)
        return flags, words

    @property
    def prefix(self) -> str:
        return "Error: " if self.podman else ""

    def unknown(self, verb: str, word: str) -> Fail:
        name = word.partition("=")[0]
        return Fail(f"{self.prefix}unknown flag: {name}\nSee '{self.kind} {verb} --help'", 125)

    def only_one(self, words: list[str], verb: str) -> str:
        if len(words) != 1:
            raise Fail(f'{self.prefix}"{self.kind} {verb}" requires exactly 1 argument.', 1)
        return words[0]

    # --------------------------------------------------------------- verbs

    def version(self, flags: Flags, words: list[str]) -> str:
        side = "Client" if self.podman else "Server"
        assert not words
        assert flags == {"format": [f"{{{{.{side}.Version}}}}"]}, flags
        return "4.3.1" if self.podman else "28.2.2"

    def image(self, words: Sequence[str]) -> str:
        if words[:1] != ("inspect",) and list(words[:1]) != ["inspect"]:
            raise Fail("the stub knows only image inspect", 125)
        flags, rest = self.parse("image", words[1:])
        name = self.only_one(rest, "image inspect")
        self.need_image(name, out="[]\n")
        assert flags == {"format": ["{{.Id}}"]}, flags
        return "sha256:" + hashlib.sha256(name.encode()).hexdigest()

    def need_image(self, name: str, out: str = "") -> None:
        if name not in (self.directory / "images").read_text().split():
            if self.podman:
                raise Fail(f"Error: inspecting object: {name}: image not known", 125, out=out)
            message = f"Error response from daemon: no such image: {name}: No such image: {name}"
            raise Fail(message, 1 if out else 125, out=out)

    def container(self, words: Sequence[str]) -> str:
        if list(words[:1]) != ["inspect"]:
            raise Fail("the stub knows only container inspect", 125)
        _, rest = self.parse("container", words[1:])
        name = self.only_one(rest, "container inspect")
        with self.locked() as containers:
            try:
                one = self.find(containers, name)
            except Fail as missing:
                missing.out = "[]\n"
                if self.podman:
                    missing.message = f"Error: inspecting object: no such container {name}"
                raise
            return json.dumps([self.described(one)])

    def described(self, one: dict[str, Any]) -> dict[str, Any]:
        paused = one["status"] == "paused"
        running = one["status"] == "running" or (paused and not self.podman)
        port = {"HostIp": "127.0.0.1", "HostPort": str(one["host_port"])}
        return {
            "Id": one["id"],
            "Name": one["name"] if self.podman else f"/{one['name']}",
            "State": {
                "Status": one["status"],
                "Running": running,
                "Paused": paused,
                "OOMKilled": False,
                "Pid": one["pid"],
                "ExitCode": one["exit"],
                "Error": one["error"],
            },
            "Config": {"Labels": one["labels"], "Image": one["image"]},
            "NetworkSettings": {"Ports": {f"{one['port']}/tcp": [port]}},
        }

    def run(self, words: Sequence[str]) -> str:
        flags, rest = self.parse("run", words)
        if not rest:
            raise Fail(f'{self.prefix}"{self.kind} run" requires at least 1 argument.', 125)
        image, command = rest[0], rest[1:]
        check_run(self, flags)
        if flags.get("pull") != ["never"]:
            raise Fail("the stub has no registry", 125)
        self.need_image(image)
        name = flags["name"][0]
        identifier = hashlib.sha256(f"{name}{time.time_ns()}".encode()).hexdigest()
        _, host_port, port = flags["publish"][0].split(":")
        with self.locked() as containers:
            for one in containers.values():
                if one["name"] == name:
                    raise self.taken(name, one["id"])
            containers[identifier] = {
                "id": identifier,
                "name": name,
                "image": image,
                "labels": dict(label.split("=", 1) for label in flags.get("label", ())),
                "env": dict(one.split("=", 1) for one in flags.get("env", ())),
                "argv": [*flags["entrypoint"], *command],
                "flags": flags,
                "words": list(words),
                "status": "created",
                "pid": 0,
                "supervisor": 0,
                "exit": 0,
                "error": "",
                "host_port": int(host_port),
                "port": int(port),
            }
        start(self, identifier)
        return identifier

    def taken(self, name: str, owner: str) -> Fail:
        if self.podman:
            text = f'creating container storage: the container name "{name}" is already in use by'
            return self.error(f"{text} {owner}. that name is already in use")
        text = f'Conflict. The container name "/{name}" is already in use by container "{owner}".'
        return self.error(f"{text} You have to remove (or rename) that container")

    def stop(self, flags: Flags, words: list[str]) -> str:
        name = self.only_one(words, "stop")
        grace = float((flags.get("t") or flags.get("time") or ["10"])[0])
        with self.locked() as containers:
            one = dict(self.find(containers, name))
        if one["status"] == "paused" and self.podman:
            text = f"container {one['id']} is running or paused, refusing to clean up"
            raise self.error(f"{text}: container state improper")
        if one["pid"]:
            self.terminate(one, grace)
            self.kill(one)
        return name

    def terminate(self, one: dict[str, Any], grace: float) -> None:
        if grace > 0:
            with suppress(ProcessLookupError):
                os.kill(one["pid"], signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and Path(f"/proc/{one['pid']}").exists():
            time.sleep(0.02)

    def kill(self, one: dict[str, Any]) -> None:
        group = one.get("group")
        if not (group and Cgroup(Path(group)).kill()):
            with suppress(ProcessLookupError):
                os.kill(one["pid"], signal.SIGKILL)
        wait_for("the container has ended", lambda: self.status(one["id"]) == "exited", 10)

    def status(self, identifier: str) -> str:
        with self.locked() as containers:
            return str(containers.get(identifier, {"status": "exited"})["status"])

    def rm(self, flags: Flags, words: list[str]) -> str:
        name = self.only_one(words, "rm")
        with self.locked() as containers:
            try:
                one = dict(self.find(containers, name))
            except Fail as missing:
                if "force" in flags:
                    missing.status = 0
                raise
        if one["status"] in {"running", "paused"}:
            if "force" not in flags:
                raise self.error(f"cannot remove container {one['id']} as it is running", 2)
            if self.podman and one["status"] == "running":
                self.terminate(one, 10.0)
            self.kill(one)
        with self.locked() as containers:
            containers.pop(one["id"], None)
        if one.get("group"):
            Cgroup(Path(one["group"])).remove()
            Cgroup(Path(one["group"]).parent).remove()
        return name

    def pause(self, _: Flags, words: list[str], *, on: bool = True) -> str:
        name = self.only_one(words, "pause" if on else "unpause")
        with self.locked() as containers:
            one = self.find(containers, name)
            wanted = "running" if on else "paused"
            if one["status"] != wanted:
                if self.podman:
                    what = "is not running, can't pause" if on else "is not paused, can't unpause"
                    raise self.error(f'"{one["id"]}" {what}: container state improper')
                what = "is already paused" if on else "is not paused"
                raise Fail(f"Error response from daemon: Container {one['id']} {what}", 1)
            (Path(one["group"]) / "cgroup.freeze").write_text("1" if on else "0")
            one["status"] = "paused" if on else "running"
        return name

    def logs(self, flags: Flags, words: list[str]) -> str:
        name = self.only_one(words, "logs")
        with self.locked() as containers:
            one = self.find(containers, name)
        lines = (self.directory / f"{one['id']}.log").read_text().splitlines()
        return "\n".join(lines[-int(flags["tail"][0]) :])

    def ps(self, flags: Flags, words: list[str]) -> str:
        assert not words
        assert {"all", "quiet", "no-trunc"} <= set(flags), flags
        (wanted,) = flags["filter"]
        kind, name, value = wanted.split("=")
        assert kind == "label", wanted
        with self.locked() as containers:
            found = [one["id"] for one in containers.values() if one["labels"].get(name) == value]
        return "\n".join(found)


def check_run(stub: Stub, flags: Flags) -> None:
    """Refuse what the real `run` refuses."""
    if "detach" not in flags:
        raise Fail("the stub runs only in the background", 125)
    checks: dict[str, str] = {
        "name": r"[a-zA-Z0-9][a-zA-Z0-9_.-]*",
        "label": r"[a-z.]+=.*",
        "restart": "no|always|on-failure|unless-stopped",
        "log-driver": "k8s-file|journald|none" if stub.podman else "json-file|local|none",
        "log-opt": r"max-size=[0-9]+[kmg]",
        "publish": r"127\.0\.0\.1:[0-9]+:[0-9]+",
        "ipc": "private|host",
        "shm-size": r"[0-9]+[bkmg]?",
        "pids-limit": r"-?[0-9]+",
        "cap-drop": "all|[A-Z_]+",
        "env": r"[A-Za-z_][A-Za-z0-9_]*=(.|\n)*",
        "entrypoint": r"\S.*",
    }
    for name, pattern in checks.items():
        for value in flags.get(name, ()):
            if re.fullmatch(pattern, value) is None:
                raise stub.error(f'invalid argument "{value}" for "--{name}" flag')
    for value in flags.get("security-opt", ()):
        check_security(stub, value)
    for value in flags.get("mount", ()):
        check_mount(stub, value)
    for value in flags.get("device", ()):
        known = (stub.directory / "gpus").read_text().split()
        if value.removeprefix("nvidia.com/gpu=") not in known:
            raise Fail(f"Error: setting up CDI devices: unresolvable CDI devices {value}", 126)
    for value in flags.get("gpus", ()):
        check_gpus(stub, value)


def check_security(stub: Stub, value: str) -> None:
    if value == "no-new-privileges":
        return
    if not value.startswith("seccomp="):
        raise stub.error(f"invalid --security-opt 1: {value!r}")
    try:
        profile = json.loads(Path(value.removeprefix("seccomp=")).read_text())
        assert set(profile) <= {"defaultAction", "architectures", "syscalls"}
        for rule in profile["syscalls"]:
            assert set(rule) <= {"names", "action", "errnoRet", "args"}
            assert rule["names"]
            assert rule["action"].startswith("SCMP_ACT_")
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise stub.error(f"opening seccomp profile failed: {error}") from error


def check_mount(stub: Stub, value: str) -> None:
    fields = dict(one.partition("=")[::2] for one in value.split(","))
    if fields.pop("type") != "bind" or set(fields) - {"source", "target", "readonly"}:
        raise stub.error(f'invalid argument "{value}" for "--mount" flag')
    if not fields["target"].startswith("/") or fields.get("readonly", "") != "":
        raise stub.error(f'invalid argument "{value}" for "--mount" flag')
    if not Path(fields["source"]).exists():
        text = f"statfs {fields['source']}: no such file or directory"
        if not stub.podman:
            text = (
                'invalid mount config for type "bind": bind source path does not exist:'
                f" {fields['source']}"
            )
        raise stub.error(text)


def check_gpus(stub: Stub, value: str) -> None:
    (fields,) = csv.reader([value])
    known = (stub.directory / "gpus").read_text().split()
    devices = [one for text in fields for one in text.removeprefix("device=").split(",")]
    if len(fields) != 1 or not value.startswith('"device=') or set(devices) - set(known):
        raise stub.error('could not select device driver "" with capabilities: [[gpu]]')


# -------------------------------------------------------- the container


def start(stub: Stub, identifier: str) -> None:
    """Start the supervisor, which outlives this call, and wait until it has started the process."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(read_end)
            try:
                supervise(stub, identifier, write_end)
            finally:
                os._exit(0)
        os._exit(0)
    os.close(write_end)
    os.wait()
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    if said != "started":
        with stub.locked() as containers:
            containers[identifier] |= {"error": said, "exit": 127}
        raise stub.error(said, 127)


def supervise(stub: Stub, identifier: str, report: int) -> None:
    """Be the container's supervisor: start its first process, forward ports, note its end."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    with stub.locked() as containers:
        one = dict(containers[identifier])
    group = own_group(stub, identifier)
    child, failure, inside = first_process(stub, one, group, report)
    if not failure:
        try:
            forward(one["host_port"], one["port"], inside)
        except OSError as error:
            failure = f"cannot listen on the TCP port: listen tcp4: {error.strerror}"
            os.kill(child, signal.SIGKILL)
    if failure:
        os.waitpid(child, 0)
        os.write(report, failure.encode())
        return
    with stub.locked() as containers:
        containers[identifier] |= {
            "status": "running",
            "pid": child,
            "supervisor": os.getpid(),
            "group": str(group.path) if group else None,
        }
    os.write(report, b"started")
    os.close(report)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    ended = {"status": "exited", "pid": 0, "exit": code if code >= 0 else 128 - code}
    with stub.locked() as containers:
        if identifier in containers:
            containers[identifier] |= ended


def first_process(
    stub: Stub, one: dict[str, Any], group: Cgroup | None, report: int
) -> tuple[int, str, int | None]:
    """Fork it into its namespaces; return its pid, why it failed, and its network."""
    network, pids = (os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "pid"))
    isolated = os.geteuid() == 0
    if isolated:
        linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWPID | CLONE_NEWIPC)
    failed_read, failed_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(report)
        os.close(failed_read)
        become(stub, one, group, failed_write)
    os.close(failed_write)
    inside = None
    if isolated:
        inside = os.open("/proc/self/ns/net", os.O_RDONLY)
        linux.setns(network, linux.CLONE_NEWNET)
        linux.setns(pids, linux.CLONE_NEWPID)  # else no thread can be started (unshare(2))
    with os.fdopen(failed_read) as pipe:
        return child, pipe.read(), inside


def own_group(stub: Stub, identifier: str) -> Cgroup | None:
    path = group_path(stub)
    if path is None:
        return None
    group = Cgroup(path / identifier)
    group.make()
    return group


def group_path(stub: Stub) -> Path | None:
    mount = mount_point()
    if mount is None or os.geteuid() != 0:
        return None
    return mount / f"stub-{hashlib.sha256(str(stub.directory).encode()).hexdigest()[:8]}"


def become(stub: Stub, one: dict[str, Any], group: Cgroup | None, failures: int) -> None:
    try:
        if group is not None:
            group.enter()
        os.setsid()
        if os.geteuid() == 0:
            loopback_up()
            linux.set_no_new_privs()
            linux.drop_all_capabilities()
        os.set_inheritable(failures, False)
        log = os.open(stub.directory / f"{one['id']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        os.chdir("/")
        os.execvpe(one["argv"][0], one["argv"], {"PATH": path, **one["env"]})
    except OSError as error:
        text = f'exec: "{one["argv"][0]}": {error.strerror}'
        os.write(failures, text.encode())
    os._exit(127)


def loopback_up() -> None:
    """Switch `lo` on in this network namespace (netdevice(7), SIOCSIFFLAGS)."""
    with socket.socket() as any_socket:
        flags = (b"lo".ljust(16, b"\0") + (0x1 | 0x40).to_bytes(2, "little")).ljust(40, b"\0")
        fcntl.ioctl(any_socket, 0x8914, flags)


def forward(host_port: int, port: int, inside: int | None) -> None:
    """Lead connections on 127.0.0.1 to the container's network."""
    if host_port == port and inside is None:
        return
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", host_port))
    listener.listen()

    def serve() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=lead, args=(client, port, inside), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()


def lead(client: socket.socket, port: int, inside: int | None) -> None:
    if inside is not None:
        linux.setns(inside, linux.CLONE_NEWNET)  # of this thread alone
    try:
        engine = socket.create_connection(("127.0.0.1", port))
    except OSError:
        client.close()
        return
    back = threading.Thread(target=copy, args=(engine, client), daemon=True)
    back.start()
    copy(client, engine)
    back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


# ----------------------------------------------------------------- the call


def take_fault(directory: Path, verb: str) -> str | None:
    path = directory / "faults.json"
    with (directory / "faults.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        faults: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
        kind = faults[verb].pop(0) if faults.get(verb) else None
        path.write_text(json.dumps(faults))
    return kind


def answer(stub: Stub, verb: str, words: Sequence[str]) -> str:
    raw: dict[str, Callable[[Sequence[str]], str]] = {
        "run": stub.run,
        "image": stub.image,
        "container": stub.container,
    }
    parsed: dict[str, Callable[[Flags, list[str]], str]] = {
        "version": stub.version,
        "stop": stub.stop,
        "rm": stub.rm,
        "pause": stub.pause,
        "unpause": lambda flags, rest: stub.pause(flags, rest, on=False),
        "logs": stub.logs,
        "ps": stub.ps,
    }
    if verb in raw:
        return raw[verb](words)
    if verb in parsed:
        return parsed[verb](*stub.parse(verb, words))
    raise Fail(f"{stub.prefix}unknown command {verb!r}", 125)


def main(argv: Sequence[str]) -> int:
    stub = Stub(Path(argv[0]).name, Path(os.environ[DIRECTORY]))
    verb, words = (argv[1], argv[2:]) if len(argv) > 1 else ("", [])
    with (stub.directory / "calls").open("a") as calls:
        calls.write(json.dumps(list(argv[1:])) + "\n")
    fault = take_fault(stub.directory, verb)
    if fault == "hang":
        time.sleep(3600)
    if fault == "fail":
        sys.stderr.write(f"{stub.prefix}Cannot connect to the daemon. Is it running?\n")
        return 1
    try:
        said = answer(stub, verb, words)
    except Fail as failure:
        sys.stdout.write(failure.out)
        sys.stderr.write(failure.message + "\n")
        return failure.status
    if fault == "hang_after":
        time.sleep(3600)
    sys.stdout.write(("?" if fault == "garbage" else said) + "\n")
    return 0


# ---------------------------------------------------------------- for tests


@dataclass(frozen=True)
class Installed:
    """A stub in a directory of its own; `program` is what is called."""

    program: Path
    directory: Path

    def fault(self, **kinds: str) -> None:
        """Let the next call of each verb go wrong."""
        path = self.directory / "faults.json"
        path.write_text(json.dumps({verb: kind.split() for verb, kind in kinds.items()}))

    def calls(self) -> list[list[str]]:
        path = self.directory / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def containers(self) -> dict[str, Any]:
        """Return all containers by name."""
        path = self.directory / "containers.json"
        data = json.loads(path.read_text()) if path.exists() else {}
        return {one["name"]: one for one in data.values()}

    def add(self, what: str, *names: str) -> None:
        """Add `images` or `gpus`."""
        with (self.directory / what).open("a") as file:
            file.write("".join(f"{name}\n" for name in names))


@contextmanager
def installed(kind: str, directory: Path, *images: str) -> Iterator[Installed]:
    """Install a stub for `podman` or `docker`; afterwards nothing of its containers is left."""
    directory.mkdir(parents=True)
    for name in ("images", "gpus"):
        (directory / name).touch()
    program = directory / "bin" / kind
    program.parent.mkdir()
    root = Path(__file__).parents[2]
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.path.insert(0, {str(root)!r})\n"
        f"os.environ[{DIRECTORY!r}] = {str(directory)!r}\n"
        "from tests.support.container_runtime import main\nsys.exit(main(sys.argv))\n"
    )
    program.chmod(0o755)
    made = Installed(program, directory)
    made.add("images", *images)
    try:
        yield made
    finally:
        remove_all(made, kind)


def remove_all(made: Installed, kind: str) -> None:
    (made.directory / "faults.json").unlink(missing_ok=True)
    stub = Stub(kind, made.directory)
    for name, one in made.containers().items():
        if one["pid"]:
            stub.kill(one)
        stub.rm({}, [name])
    # Calls that hang, and supervisors on their way out.
    for pid in _with_directory(made.directory):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for("all calls have ended", lambda: not _with_directory(made.directory), 10)
    if (group := group_path(stub)) is not None:
        left = list(group.rglob("cgroup.procs"))
        wait_for("its cgroups are empty", lambda: not any(map(Path.read_text, left)), 10)
        Cgroup(group).remove()
    shutil.rmtree(made.directory)


def _with_directory(directory: Path) -> list[int]:
    """Return the processes of this stub: its directory is in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            program = f"{directory}/bin/".encode()
            if entry.name.isdigit() and program in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found

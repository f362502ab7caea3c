"""The stand-in for NVIDIA's driver: builds `tests/standin/`, sets it up, tells what happened."""

import fcntl
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parents[1] / "standin"
CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache/standin"
FLAGS = (
    *("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"),
    *("-fPIC", "-fvisibility=hidden"),
)
BUILD_TIMEOUT_S = 120.0
SWEEP_TIMEOUT_S = 10.0
MIB = 1 << 20

OPS = ("state", "thread", "lock", "checkpoint", "restore", "unlock", "any", "memory_info")
KINDS = (
    "error",  # refused with `code` before anything is done (304: no privilege)
    "error_after",  # done, and yet answered with `code`
    "failed",  # half done; the process is FAILED from then on
    "timeout",  # lock only: waits as long as it may, then NOT_READY
    "oom",  # restore only: OUT_OF_MEMORY, and bricked for good
    "linger",  # checkpoint only: NVML shows the memory for `seconds` more (0: until it dies)
    "slow",  # takes `seconds` more
    "hang",  # the target's driver thread never comes back; every later call hangs as well
    "hang_before",  # the call hangs, the target never hears of it
    "hang_after",  # it is done, the call never comes back
    "kill_caller",  # the caller dies; the target goes on and does it
    "kill_target",  # the target dies half way
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What kind of machine the stand-in is; `StandIn.set_config` changes it at run time."""

    driver: str
    cuda: int
    uuids: tuple[str, ...]
    memory: tuple[int, ...]
    name: str = "Stand-in GPU"
    names: Mapping[str, str] = field(default_factory=dict)
    mig: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    checkpoint_ns_per_byte: float = 0
    restore_ns_per_byte: float = 0
    call_s: float = 0
    init_s: float = 0
    context_bytes: int = 4 * MIB
    reserved_bytes: int = 2 * MIB
    persistence: bool = False
    nvml_init: int = 0
    foreign: tuple[tuple[str, int, int], ...] = ()
    """Memory of processes that are not ours: UUID, pid, bytes."""
    mps: tuple[tuple[str, int, int], ...] = ()
    """The same, of clients of MPS."""

    def text(self) -> str:
        lines = [
            f"gpu {uuid} {size} {int(uuid in self.mig)} {int(uuid in self.lost)} "
            f"{self.names.get(uuid, self.name)}"
            for uuid, size in zip(self.uuids, self.memory, strict=True)
        ]
        for kind in ("foreign", "mps"):
            for uuid, pid, size in getattr(self, kind):
                lines.append(f"{kind} {self.uuids.index(uuid)} {pid} {size}")
        keys = (
            *("driver", "cuda", "checkpoint_ns_per_byte", "restore_ns_per_byte", "call_s"),
            *("init_s", "context_bytes", "reserved_bytes", "nvml_init"),
        )
        lines += [f"{key} {getattr(self, key)}" for key in keys]
        return "\n".join([*lines, f"persistence {int(self.persistence)}", ""])


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the checkpoint API; `result` None: it did not come back (or has not yet)."""

    op: str
    pid: int
    started: int
    caller: int
    begun: float
    ended: float | None
    before: str
    after: str
    result: int | None
    illegal: str | None
    fault: str


class StandIn:
    """A machine with GPUs that are not there."""

    def __init__(self, directory: Path, libs: Path, config: Config) -> None:
        self.directory = directory
        self.libs = libs
        self.config = config
        for name in ("owners", "alive", "targets"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self.set_config()

    @property
    def uuids(self) -> tuple[str, ...]:
        return self.config.uuids

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to meet the stand-in."""
        return {"LD_LIBRARY_PATH": str(self.libs), "STANDIN_GPU": str(self.directory)}

    @property
    def program(self) -> Path:
        """Return the stand-in for NVIDIA's `cuda-checkpoint`."""
        return self.libs / "cuda-checkpoint"

    def set_config(self, **changes: Any) -> None:
        """Change the machine; holds for the next call of anything."""
        self.config = replace(self.config, **changes)
        new = self.directory / "config.new"
        new.write_text(self.config.text())
        new.replace(self.directory / "config")

    def fault(
        self,
        op: str,
        kind: str,
        *,
        nth: int = 1,
        times: int = 1,
        pid: int = 0,
        code: int = 999,
        seconds: float = 0,
    ) -> None:
        """Let the nth call of `op` from now (of a host pid, if given) go wrong.

        `times` calls from then on are hit, -1 means all of them.
        """
        assert op in OPS, f"no such operation: {op}"
        assert kind in KINDS, f"no such fault: {kind}"
        with self._locked(), (self.directory / "faults").open("a") as file:
            file.write(f"{op} {kind} {nth} {times} {pid} {code} {seconds}\n")

    def clear_faults(self) -> None:
        """Forget the faults that have not struck yet."""
        with self._locked():
            (self.directory / "faults").unlink(missing_ok=True)

    def pending_faults(self) -> list[str]:
        """Return the faults that have not struck yet (or strike for ever)."""
        with self._locked():
            path = self.directory / "faults"
            return path.read_text().splitlines() if path.exists() else []

    def calls(self) -> list[Call]:
        """Return all calls of the checkpoint API so far, in the order of their beginning."""
        lines: dict[str, list[dict[str, Any]]] = {}
        for line in self._jsonl("calls.jsonl"):
            lines.setdefault(line["id"], []).append(line)
        return [_call(of_one) for of_one in lines.values()]

    def illegal(self) -> list[Call]:
        """Return the calls that a correct keeper would never make."""
        return [call for call in self.calls() if call.illegal]

    def hazards(self) -> list[str]:
        """Return what would have been dangerous on a real machine, one JSON line each."""
        self.sweep()
        path = self.directory / "hazards.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def used(self, uuid: str) -> int:
        """Return the bytes in use on a GPU, those of foreign processes included."""
        return self.sweep()[uuid]

    def sweep(self) -> dict[str, int]:
        """Give back what the dead held; return the bytes in use on each GPU."""
        done = subprocess.run(
            [self.libs / "sweep"],
            env=self.env,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=SWEEP_TIMEOUT_S,
        )
        return {uuid: int(used) for uuid, used in map(str.split, done.stdout.splitlines())}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _jsonl(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def standin(
    directory: Path,
    *,
    gpus: Sequence[int] = (256 * MIB,),
    driver: str = "580.95.05",
    cuda: int = 13000,
    ns_per_byte: float = 0,
    api: bool = True,
    **config: Any,
) -> Iterator[StandIn]:
    """Make a machine with GPUs of so many bytes; more settings are `Config`'s fields.

    With `api` False its driver has no checkpoint functions, only the program can checkpoint. The
    directory must be shown at the same path, writable, to processes in other mount namespaces.
    """
    uuids = tuple(f"GPU-5747a11d-6e76-4000-8000-{index:012x}" for index in range(len(gpus)))
    config = {"checkpoint_ns_per_byte": ns_per_byte, "restore_ns_per_byte": ns_per_byte, **config}
    yield StandIn(
        directory,
        libraries(api=api),
        Config(driver=driver, cuda=cuda, uuids=uuids, memory=tuple(gpus), **config),
    )


def two_gpus(directory: Path, **config: Any) -> AbstractContextManager[StandIn]:
    """Make a machine with two GPUs of different sizes."""
    return standin(directory, gpus=[96 * MIB, 64 * MIB], **config)


@cache
def libraries(*, api: bool) -> Path:
    """Build the libraries and programs if these sources were not built before."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    text = b"\0".join(source.read_bytes() for source in sources) + " ".join(FLAGS).encode()
    place = CACHE / f"{hashlib.sha256(text).hexdigest()[:16]}-{'api' if api else 'old'}"
    if place.is_dir():
        return place
    CACHE.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=CACHE))
    stage.chmod(0o755)
    try:
        define = ["-DSTANDIN_API"] if api else []
        for name, words in _products(define).items():
            _compile([*words, "-o", str(stage / name)])
        # Whoever comes second keeps the first one's.
        stage.rename(place)
    except OSError:
        if not place.is_dir():
            raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return place


def _products(define: list[str]) -> dict[str, list[str]]:
    def library(name: str, *sources: str) -> list[str]:
        return ["-shared", f"-Wl,-soname,{name}", *sources]

    driver = library("libcuda.so.1", "world.c", "driver.c", "target.c", "caller.c")
    return {
        "libcuda.so.1": [*define, *driver, "-ldl"],
        "libnvidia-ml.so.1": library("libnvidia-ml.so.1", "world.c", "nvml.c"),
        "cuda-checkpoint": ["cuda_checkpoint.c", "world.c", "-ldl", "-Wl,-rpath,$ORIGIN"],
        "sweep": ["sweep.c", "world.c"],
    }


def _compile(words: list[str]) -> None:
    done = subprocess.run(
        ["gcc", *FLAGS, *words],
        cwd=SOURCES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=BUILD_TIMEOUT_S,
    )
    assert done.returncode == 0, f"gcc {' '.join(words)}:\n{done.stdout}"


def _call(lines: list[dict[str, Any]]) -> Call:
    first, last = lines[0], lines[-1]
    ended = last["event"] == "end"
    return Call(
        op=first["op"],
        pid=first["pid"],
        started=first["started"],
        caller=first["caller"],
        begun=first["time"],
        ended=last["time"] if ended else None,
        before=last["before"],
        after=last["after"],
        result=last["result"],
        illegal=next((line["illegal"] for line in lines if line["illegal"]), None),
        fault=last["fault"],
    )

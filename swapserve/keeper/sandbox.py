"""What each engine's sandbox shows it: the `SandboxSpec` that `sandbox_init` carries out.

Why each part is there (each was tried with real engines and streams in flight):

- own PID namespace: a restored engine gets new host pids, so a pid taken meanwhile cannot block
  a restore, and the engine's first process takes the whole tree with it;
- own mount tree on a directory of ours: a host mount that comes and goes (a user's /run/user/N)
  cannot break a restore, and the engine sees only what it needs, read-only;
- private /dev/shm and /tmp (tmpfs): CRIU stores their content in the image, so one image can be
  restored any number of times and nothing leaks to the host;
- a home directory of its own on disk: what engines compile and cache there (150 MB of vLLM's)
  would otherwise be in every image, and be lost with every cold start;
- stdout and stderr appended to a log opened inside the mount tree: CRIU checks the size of every
  open regular file except append-only ones, and looks up each in the mounts it knows;
- no io_uring: CRIU 4.2 cannot dump it, and asking uvloop by environment did not keep it away;
- no capability left and no_new_privs: CRIU saves and restores both.
"""

import hashlib
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swapserve.config.recipes import launch_argv, launch_env, launch_read_only_paths
from swapserve.config.schema import ModelConfig
from swapserve.system.mounts import mounts_below

CACHE_DIR = "/cache"
LOG_DIR = "/log"
LOG_NAME = "engine.log"
TMPFS = {"/dev/shm": "mode=1777", "/tmp": "mode=1777"}  # noqa: S108 - inside the sandbox
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
_ETC = ("ld.so.cache", "localtime", "nsswitch.conf")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SPLIT_FILE = re.compile(r"-\d{5}-of-\d{5}\.")
_SHALLOW = 2
"""Path parts of `/` and its direct children, which are never shown whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """A host path shown inside."""

    source: str
    target: str
    read_only: bool

    @property
    def key(self) -> str:
        """Name by which CRIU's image refers to it."""
        return "b" + hashlib.sha256(self.target.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """All that `sandbox_init` needs; `root` is None where no sandbox can be (or is wanted)."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    log: str
    root: str | None
    netns: str | None
    cgroups: tuple[str, ...]
    binds: tuple[Bind, ...]
    tmpfs: dict[str, str]
    keeps_rights: bool = False
    """For a program that builds a container itself, and drops its own rights."""

    def as_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return asdict(self)


def slug(name: str) -> str:
    """Return a file name for an engine; different names never share one."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if plain == name:
        return name
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def sandboxed(
    model: ModelConfig,
    *,
    root: Path,
    log_dir: Path,
    cache_dir: Path,
    netns: Path,
    cgroup: Path | None,
    port: int,
    gpu_paths: tuple[Path, ...] = (),
) -> SandboxSpec:
    """Return the spec of an engine in its own namespaces; on GPUs it is shown `gpu_paths`, too."""
    argv = launch_argv(model, host="0.0.0.0", port=port)  # noqa: S104 - in its own network
    return SandboxSpec(
        argv=argv,
        env={**_base_env(), **launch_env(model, host="0.0.0.0", port=port)},  # noqa: S104
        cwd="/",
        log=f"{LOG_DIR}/{LOG_NAME}",
        root=str(root),
        netns=str(netns),
        cgroups=(str(cgroup),) if cgroup else (),
        binds=_binds(model, argv, {LOG_DIR: log_dir, CACHE_DIR: cache_dir}, gpu_paths),
        tmpfs=dict(TMPFS),
    )


def plain(model: ModelConfig, *, log_dir: Path, cgroup: Path | None, port: int) -> SandboxSpec:
    """Return the spec of an engine that shares the host's namespaces (no images possible)."""
    env = {**os.environ, **launch_env(model, host="127.0.0.1", port=port)}
    return SandboxSpec(
        argv=launch_argv(model, host="127.0.0.1", port=port),
        env={name: env[name] for name in env if not name.startswith("SWAPSERVE_")},
        cwd=str(log_dir),
        log=str(log_dir / LOG_NAME),
        root=None,
        netns=None,
        cgroups=(str(cgroup),) if cgroup else (),
        binds=(),
        tmpfs={},
    )


def prepare_root(spec: SandboxSpec) -> None:
    """Make the directory that becomes the engine's `/`; harmless if it is there already.

    Called before a start and before a restore: CRIU mounts into it, and /run is empty after a
    reboot.

    Raises:
        OSError: no room or no right.
    """
    assert spec.root is not None
    root = Path(spec.root)
    for name in ("dev", "etc", "proc", *(target.lstrip("/") for target in spec.tmpfs)):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        host = Path("/", name)
        if host.is_symlink() and not (root / name).is_symlink():
            (root / name).symlink_to(host.readlink())
    for name, target in _LINKS.items():
        if not (root / "dev" / name).is_symlink():
            (root / "dev" / name).symlink_to(target)
    for name in _ETC:
        if Path("/etc", name).exists():
            shutil.copy(Path("/etc", name), root / "etc" / name)
    (root / "etc/passwd").write_text(f"root:x:0:0:root:{CACHE_DIR}:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    for bound in spec.binds:
        place = root / bound.target.lstrip("/")
        if Path(bound.source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()


def model_files(model: ModelConfig) -> list[Path]:
    """Return the model's files, for the fingerprint."""
    if model.model is None:
        return []
    path = Path(model.model)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if _SPLIT_FILE.search(path.name):
        return sorted(path.parent.glob(_SPLIT_FILE.sub("-*-of-*.", path.name)))
    return [path]


def _base_env() -> dict[str, str]:
    return {
        "PATH": _PATH,
        "HOME": CACHE_DIR,
        "XDG_CACHE_HOME": CACHE_DIR,
        # PyTorch's compiler would put its files below TMPDIR.
        "TORCHINDUCTOR_CACHE_DIR": f"{CACHE_DIR}/torchinductor",
        "TMPDIR": "/tmp",  # noqa: S108
        "LANG": "C.UTF-8",
        "USER": "root",
    }


def _binds(
    model: ModelConfig,
    argv: tuple[str, ...],
    writable: dict[str, Path],
    gpu_paths: tuple[Path, ...],
) -> tuple[Bind, ...]:
    shown = {Path("/usr"), Path("/etc/alternatives"), Path("/sys/devices/system")}
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if Path("/", name).is_dir() and not Path("/", name).is_symlink():
            shown.add(Path("/", name))
    shown |= _program_places(Path(argv[0]))
    shown |= {Path(word) for word in model.args if word.startswith("/") and Path(word).exists()}
    shown |= set(launch_read_only_paths(model))
    shown |= model_places(model)
    outermost = {
        path for path in shown if path.exists() and not any(up in shown for up in path.parents)
    }
    binds = [Bind(source=str(path), target=str(path), read_only=True) for path in sorted(outermost)]
    if model.gpus:  # the driver's files may be mounts of their own, which a bind does not show
        below = [str(path) for path in mounts_below(outermost)]
        binds += [Bind(source=path, target=path, read_only=True) for path in below]
    devices = [f"/dev/{name}" for name in _DEVICES]
    if model.gpus:
        devices += [str(path) for path in (*sorted(Path("/dev").glob("nvidia*")), *gpu_paths)]
    binds += [Bind(source=device, target=device, read_only=False) for device in devices]
    binds += [
        Bind(source=str(path), target=target, read_only=False) for target, path in writable.items()
    ]
    return tuple(binds)


def _program_places(program: Path) -> set[Path]:
    """Return the installation each link on the way to the program belongs to.

    A virtual environment's python links to the interpreter it was made from, whose library it
    needs; `X/bin/program` belongs to `X`.
    """
    places = set()
    for _ in range(40):  # the kernel's own limit of links
        home = program.parent.parent if program.parent.name == "bin" else program.parent
        places.add(home if len(home.parts) > _SHALLOW else program.parent)
        if not program.is_symlink():
            break
        program = Path(os.path.normpath(program.parent / program.readlink()))
    return places


def model_places(model: ModelConfig) -> set[Path]:
    """Return the directories and files that the model is in, links followed."""
    if model.model is None:
        return set()
    path = Path(model.model)
    places = {path.parent if _SPLIT_FILE.search(path.name) else path}
    for file in model_files(model):  # a hub's cache links each file to a blob elsewhere
        real = file.resolve()
        if real != file and not any(up in places for up in real.parents):
            places.add(real.parent if path.is_dir() else real)
    return places

"""Container tools to test with: the stub, always; podman, docker and apptainer where they run."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swapserve.config.load import load
from swapserve.config.schema import Config
from swapserve.ids import EngineName
from swapserve.keeper.containers import ContainerLauncher
from swapserve.keeper.runtimes import ContainerTool, ToolName
from swapserve.system import host
from swapserve.system.tools import find_tool
from tests.support.container_runtime import Installed, installed

IMAGE = "localhost/swapserve-test:1"
ROOT = Path(__file__).parents[2]
LINKS = {name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")}
TOOL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ground:
    """A tool, and a directory for what its containers need."""

    tool: ContainerTool
    directory: Path
    stub: Installed | None

    @property
    def real(self) -> bool:
        return self.stub is None

    def config(self, *names: str, **recipe: Any) -> Config:
        """Return a configuration with a model for each name, each in a container."""
        return boxed(self.directory, self.tool.kind, recipe.pop("image", IMAGE), *names, **recipe)

    def launcher(self, name: str = "a", *, tag: str = "t1", **recipe: Any) -> ContainerLauncher:
        config = self.config(name, **recipe)

        async def tool() -> ContainerTool:
            return self.tool

        return ContainerLauncher(
            config.models[EngineName(name)],
            tool,
            tag=f"{tag}-{os.getpid()}",
            port=host.free_port(),
            cache=self.directory / "cache" / name,
            seccomp_file=self.directory / "seccomp.json",
        )


def boxed(
    directory: Path,
    runtime: str,
    image: str,
    *names: str,
    device: str = "",
    program: str = "",
    **recipe: Any,
) -> Config:
    """Return a configuration of small engines that run in containers of an image."""
    recipes = directory / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    shown = [f"--mount=type=bind,source={path},target={path},readonly" for path in _programs()]
    if runtime == "apptainer":
        shown = [f"--bind={path}:{path}:ro" for path in _programs()]
    argv = [sys.executable, "-m", "swapserve.testing.engine", "--host", "{host}", "--port",
            "{port}", "--name", "{name}"]  # fmt: skip
    text = {
        "name": "boxed",
        "adapter": "generic",
        "needs_model": False,
        "argv": argv,
        "image": image,
        "env": {"PYTHONPATH": str(ROOT)},
        "container_args": shown,
        "shm": "64MiB",
        **recipe,
    }
    (recipes / "boxed.yaml").write_text(yaml.safe_dump(text))
    model = {"recipe": "boxed"} | ({"device": device} if device else {})
    whole = {
        "recipe_dirs": [str(recipes)],
        "keeper": {"container_runtime": runtime}
        | ({"container_program": program} if program else {}),
        "paths": {name: str(directory / name) for name in ("state_dir", "image_dir", "run_dir")},
        "devices": {
            "ram": {"memory": "1GiB"},
            "gpu0": {"kind": "gpu", "memory": "1GiB", "uuid": GPU},
        },
        "models": [{"name": name, "device": "ram", **model} for name in names],
    }
    path = directory / "swapserve.yaml"
    path.write_text(yaml.safe_dump(whole))
    return load(path, check_binaries=False)


GPU = "GPU-11111111-1111-1111-1111-111111111111"


def _programs() -> list[Path]:
    """Return what this Python needs of the host."""
    places = {Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), ROOT}
    return sorted(one for one in places if not any(up in places for up in one.parents))


@contextmanager
def ground(kind: ToolName, directory: Path, *, real: bool) -> Iterator[Ground]:
    """Yield a tool that has the image; afterwards the image is gone."""
    if not real:
        with installed(kind, directory / "stub", IMAGE) as stub:
            tool = ContainerTool(kind, stub.program, timeout_s=TOOL_TIMEOUT_S)
            yield Ground(tool, directory, stub)
        return
    program = find_tool(kind)
    assert program is not None
    import_image(program, directory)
    try:
        yield Ground(ContainerTool(kind, program, timeout_s=TOOL_TIMEOUT_S), directory, None)
    finally:
        said(str(program), "rmi", "--force", IMAGE)


def import_image(program: Path, directory: Path) -> None:
    """Make an image with nothing in it but places to mount the host's programs on."""
    file = directory / "image.tar"
    with tarfile.open(file, "w") as tar:
        for name in ("usr", "etc", "tmp", "proc", "sys", "dev", "run", "cache"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        for name, target in LINKS.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        passwd = b"root:x:0:0:root:/cache:/bin/sh\n"
        entry = tarfile.TarInfo("etc/passwd")
        entry.size = len(passwd)
        tar.addfile(entry, io.BytesIO(passwd))
    done = said(str(program), "import", str(file), IMAGE)
    assert done.returncode == 0, done.stderr


def image_directory(directory: Path) -> Path:
    """Return the same image as a directory, for apptainer."""
    image = directory / "image"
    for name in ("usr", "etc", "tmp", "proc", "sys", "dev", "run", "cache"):
        (image / name).mkdir(parents=True)
    for name, target in LINKS.items():
        (image / name).symlink_to(target)
    (image / "etc/passwd").write_text("root:x:0:0:root:/cache:/bin/sh\n")
    for path in _programs():  # an image is read-only: apptainer makes no places in it
        (image / str(path).lstrip("/")).mkdir(parents=True, exist_ok=True)
    return image


def why_not(kind: str) -> str:
    """Return why containers of a tool cannot be tested here; empty if they can."""
    program = find_tool(kind)
    if program is None:
        return f"no {kind} on PATH"
    if os.geteuid() != 0:
        return "needs root, to see the containers' cgroups"
    done = said(str(program), "version" if kind == "apptainer" else "info")
    return "" if done.returncode == 0 else f"{kind}: {' '.join(done.stderr.split())[-200:]}"


def said(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def started(*argv: str) -> subprocess.Popen[bytes]:
    """Start a program in the repository's root."""
    return subprocess.Popen(argv, cwd=ROOT)

"""What leaves the repository: modules that import alone, a whole wheel, nothing of one machine."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.tools import output_of

ROOT = Path(__file__).parents[2]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_imports_alone_and_without_a_warning() -> None:
    modules = sorted((ROOT / "swapserve").rglob("*.py"))
    names = [module_name(path) for path in modules if path.name != "__main__.py"]
    program = str(ROOT / "tests" / "support" / "import_alone.py")
    output_of([sys.executable, "-W", "error", program], stdin="\n".join(names))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built the way an installer builds it: from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    output_of([*hatchling, "-t", "sdist"], cwd=ROOT)
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    [source] = (folder / "source").iterdir()
    output_of([*hatchling, "-t", "wheel"], cwd=source)
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_recipe_byte_for_byte(wheel: zipfile.ZipFile) -> None:
    recipes = sorted((ROOT / "engines").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert wheel.read(f"swapserve/_recipes/{recipe.name}") == recipe.read_bytes()


def test_the_wheel_has_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    assert packed == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "swapserve").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"swapserve"}


def test_nothing_in_the_tree_names_one_machine_or_one_mirror() -> None:
    """Package sources are the user's own settings, and paths are given, never built in."""
    hosts = ("pypi", "pythonhosted", "deb.debian", "security.debian", "ftp.debian", "ghcr")
    word = re.compile(rf"/work{'/'}|https?://[\w.-]*({'|'.join(map(re.escape, hosts))})")
    listed = output_of(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    found = []
    for name in listed.splitlines():
        path = ROOT / name
        if not path.is_file() or path == Path(__file__):
            continue
        lines = path.read_text(errors="replace").splitlines()
        found += [f"{name}:{n}: {text}" for n, text in enumerate(lines, 1) if word.search(text)]
    assert not found, "\n".join(found)

"""The doctor's findings, on small made-up kernels and on this machine."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.schema import Config
from swapserve.system import checks_kernel, checks_setup
from swapserve.system.cgroup import mount_point
from swapserve.system.check import Scope
from swapserve.system.doctor import examine, run_check

ALL = (1 << 41) - 1


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "swapserve.yaml"
    path.write_text(
        """
paths: {state_dir: state, image_dir: images, run_dir: run}
images: {budget: 1MiB, min_free: 1MiB}
devices: {ram: {memory: 1MiB}}
models:
  - {name: a, recipe: generic, params: {binary: /bin/true}, device: ram}
"""
    )
    return load(path)


def kernel_with(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------- kernel


@pytest.mark.parametrize(
    ("release", "status"), [("6.1.0-18-amd64", "ok"), ("5.4.0", "fail"), ("strange", "fail")]
)
def test_an_old_kernel_fails(tmp_path: Path, release: str, status: str) -> None:
    root = kernel_with(tmp_path, {"proc/sys/kernel/osrelease": release})
    assert checks_kernel.kernel(Scope(profile="root", root=root)).status == status


@pytest.mark.parametrize(
    ("held", "profile", "status", "words"),
    [
        (ALL, "root", "ok", "all capabilities"),
        (ALL & ~(1 << 24), "root", "warn", "CAP_SYS_RESOURCE"),
        (ALL & ~(1 << 12), "root", "fail", "CAP_NET_ADMIN (for networks"),
        (0, "unprivileged", "off", "CAP_SYS_ADMIN"),
    ],
)
def test_missing_capabilities_are_named_with_their_use(
    tmp_path: Path, held: int, profile: str, status: str, words: str
) -> None:
    root = kernel_with(tmp_path, {"proc/self/status": f"Name:\tx\nCapEff:\t{held:016x}"})
    assert profile in {"root", "unprivileged"}
    scope = Scope(profile="root" if profile == "root" else "unprivileged", root=root)
    check = checks_kernel.privileges(scope)
    assert check.status == status
    assert words in check.found


@pytest.mark.parametrize(
    ("text", "wanted", "status"),
    [
        ("[always] madvise never", False, "ok"),
        ("always [madvise] never", True, "ok"),
        ("always [madvise] never", False, "warn"),
    ],
)
def test_huge_pages_count_as_on_if_they_are_or_will_be(
    tmp_path: Path, config: Config, text: str, wanted: bool, status: str
) -> None:
    root = kernel_with(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": text})
    config = replace(config, keeper=replace(config.keeper, huge_pages=wanted))
    scope = Scope(profile="root", root=root, config=config)
    assert checks_kernel.huge_pages(scope).status == status


def test_a_kernel_without_network_namespaces_is_named(tmp_path: Path) -> None:
    root = kernel_with(tmp_path, {"proc/self/ns/pid": "", "proc/self/ns/mnt": ""})
    check = checks_kernel.namespaces(Scope(profile="root", root=root))
    assert (check.status, check.found) == ("fail", "the kernel lacks net namespaces")


def test_a_kernel_that_cannot_filter_calls_is_named(tmp_path: Path) -> None:
    root = kernel_with(tmp_path, {"proc/sys/kernel/seccomp/actions_avail": "kill_process allow"})
    assert checks_kernel.io_uring(Scope(profile="root", root=root)).status == "fail"


def test_what_cannot_be_read_is_neither_yes_nor_no(tmp_path: Path) -> None:
    (check,) = run_check(checks_kernel.kernel, Scope(profile="root", root=tmp_path))
    assert check.status == "warn"
    assert check.found.startswith("unknown: ")


def test_looking_at_the_freezer_leaves_no_cgroup_behind() -> None:
    top = mount_point()
    if top is None:
        pytest.skip("no cgroup v2 hierarchy here")
    before = sorted(path.name for path in top.iterdir())
    checks_kernel.freezer(Scope(profile="root"))
    assert sorted(path.name for path in top.iterdir()) == before


# ---------------------------------------------------------------- CRIU


@pytest.fixture
def only_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty private prefix, and nothing on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("SWAPSERVE_PREFIX", str(tmp_path / "prefix"))
    monkeypatch.setattr("swapserve.system.tools._DEFAULT_PREFIX", tmp_path / "prefix")
    return tmp_path / "prefix"


ROOT = Scope(profile="root")


@pytest.mark.usefixtures("only_prefix")
def test_criu_that_is_nowhere_is_a_failure_for_root_and_off_for_others() -> None:
    check = checks_setup.criu(ROOT)
    assert check.status == "fail"
    assert "scripts/host-setup" in check.mend
    assert checks_setup.criu(Scope(profile="unprivileged")).status == "off"


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("[ $1 = check ] && exit 0; echo Version: 4.2.1", "ok", "4.2.1"),
        ("echo Version: 3.17.1", "fail", "3.17.1; 4.0 or newer is needed"),
        ("echo hello", "fail", "of unknown version"),
        ("[ $1 = check ] && { echo no uffd >&2; exit 1; }; echo Version: 4.0", "fail", "no uffd"),
    ],
)
def test_criu_is_judged_by_its_version_and_its_own_check(
    only_prefix: Path, script: str, status: str, words: str
) -> None:
    program(only_prefix / "bin/criu", script)
    check = checks_setup.criu(ROOT)
    assert check.status == status
    assert words in check.found


def test_a_configured_criu_is_the_only_one_looked_at(
    only_prefix: Path, tmp_path: Path, config: Config
) -> None:
    program(only_prefix / "bin/criu", "[ $1 = check ] && exit 0; echo Version: 4.2")
    config = replace(config, keeper=replace(config.keeper, criu=tmp_path / "absent"))
    assert checks_setup.criu(Scope(profile="root", config=config)).status == "fail"


# ---------------------------------------------------------------- room, engines


def test_room_is_judged_against_the_budget(config: Config) -> None:
    scope = Scope(profile="root", config=config)
    assert [check.status for check in checks_setup.disk(scope)] == ["ok", "ok"]
    greedy = replace(config, images=replace(config.images, budget_bytes=1 << 60))
    scope = Scope(profile="root", config=greedy)
    assert next(iter(checks_setup.disk(scope))).status == "warn"
    full = replace(config, images=replace(config.images, min_free_bytes=1 << 60))
    scope = Scope(profile="root", config=full)
    assert next(iter(checks_setup.disk(scope))).status == "fail"
    assert not config.paths.image_dir.exists()


def test_devices_that_promise_more_than_there_is_fail(tmp_path: Path, config: Config) -> None:
    root = kernel_with(
        tmp_path, {"proc/meminfo": "MemTotal:  1024 kB\nMemAvailable:  512 kB\nX: 1"}
    )
    check = checks_setup.memory(Scope(profile="root", root=root, config=config))
    assert check.status == "ok"
    root = kernel_with(tmp_path, {"proc/meminfo": "MemTotal:  1023 kB\nMemAvailable:  512 kB"})
    check = checks_setup.memory(Scope(profile="root", root=root, config=config))
    assert check.status == "fail"


def with_engine(config: Config, adapter: str, path: Path) -> Scope:
    (model,) = config.models.values()
    recipe = replace(model.recipe, adapter=adapter, name=adapter)  # type: ignore[arg-type]
    model = replace(model, recipe=recipe, params={"binary": str(path)})
    return Scope(profile="root", config=replace(config, models={model.name: model}))


@pytest.mark.parametrize(
    ("adapter", "script", "expected"),
    [
        ("llamacpp", "echo version: 7 >&2", "ok: version: 7"),
        ("llamacpp", "echo libggml is missing >&2; exit 1", "fail: libggml is missing"),
        ("vllm", f'exec {sys.executable} "$@"', "fail: it has no package named vllm"),
        ("generic", "exit 1", "ok: engine"),
    ],
)
def test_configured_engines_are_tried(
    tmp_path: Path, config: Config, adapter: str, script: str, expected: str
) -> None:
    engine = program(tmp_path / "engine", script)
    (check,) = checks_setup.engines(with_engine(config, adapter, engine))
    status, _, words = expected.partition(": ")
    assert check.status == status
    assert words in check.found


def test_an_engine_that_is_not_there_fails(tmp_path: Path, config: Config) -> None:
    (check,) = checks_setup.engines(with_engine(config, "llamacpp", tmp_path / "absent"))
    assert check.status == "fail"
    assert "absent" in check.found


# ---------------------------------------------------------------- all of it


def test_every_finding_that_is_not_good_says_what_to_do() -> None:
    checks = examine()
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.found, check
        assert check.why, check
        assert check.status == "ok" or check.mend, check


def test_a_configuration_that_cannot_be_read_is_one_finding_among_others(tmp_path: Path) -> None:
    checks = {check.name: check for check in examine(tmp_path / "absent.yaml")}
    assert checks["configuration"].status == "fail"
    assert "config check" in checks["configuration"].mend
    assert "kernel" in checks


def test_a_missing_engine_does_not_hide_what_else_the_configuration_asks(
    config: Config, tmp_path: Path
) -> None:
    path = config.source
    path.write_text(path.read_text().replace("/bin/true", str(tmp_path / "absent")))
    checks = {check.name: check for check in examine(path)}
    assert checks["configuration"].status == "fail"
    assert checks["engine generic"].status == "fail"
    assert str(tmp_path / "images") in checks["image directory"].found


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to leave it")
def test_without_root_what_needs_root_is_off_and_not_a_failure() -> None:
    os.seteuid(65534)
    try:
        checks = {check.name: check for check in examine()}
    finally:
        os.seteuid(0)
    assert checks["profile"].status == "off"
    assert checks["privileges"].status == "off"
    assert checks["freezer"].status in {"off", "warn"}
    assert checks["criu"].status == "off"

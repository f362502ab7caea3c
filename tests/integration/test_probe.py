"""`swapserve probe` on the stand-in's driver: what it shows, the configuration allows."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swapserve.config.load import load
from swapserve.config.probes import probes_path, read_probes
from swapserve.errors import ConfigError
from swapserve.system.command import Completed, run_sync
from tests.support.gpu_daemon import MIB, GpuSite, gpu_site
from tests.support.keeper import start_keeper
from tests.support.leaks import wait_for

PROBE_TIMEOUT_S = 100.0
TWO = {"ranks": 2, "sandbox": False, "tiers": ["host"], "mechanism": "checkpoint"}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[GpuSite]:
    """An engine on two GPUs, which nobody has shown to be movable."""
    with gpu_site(tmp_path, ["a"], gpus=[128 * MIB, 128 * MIB], model=TWO) as site:
        yield site


def probe(here: GpuSite, name: str = "a", *options: str) -> Completed:
    """Run the command; afterwards there is nothing of what it has used."""
    with tempfile.TemporaryDirectory() as scratch:  # the path of a test would be too long
        done = run_sync(
            [sys.executable, "-m", "swapserve", "--config", str(here.site.config), "probe", name,
             *options],
            timeout_s=PROBE_TIMEOUT_S,
            env={**os.environ, **here.site.env, "TMPDIR": scratch},
            check=False,
        )  # fmt: skip
        assert not list(Path(scratch).iterdir()), done.tail
    assert "Traceback" not in done.stderr
    return done


def kept(here: GpuSite) -> list[Any]:
    return [*read_probes(probes_path(here.site.directory / "state"))]


def test_what_a_probe_has_shown_is_allowed_then(here: GpuSite) -> None:
    with pytest.raises(ConfigError, match="has no probe of it"):
        load(here.site.config)
    done = probe(here)
    assert done.status == 0, done.tail
    assert (
        "a: its GPU state can be moved by driver 580.95.05: the same answer 3 times" in done.stdout
    )
    (one,) = kept(here)
    assert (one.works, one.gpus, one.recipe, one.driver) == (True, 2, "cuda", "580.95.05")
    start_keeper(here.site)  # it takes the configuration, and leaves the result where it is
    (model,) = load(here.site.config).models.values()
    assert model.mechanism == "checkpoint"
    assert [call.op for call in here.gpus.calls()].count("checkpoint") >= 6
    assert all(here.gpus.used(uuid) == 0 for uuid in here.gpus.uuids)
    here.check()


def test_what_a_probe_has_shown_not_to_work_stays_refused(here: GpuSite) -> None:
    here.gpus.fault("checkpoint", "failed")
    done = probe(here, "a", "--json")
    assert done.status == 1
    said = json.loads(done.stdout)
    assert said["works"] is False
    assert "checkpoint" in said["found"]
    with pytest.raises(ConfigError, match="a probe has shown that it does not work: "):
        load(here.site.config)
    assert all(here.gpus.used(uuid) == 0 for uuid in here.gpus.uuids)


def test_a_gpu_in_use_by_others_shows_nothing(here: GpuSite) -> None:
    uuid = here.gpus.uuids[0]
    here.gpus.set_config(foreign=((uuid, 1, 120 * MIB),))
    done = probe(here)
    assert done.status == 1
    assert "could not be started" in done.stderr
    assert not kept(here)


@pytest.mark.parametrize("name", ["b", "host"])
def test_only_an_engine_on_gpus_can_be_probed(here: GpuSite, name: str) -> None:
    here.site.configure(
        [*here.site.models, {**here.site.models[0], "name": "host", "device": "host",
                             "mechanism": "auto", "tiers": ["none"]}],
        **here.site.sections,
    )  # fmt: skip
    done = probe(here, name)
    assert done.status == 2
    assert f"'{name}' is not an engine on GPUs" in done.stderr


def test_a_probe_does_not_disturb_a_keeper_that_serves(tmp_path: Path) -> None:
    model = {"sandbox": False, "tiers": ["host"]}
    with gpu_site(tmp_path, ["a"], model=model) as site:
        start_keeper(site.site)
        done = probe(site)
        assert done.status == 1
        assert "stop it first" in done.stderr
        assert not kept(site)


def test_a_machine_without_a_driver_shows_nothing(here: GpuSite) -> None:
    here.gpus.set_config(nvml_init=9)
    done = probe(here)
    assert done.status == 1
    assert (
        "nothing can be shown without a driver: NVIDIA's kernel driver is not loaded" in done.stderr
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose files others must not change")
def test_a_configuration_that_others_could_change_is_not_run(here: GpuSite) -> None:
    here.site.config.chmod(0o666)
    done = probe(here)
    assert done.status == 2
    assert "lets others write" in done.stderr


def test_an_interrupted_probe_takes_everything_with_it(here: GpuSite) -> None:
    here.gpus.set_config(checkpoint_ns_per_byte=20)  # seconds for each half of the engine
    with tempfile.TemporaryDirectory() as scratch:
        here.site.env["TMPDIR"] = scratch
        argv = ("-m", "swapserve", "--config", str(here.site.config), "probe", "a")
        process = here.site.run(*argv, log=here.site.directory / "probe.log")
        wait_for("state moves", lambda: any(one.op == "checkpoint" for one in here.gpus.calls()))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PROBE_TIMEOUT_S) == 1
        assert not list(Path(scratch).iterdir())
    assert not kept(here)
    assert all(here.gpus.used(uuid) == 0 for uuid in here.gpus.uuids)
    assert "Traceback" not in (here.site.directory / "probe.log").read_text()
    here.check()

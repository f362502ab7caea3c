"""The daemon and its scheduler: what is shown of it, what it remembers, whose policy it follows."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.daemon import Daemon, Model, Site, site
from tests.support.keeper import ended

PLUGIN = """
from swapserve.scheduler.policies.recency import Lru

class Mine(Lru):
    name = "mine"
"""


def fake(name: str) -> Model:
    argv = ("-m", "swapserve.testing.engine", "--host", "{host}", "--port", "{port}")
    return {
        "name": name,
        "recipe": "generic",
        "params": {"binary": sys.executable},
        "args": [*argv, "--name", "{name}"],
        "memory": "400MiB",
        "stop_grace": "1s",
        "deadline": "50s",
    }


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    """Two engines of which one fits, moved without rights; `mine` is an installed policy."""
    plugin = tmp_path / "packages"
    info = plugin / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (plugin / "mine.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[swapserve.policies]\nmine = mine:Mine\n")
    paths = [str(plugin), *(path for path in sys.path if path)]
    with site(
        tmp_path / "site",
        [fake("a"), fake("b")],
        env={"PYTHONPATH": os.pathsep.join(paths)},
        keeper={"profile": "unprivileged"},
        scheduling={"policy": "adaptive"},
        server={
            "api_keys": ["plain", {"key": "hush", "name": "nightly", "priority": "batch"}],
        },
    ) as made:
        yield made


def ask(daemon: Daemon, model: str, key: str = "plain", **headers: str) -> httpx.Response:
    return httpx.post(
        daemon.completions,
        json={"model": model, "prompt": "p", "max_tokens": 4, "temperature": 0},
        headers={"Authorization": f"Bearer {key}", **headers},
        timeout=60,
    )


def test_what_was_learnt_is_shown_and_outlives_the_daemon(here: Site) -> None:
    daemon = here.start()
    assert daemon.status().policy == "adaptive"
    for model in ("a", "b", "a"):
        assert ask(daemon, model).status_code == 200
    a = daemon.engine("a").outlook
    assert set(a.queued) == {"urgent", "interactive", "batch"}
    assert set(a.out_s) == set(a.in_s) == {"disk", "none"}
    assert a.wait_s == 0.0
    assert daemon.engine("b").outlook.wait_s > 0.0
    assert a.arrivals_per_s > 0.0
    assert daemon.stop() == 0

    daemon = here.start()
    again = daemon.engine("a").outlook
    assert again.in_s["none"] == pytest.approx(a.in_s["none"])
    assert 0.0 < again.arrivals_per_s < a.arrivals_per_s


def test_a_damaged_memory_is_set_aside_and_the_daemon_serves(here: Site) -> None:
    home = here.directory / "state" / "daemon"
    home.mkdir(parents=True)
    (home / "knowledge.json").write_text('{"saved_at": ')
    daemon = here.start()
    assert ask(daemon, "a").status_code == 200
    assert (home / "knowledge.unreadable").read_text() == '{"saved_at": '
    assert "event=knowledge_unreadable" in here.log.read_text()
    assert daemon.stop() == 0
    assert json.loads((home / "knowledge.json").read_text())["knowledge"]["version"]


def test_keys_have_names_and_priorities_and_are_never_shown(here: Site) -> None:
    daemon = here.start()
    assert ask(daemon, "a", "hush").status_code == 200
    refused = ask(daemon, "a", "hush", **{"x-swapserve-priority": "interactive"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert ask(daemon, "a", **{"x-swapserve-priority": "batch"}).status_code == 200
    told = [
        (one["key"], one["priority"], one["tokens_out"]) for one in daemon.events("request_ended")
    ]
    assert told == [("nightly", "batch", 4.0), ("key-1", "batch", 4.0)]
    metrics = httpx.get(
        f"{daemon.url}/metrics", headers={"Authorization": "Bearer plain"}, timeout=10
    ).text
    assert 'swapserve_generation_tokens_total{engine="a",priority="batch"} 8' in metrics
    assert 'swapserve_scheduling_policy_info{policy="adaptive"} 1' in metrics
    assert daemon.stop() == 0
    kept = (here.directory / "state" / "daemon" / "knowledge.json").read_text()
    assert "nightly" in kept
    left = [path for path in (here.directory / "state").rglob("*") if path.is_file()]
    texts = [metrics, here.log.read_text(), *(path.read_text(errors="replace") for path in left)]
    assert not any("hush" in text for text in texts)


def test_an_installed_policy_is_followed(here: Site) -> None:
    here.configure([fake("a"), fake("b")], **{**here.sections, "scheduling": {"policy": "mine"}})
    daemon = here.start()
    assert daemon.status().policy == "mine"
    for model in ("a", "b"):
        assert ask(daemon, model).status_code == 200


def test_a_policy_that_cannot_be_used_ends_the_daemon_before_anything_begins(here: Site) -> None:
    (here.directory.parent / "packages" / "mine.py").write_text("import no_such_module")
    here.configure([fake("a"), fake("b")], **{**here.sections, "scheduling": {"policy": "mine"}})
    command = (sys.executable, "-m", "swapserve", "--config", str(here.config), "serve")
    said = ended("env", f"PYTHONPATH={here.env['PYTHONPATH']}", *command)
    assert said.returncode == 2
    assert "scheduling.policy" in said.stderr
    assert "no_such_module" in said.stderr
    assert here.keeper_pid() is None

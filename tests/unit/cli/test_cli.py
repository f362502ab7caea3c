"""The command line against a real server."""

import json
import os
import signal
import socket
import subprocess  # noqa: TID251 - the program as a user runs it
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner, Result

from swapserve import __version__
from swapserve.cli import local
from swapserve.cli.main import cli
from swapserve.client.control import Action
from swapserve.config.load import load
from swapserve.config.models import hub_dir
from swapserve.errors import CapacityError
from swapserve.events import Notice
from tests.support.admin_server import Running, ScriptedControl, running, two_engines

CONFIG = """
server: {{port: {port}, admin_keys: [from-the-file]}}
paths: {{state_dir: state, image_dir: images, run_dir: run}}
devices: {{ram: {{memory: 1GiB}}}}
models:
  - name: tiny
    recipe: generic
    params: {{binary: /bin/true}}
    device: ram
"""


@pytest.fixture(autouse=True)
def bare_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration, no variables: nothing of the machine's own is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("swapserve.cli.context.SYSTEM_CONFIG", tmp_path / "absent.yaml")
    for name in ("URL", "ADMIN_KEY", "CONFIG"):
        monkeypatch.delenv(f"SWAPSERVE_{name}", raising=False)


@pytest.fixture
def server() -> Iterator[Running]:
    with running(ScriptedControl()) as started:
        yield started


def call(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, list(args), env=env)


def ask(server: Running, *args: str) -> Result:
    return call("--url", server.url, *args)


# ---------------------------------------------------------------- with a daemon


def test_status_is_a_table(server: Running) -> None:
    result = ask(server, "status")
    assert result.exit_code == 0
    assert "org/model-a" in result.stdout
    assert "unaccounted" not in result.stdout
    assert "unaccounted" in ask(server, "status", "--phases").stdout


@pytest.mark.parametrize("args", [["--json", "status"], ["status", "--json"]])
def test_status_as_json_is_everything(server: Running, args: list[str]) -> None:
    shown = json.loads(ask(server, *args).stdout)
    assert shown == json.loads(json.dumps(two_engines().as_json()))


def test_watching_shows_the_status_again_until_interrupted(server: Running) -> None:
    argv = [sys.executable, "-m", "swapserve", "--url", server.url, "status", "--json"]
    with subprocess.Popen([*argv, "--watch", "0.1"], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        pids = [json.loads(program.stdout.readline())["pid"] for _ in range(3)]
        program.send_signal(signal.SIGINT)
        program.stdout.read()
        assert program.wait(20) == 1
    assert pids == [11, 11, 11]


@pytest.mark.parametrize("action", ["swap-in", "swap-out", "start", "stop", "pin", "unpin"])
def test_each_command_is_carried_out(server: Running, action: Action) -> None:
    result = ask(server, action, "a")
    assert result.exit_code == 0
    assert result.stdout.startswith("org/model-a: ready, tier device; last swap: swap in (golden)")
    assert server.control.asked == [(action.replace("-", "_"), "org/model-a", "wait")]


def test_a_command_need_not_be_waited_for(server: Running) -> None:
    result = ask(server, "stop", "model-b", "--no-wait")
    assert result.stdout == "model-b: swapped_out, tier disk (accepted)\n"
    assert server.control.asked == [("stop", "model-b", "no wait")]


def test_a_command_answers_in_json(server: Running) -> None:
    assert json.loads(ask(server, "pin", "a", "--json").stdout)["name"] == "org/model-a"


def test_logs_are_printed(server: Running) -> None:
    assert ask(server, "logs", "model-b", "-n", "2").stdout == "model-b line 0\nmodel-b line 1\n"
    shown = json.loads(ask(server, "logs", "model-b", "-n", "1", "--json").stdout)
    assert shown == {"model": "model-b", "lines": ["model-b line 0"]}


def test_kept_events_are_printed(server: Running) -> None:
    server.publish(Notice(at=5.0, engine=None, message="an image was dropped"))
    assert ask(server, "events").stdout.endswith(" - an image was dropped\n")
    assert json.loads(ask(server, "events", "--json").stdout)["at"] == 5.0
    assert ask(server, "events", "--since", "60").stdout == ""


def test_events_are_followed_until_the_daemon_ends(server: Running) -> None:
    server.publish(Notice(at=5.0, engine=None, message="before"))
    argv = [sys.executable, "-m", "swapserve", "--url", server.url, "events", "-f", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert json.loads(program.stdout.readline())["message"] == "before"
        server.publish(Notice(at=6.0, engine=None, message="after"))
        assert json.loads(program.stdout.readline())["message"] == "after"
        server.set(server.control.closing)
        assert program.wait(20) == 0


def test_the_daemon_is_asked_to_end(server: Running) -> None:
    assert ask(server, "shutdown").stdout == f"The daemon at {server.url} is shutting down.\n"
    assert json.loads(ask(server, "shutdown", "--json").stdout) == {"shutting_down": True}
    assert server.control.asked == [("shutdown",)] * 2


# ---------------------------------------------------------------- which daemon


def test_url_and_key_come_from_variables() -> None:
    with running(ScriptedControl(), admin_keys=["k"]) as server:
        env = {"SWAPSERVE_URL": server.url, "SWAPSERVE_ADMIN_KEY": "k"}
        assert call("status", env=env).exit_code == 0
        assert call("status", env={"SWAPSERVE_URL": server.url}).exit_code == 1


@pytest.mark.parametrize("how", ["option", "variable", "found"])
def test_url_and_key_come_from_the_configuration(tmp_path: Path, how: str) -> None:
    with running(ScriptedControl(), admin_keys=["from-the-file"]) as server:
        port = server.url.rpartition(":")[2]
        path = tmp_path / ("swapserve.yaml" if how == "found" else "other.yaml")
        path.write_text(CONFIG.format(port=port))
        args = ["--config", str(path)] if how == "option" else []
        env = {"SWAPSERVE_CONFIG": str(path)} if how == "variable" else {}
        assert call(*args, "status", env=env).exit_code == 0


# ---------------------------------------------------------------- exit status


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_exit_status_1_when_the_daemon_refuses() -> None:
    error = CapacityError("model-b", "ram", 9, 4)
    with running(ScriptedControl(failure=error)) as server:
        result = ask(server, "swap-in", "model-b")
        shown = json.loads(ask(server, "swap-in", "model-b", "--json").stderr)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {error}\n"
    assert result.stdout == ""
    assert shown == {"error": {"code": "capacity", "message": str(error)}}


@pytest.mark.parametrize(
    "args", [["stautus"], ["logs", "a", "-n", "0"], ["swap-in"], ["--config", "absent", "status"]]
)
def test_exit_status_2_for_wrong_usage_or_configuration(args: list[str]) -> None:
    assert call(*args).exit_code == 2


def test_exit_status_3_when_no_daemon_answers() -> None:
    result = call("--url", unused_url(), "status")
    assert result.exit_code == 3
    assert "swapserve --config FILE serve" in result.stderr


def test_the_program_itself_ends_with_that_status(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "swapserve", "--url", unused_url(), "status", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert json.loads(done.stderr)["error"]["code"] == "daemon_unreachable"


# ---------------------------------------------------------------- without a daemon


def test_serve_without_a_configuration_says_where_it_looked() -> None:
    result = call("serve")
    assert result.exit_code == 2
    assert "swapserve.yaml" in result.stderr
    assert "swapserve init" in result.stderr


def test_a_good_configuration_is_said_to_be_good(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(CONFIG.format(port=1))
    result = call("config", "check", "good.yaml")
    assert (result.exit_code, result.stdout) == (
        0,
        "good.yaml is good. Models: tiny. Devices: ram (1.0 GiB).\n",
    )
    shown = json.loads(call("config", "check", "good.yaml", "--json").stdout)
    assert shown == {"ok": True, "problems": [], "models": ["tiny"]}


def test_every_problem_of_a_configuration_is_shown(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        CONFIG.format(port=70000).replace("tiny", "''") + "wrong: 1\n"
    )
    result = call("config", "check", "bad.yaml")
    assert result.exit_code == 2
    for key in ("server.port", "wrong", "name"):
        assert key in result.stderr
    answer = call("config", "check", "bad.yaml", "--json")
    assert answer.exit_code == 2
    shown = json.loads(answer.stdout)
    assert shown["ok"] is False
    assert len(shown["problems"]) >= 3
    assert set(shown["problems"][0]) == {"path", "line", "key", "found", "expected"}


def test_the_schema_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(call("config", "schema").stdout))


def test_init_writes_a_configuration_that_loads_and_never_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "new.yaml"
    assert call("init", "-o", str(target)).exit_code == 0
    text = target.read_text()
    load(target, check_binaries=False)
    again = call("init", "-o", str(target))
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert target.read_text() == text
    assert call("init").stdout == text
    assert json.loads(call("init", "--json").stdout) == {"path": None, "text": text}


def test_the_doctor_reports_each_check_and_fails_for_what_is_asked_in_vain(tmp_path: Path) -> None:
    (tmp_path / "swapserve.yaml").write_text(
        CONFIG.format(port=1).replace("1GiB", "900TiB").replace("/bin/true", "/absent/engine")
    )
    result = call("doctor", "--json")
    assert result.exit_code == 1
    shown = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert shown["configuration"]["status"] == "fail"
    assert {"profile", "kernel", "criu", "freezer", "memory", "gpu"} <= set(shown)
    text = call("doctor")
    assert text.exit_code == 1
    assert "[FAIL] configuration:" in text.stdout
    assert "mend:" in text.stdout


def test_a_model_that_was_pulled_is_found_where_the_configuration_looks(tmp_path: Path) -> None:
    (tmp_path / "swapserve.yaml").write_text(CONFIG.format(port=1))
    place = hub_dir(tmp_path / "state", "org/small")
    place.mkdir(parents=True)
    assert call("pull", "org/small").stdout == f"{place}\n"
    other = tmp_path / "elsewhere"
    other.mkdir()
    result = call("pull", "org/small", "--dest", str(other), "--json")
    assert json.loads(result.stdout) == {"path": str(other)}


def test_the_progress_of_a_download_is_one_line_for_each_percent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = local._progress("org/small")
    for done in (0, 1, 1 << 20, 2 << 20):
        report(done, 2 << 20)
    assert capsys.readouterr().err.splitlines() == [
        "org/small: 0 B of 2.0 MiB, 0 %",
        "org/small: 1.0 MiB of 2.0 MiB, 50 %",
        "org/small: 2.0 MiB of 2.0 MiB, 100 %",
    ]


def test_the_version_is_printed() -> None:
    assert call("version").stdout == f"swapserve {__version__}\n"
    assert json.loads(call("version", "--json").stdout) == {"version": __version__}


def test_light_commands_do_not_load_the_server() -> None:
    code = (
        "import sys; from swapserve.cli.main import cli;"
        "sys.exit(any(m in sys.modules for m in ('aiohttp', 'swapserve.daemon', 'pynvml')))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == 0

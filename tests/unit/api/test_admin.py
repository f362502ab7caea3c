"""The admin API over real sockets."""

import socket
from collections.abc import Generator, Iterator

import httpx
import pytest

from swapserve.api import admin
from swapserve.errors import EngineUnavailable
from swapserve.events import Notice
from swapserve.status import Status
from tests.support.admin_server import Running, ScriptedControl, running


@pytest.fixture
def server() -> Iterator[Running]:
    with running(ScriptedControl()) as started:
        yield started


def get(server: Running, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}/admin/v1/{path}", headers=headers, timeout=20)


def post(server: Running, path: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/admin/v1/{path}", headers=headers, timeout=20)


def test_status_shows_devices_and_engines(server: Running) -> None:
    shown = get(server, "status").json()
    assert [engine["name"] for engine in shown["engines"]] == ["org/model-a", "model-b"]
    assert shown["engines"][0]["state"] == "ready"
    assert shown["engines"][0]["last_swap"]["phases"] == {"restore": 0.7, "probe": 0.1}
    assert shown["devices"][0]["capacity_bytes"] == 4 << 30


@pytest.mark.parametrize("name", ["org%2Fmodel-a", "org/model-a", "a"])
def test_an_engine_is_found_by_name_with_slashes_and_by_alias(server: Running, name: str) -> None:
    assert get(server, f"engines/{name}").json()["name"] == "org/model-a"


def test_an_unknown_engine_is_not_found(server: Running) -> None:
    answer = get(server, "engines/nope")
    assert answer.status_code == 404
    assert "model-b" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("slug", "verb"), sorted(admin.VERBS.items()))
def test_each_command_reaches_the_daemon(server: Running, slug: str, verb: str) -> None:
    answer = post(server, f"engines/org%2Fmodel-a/{slug}")
    assert (answer.status_code, answer.json()["name"]) == (200, "org/model-a")
    assert server.control.asked == [(verb, "org/model-a", "wait")]


def test_a_name_that_ends_like_a_command_is_told_apart_by_encoding() -> None:
    control = ScriptedControl()
    engines = (*control.state.engines,)
    renamed = Status.from_json(
        {**control.state.as_json(), "engines": [{**engines[0].as_json(), "name": "x/stop"}]}
    )
    control.state = renamed
    with running(control) as server:
        assert get(server, "engines/x%2Fstop").json()["name"] == "x/stop"
        assert post(server, "engines/x%2Fstop/stop").status_code == 200
        assert post(server, "engines/x/stop").status_code == 404
    assert control.asked == [("stop", "x/stop", "wait")]


def test_a_command_is_answered_when_it_is_over() -> None:
    control = ScriptedControl()
    control.finish.clear()
    with running(control) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/admin/v1/engines/a/start", timeout=0.2)
        server.set(control.finish)
        assert post(server, "engines/a/start").status_code == 200


def test_without_waiting_a_command_is_accepted_at_once() -> None:
    control = ScriptedControl()
    control.finish.clear()
    with running(control) as server:
        answer = post(server, "engines/a/start?wait=false")
    assert (answer.status_code, answer.json()["name"]) == (202, "org/model-a")
    assert control.asked == [("start", "org/model-a", "no wait")]


def test_a_failed_command_says_why() -> None:
    control = ScriptedControl(failure=EngineUnavailable("org/model-a", "it is on fire"))
    with running(control) as server:
        answer = post(server, "engines/a/swap-in")
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert "on fire" in answer.json()["error"]["message"]


def test_logs_are_plain_text_of_the_lines_asked_for(server: Running) -> None:
    answer = get(server, "engines/model-b/logs?lines=2")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == "model-b line 0\nmodel-b line 1\n"


@pytest.mark.parametrize("query", ["logs?lines=0", "logs?lines=x", "logs?lines=99999999999"])
def test_a_senseless_number_of_lines_is_refused(server: Running, query: str) -> None:
    answer = get(server, f"engines/a/{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_a_senseless_wait_is_refused_and_nothing_done(server: Running) -> None:
    assert post(server, "engines/a/stop?wait=maybe").status_code == 400
    assert server.control.asked == []


def test_shutdown_is_accepted(server: Running) -> None:
    assert post(server, "shutdown").status_code == 202
    assert server.control.asked == [("shutdown",)]


# ---------------------------------------------------------------- events


def notice(at: float) -> Notice:
    return Notice(at=at, engine=None, message=f"at {at}")


def stream_lines(server: Running, query: str = "", **headers: str) -> Generator[str, None, None]:
    url = f"{server.url}/admin/v1/events{query}"
    with httpx.stream("GET", url, headers=headers, timeout=20) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        yield from answer.iter_lines()


def test_events_are_streamed_as_they_happen(server: Running) -> None:
    lines = stream_lines(server)
    assert next(lines) == ": heartbeat"  # sent after the subscription
    server.publish(notice(5.0))
    frame = [line for line in (next(lines) for _ in range(4)) if line]
    assert frame == [
        "id: 5.0",
        "event: notice",
        'data: {"event":"notice","at":5.0,"engine":null,"message":"at 5.0"}',
    ]


def test_a_stream_that_starts_now_does_not_repeat_the_past(server: Running) -> None:
    server.publish(notice(5.0))
    lines = stream_lines(server)
    next(lines)
    server.publish(notice(6.0))
    assert [line for line in (next(lines) for _ in range(4)) if line.startswith("id")] == [
        "id: 6.0"
    ]


@pytest.mark.parametrize(
    ("query", "headers"), [("?since=5.0", {}), ("?since=1", {"Last-Event-ID": "5.0"})]
)
def test_past_events_are_repeated_on_request(
    server: Running, query: str, headers: dict[str, str]
) -> None:
    for at in (4.0, 5.0, 6.0, 7.0):
        server.publish(notice(at))
    ids = (line for line in stream_lines(server, query, **headers) if line.startswith("id"))
    assert [next(ids), next(ids)] == ["id: 6.0", "id: 7.0"]


def test_a_senseless_since_is_refused(server: Running) -> None:
    assert get(server, "events?since=yesterday").status_code == 400


def test_a_silent_stream_beats(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "HEARTBEAT_S", 0.01)
    beats = [line for line in (next(stream) for stream in [stream_lines(server)] * 5) if line]
    assert beats == [": heartbeat"] * 3


def test_streams_end_when_the_daemon_goes_down(server: Running) -> None:
    lines = stream_lines(server)
    next(lines)
    server.set(server.control.closing)
    assert list(lines) == [""]


def test_a_reader_that_leaves_is_forgotten(server: Running) -> None:
    lines = stream_lines(server)
    next(lines)
    lines.close()
    for at in range(100):
        server.publish(notice(float(at)))
    assert get(server, "status").status_code == 200


# ---------------------------------------------------------------- who may call


def test_with_keys_only_a_key_opens_the_door() -> None:
    with running(ScriptedControl(), admin_keys=["one", "two"]) as server:
        assert get(server, "status").status_code == 401
        assert get(server, "status", Authorization="Bearer three").status_code == 401
        assert get(server, "status", Authorization="Basic two").status_code == 401
        assert get(server, "status", Authorization="Bearer two").status_code == 200
        assert post(server, "engines/a/stop").status_code == 401
        assert server.control.asked == []


def test_a_page_of_another_site_is_refused_even_with_a_key() -> None:
    with running(ScriptedControl(), admin_keys=["one"]) as server:
        headers = {"Authorization": "Bearer one"}
        assert get(server, "status", Origin="https://evil.example", **headers).status_code == 403
        assert get(server, "status", Origin="null", **headers).status_code == 403
        assert get(server, "status", Origin=server.url, **headers).status_code == 200


def test_without_keys_a_rebound_dns_name_is_refused(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    evil = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
    assert get(server, "status", **evil).status_code == 403
    assert get(server, "status", Host=f"localhost:{port}").status_code == 200
    assert get(server, "status", Host=f"[::1]:{port}").status_code == 200


def test_without_keys_a_proxied_caller_is_refused(server: Running) -> None:
    assert get(server, "status", **{"X-Forwarded-For": "203.0.113.9"}).status_code == 403


def own_address() -> str | None:
    """Return an address of this machine that is not loopback, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; only picks the source address
        except OSError:
            return None
        return str(probe.getsockname()[0])


def test_without_keys_a_caller_from_elsewhere_is_refused() -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    with running(ScriptedControl(), host=address) as server:
        assert get(server, "status").status_code == 403
        assert get(server, "status", Host="localhost").status_code == 403


def test_kept_events_can_be_read_without_following(server: Running) -> None:
    server.publish(notice(5.0))
    server.publish(notice(6.0))
    lines = list(stream_lines(server, "?since=0&follow=false"))
    assert [line for line in lines if line.startswith("id")] == ["id: 5.0", "id: 6.0"]

"""The client of the admin API, against a real server."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from swapserve.client.control import ControlClient, DaemonUnreachable, Refused
from swapserve.errors import CapacityError
from swapserve.events import Notice
from tests.support.admin_server import LAST_SWAP, ScriptedControl, running, two_engines


def test_status_comes_back_as_it_was_sent() -> None:
    with running(ScriptedControl()) as server, ControlClient(server.url) as client:
        assert client.status() == two_engines()
        assert client.engine("org/model-a").last_swap == LAST_SWAP


def test_a_command_names_the_engine_whole() -> None:
    with running(ScriptedControl()) as server, ControlClient(server.url) as client:
        assert client.command("swap-in", "org/model-a").name == "org/model-a"
        client.command("stop", "model-b", wait=False)
        client.shutdown()
    assert server.control.asked == [
        ("swap_in", "org/model-a", "wait"),
        ("stop", "model-b", "no wait"),
        ("shutdown",),
    ]


def test_a_refusal_carries_the_daemons_code_and_words() -> None:
    error = CapacityError("model-b", "ram", 9, 4)
    with (
        running(ScriptedControl(failure=error)) as server,
        ControlClient(server.url) as client,
        pytest.raises(Refused) as caught,
    ):
        client.command("swap-in", "model-b")
    assert (caught.value.code, str(caught.value)) == ("capacity", str(error))
    assert caught.value.http_status == 503


def test_the_key_is_sent() -> None:
    with running(ScriptedControl(), admin_keys=["secret"]) as server:
        with ControlClient(server.url, "secret") as client:
            assert client.status().pid == 11
        with ControlClient(server.url) as client, pytest.raises(Refused) as caught:
            client.status()
    assert caught.value.code == "invalid_api_key"
    assert "SWAPSERVE_ADMIN_KEY" in str(caught.value)


def test_logs_come_back_as_text() -> None:
    with running(ScriptedControl()) as server, ControlClient(server.url) as client:
        assert client.logs("model-b", lines=1) == "model-b line 0\n"


def test_events_are_read_as_they_come_until_the_daemon_goes_down() -> None:
    with running(ScriptedControl()) as server, ControlClient(server.url) as client:
        server.publish(Notice(at=4.0, engine=None, message="old"))
        stream = client.events(since=1.0)
        assert next(stream).data["message"] == "old"
        server.publish(Notice(at=5.0, engine="model-b", message="new"))
        event = next(stream)
        assert (event.kind, event.at, event.data["message"]) == ("notice", 5.0, "new")
        server.set(server.control.closing)
        assert list(stream) == []


def test_a_refused_event_stream_says_why() -> None:
    with (
        running(ScriptedControl(), admin_keys=["secret"]) as server,
        ControlClient(server.url) as client,
        pytest.raises(Refused, match="admin key"),
    ):
        next(client.events())


def test_nobody_at_the_address_says_how_to_start_the_daemon() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with ControlClient(url) as client, pytest.raises(DaemonUnreachable) as caught:
            client.status()
    assert url in str(caught.value)
    assert "swapserve --config FILE serve" in str(caught.value)


def test_an_answer_that_does_not_come_in_time_is_unreachable() -> None:
    control = ScriptedControl()
    control.finish.clear()
    with (
        running(control) as server,
        ControlClient(server.url, timeout_s=0.2) as client,
        pytest.raises(DaemonUnreachable, match="in time"),
    ):
        client.command("start", "model-b")
    assert control.asked == [("start", "model-b", "wait")]


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with running(ScriptedControl()) as server, ControlClient(server.url) as client:
        assert client.status().pid == 11


@contextmanager
def stranger(status: int, body: bytes) -> Iterator[str]:
    """Run a server that is not ours and gives one answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("body", [b"hello", b'{"pid": 1}', b"[]"])
def test_another_program_at_the_address_is_not_taken_for_the_daemon(body: bytes) -> None:
    with (
        stranger(200, body) as url,
        ControlClient(url) as client,
        pytest.raises(DaemonUnreachable, match="no SwapServe daemon"),
    ):
        client.status()


def test_an_error_that_is_not_ours_is_shown_as_it_is() -> None:
    with (
        stranger(502, b"bad gateway") as url,
        ControlClient(url) as client,
        pytest.raises(Refused, match="answered 502: bad gateway"),
    ):
        client.status()


def test_a_daemon_that_dies_in_mid_stream_is_unreachable() -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    event = b'data: {"event":"notice","at":1.0,"message":"last words"}\n\n'
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_and_die() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(head + b"%x\r\n" % len(event) + event + b"\r\n")

        thread = threading.Thread(target=answer_and_die)
        thread.start()
        with ControlClient(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            stream = client.events()
            assert next(stream).data["message"] == "last words"
            with pytest.raises(DaemonUnreachable):
                next(stream)
        thread.join()

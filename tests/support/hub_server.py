"""A hub that serves the files of one repository: the few endpoints that a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server has, and what it was asked for."""

    def __init__(self, repo: str, files: Mapping[str, bytes]) -> None:
        self.repo = repo
        self.files = dict(files)
        self.breaks_off_at: int | None = None  # once; then it refuses to send files
        self.is_refusing = False
        self.ranges: list[tuple[str, str | None]] = []
        self.url = ""

    def info(self) -> bytes:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha256(content).hexdigest(),
            }
            for name, content in self.files.items()
        ]
        return json.dumps({"id": self.repo, "sha": COMMIT, "siblings": siblings}).encode()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{self.hub.repo}"):
            self.reply(200, self.hub.info(), {"Content-Type": "application/json"})
            return
        prefix = f"/{self.hub.repo}/resolve/{COMMIT}/"
        content = self.hub.files.get(path.removeprefix(prefix))
        if not path.startswith(prefix) or content is None:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}
            self.reply(404, b"", headers)
            return
        self.send_file(path.removeprefix(prefix), content, with_body=with_body)

    def send_file(self, name: str, content: bytes, *, with_body: bool) -> None:
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if with_body and self.hub.is_refusing:
            self.reply(403, b"", {})
            return
        wanted = self.headers.get("Range")
        start = 0
        if with_body:
            self.hub.ranges.append((name, wanted))
            if wanted:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        self.send_response(206 if start else 200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and self.hub.breaks_off_at is not None:
            self.hub.is_refusing = True
            self.wfile.write(body[: self.hub.breaks_off_at - start])
            self.close_connection = True
        elif with_body:
            self.wfile.write(body)

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub(repo: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    """Serve on a free port of the loopback; `Hub.url` is what HF_ENDPOINT should be."""
    hub = Hub(repo, files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

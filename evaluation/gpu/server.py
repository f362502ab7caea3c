"""A plain engine on PyTorch and transformers alone, which tells the logprob of each token.

`python -m evaluation.gpu.server MODEL --name N --host H --port P`. `transformers serve` needs a web
framework and tells no logprobs; this one needs nothing else and does. One request at a time.
"""

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any, cast

MOST_TOKENS = 8192


class Generator:
    """A causal language model, decoded greedily."""

    def __init__(self, path: str) -> None:
        import torch  # noqa: PLC0415 - only the engine's Python has it
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

        self._torch = torch
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self._one = threading.Lock()
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        # Straight to the device where `accelerate` is there to do that, else by way of the host.
        straight = {"device_map": device} if find_spec("accelerate") else {}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **straight)
        self._model = model.to(device).eval()

    def tokens(self, prompt: str, count: int) -> Iterator[tuple[int, str, float]]:
        """Yield id, text and logprob of each token."""
        torch = self._torch
        with self._one, torch.inference_mode():
            ids = self._tokenizer(prompt, return_tensors="pt").input_ids.to(self._model.device)
            cache: Any = None
            for _ in range(count):
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                chances = out.logits[0, -1].float().log_softmax(dim=-1)
                best = int(chances.argmax())
                text = self._tokenizer.convert_ids_to_tokens(best).replace("\u2581", " ")
                yield best, text, float(chances[best])
                ids = torch.tensor([[best]], device=self._model.device)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"

    @property
    def _engine(self) -> "Engine":
        return cast("Engine", self.server)

    def do_GET(self) -> None:
        listed = [{"id": self._engine.name, "object": "model"}]
        known: dict[str, dict[str, Any]] = {
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": listed},
        }
        nothing = {"error": {"message": "not here"}}
        self._say(200 if self.path in known else 404, known.get(self.path, nothing))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self._say(404, {"error": {"message": "not here"}})
            return
        count = min(MOST_TOKENS, int(body.get("max_tokens") or 16))
        pieces = self._engine.generator.tokens(str(body.get("prompt", "")), count)
        if body.get("stream"):
            self._stream(pieces)
            return
        text = "".join(text for _, text, _ in pieces)
        choice = {"index": 0, "text": text, "finish_reason": "length"}
        self._say(
            200, {"object": "text_completion", "model": self._engine.name, "choices": [choice]}
        )

    def _stream(self, pieces: Iterator[tuple[int, str, float]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        name = self._engine.name
        for number, text, logprob in pieces:
            said = {"tokens": [text], "token_logprobs": [logprob]}
            choice = {"index": 0, "text": text, "token_ids": [number], "logprobs": said}
            self._event(json.dumps(_chunk(name, choice)))
        self._event(json.dumps(_chunk(name, {"index": 0, "text": "", "finish_reason": "length"})))
        self._event("[DONE]")
        self._chunk(b"")

    def _event(self, data: str) -> None:
        self._chunk(f"data: {data}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _say(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


class Engine(ThreadingHTTPServer):
    """The server, with what its connections share."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], generator: Generator, name: str) -> None:
        self.generator = generator
        self.name = name
        super().__init__(address, Handler)


def _chunk(name: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"object": "text_completion", "model": name, "choices": [choice]}


def main() -> int:
    """Load the model and serve it."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.gpu.server")
    parser.add_argument("model")
    parser.add_argument("--name", default="model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    generator = Generator(options.model)
    with Engine((options.host, options.port), generator, options.name) as engine:
        engine.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())

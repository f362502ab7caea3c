"""The models with random weights do under a real engine what makes them good oracles."""

import json
from pathlib import Path

import httpx
import pytest

from swapserve.testing.models import make
from tests.support.llama_server import llama_server, running_llama_server

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(llama_server() is None, reason="no llama-server; run scripts/host-setup"),
]
TOKENS = 200
QUESTION = {"role": "user", "content": "Tell me a long story."}


def pieces_of(url: str, **options: object) -> list[str]:
    body = {"messages": [QUESTION], "max_tokens": TOKENS, "stream": True} | options
    pieces = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                pieces += [delta["content"]] if delta.get("content") else []
    return pieces


def test_greedy_text_is_printable_one_piece_a_token_and_the_same_every_time(
    tmp_path: Path,
) -> None:
    model = make("gguf", tmp_path / "one.gguf", seed=1)
    with running_llama_server(model, tmp_path / "log") as url:
        first = pieces_of(url, temperature=0)
        second = pieces_of(url, temperature=0)
        sampled = [pieces_of(url, temperature=1, seed=seed) for seed in (1, 2)]
    assert first == second
    assert len(first) == TOKENS
    text = "".join(first)
    assert text.isascii()
    assert text.isprintable()
    assert len(set(zip(first, first[1:], first[2:], strict=False))) > TOKENS / 2, "runs in a loop"
    assert sampled[0] != sampled[1]
    assert [len(pieces) for pieces in sampled] == [TOKENS, TOKENS]

    other = make("gguf", tmp_path / "two.gguf", seed=2)
    with running_llama_server(other, tmp_path / "log") as url:
        assert pieces_of(url, temperature=0)[:5] != first[:5]


def test_the_next_turn_of_a_chat_finds_the_whole_last_one_in_the_cache(tmp_path: Path) -> None:
    model = make("gguf", tmp_path / "one.gguf", seed=1)
    with running_llama_server(model, tmp_path / "log") as url:
        text = "".join(pieces_of(url, temperature=0))
        turns = [
            QUESTION,
            {"role": "assistant", "content": text},
            {"role": "user", "content": "Go on."},
        ]
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={"messages": turns, "max_tokens": 1}, timeout=60
        )
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= TOKENS

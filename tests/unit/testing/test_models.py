"""Models with random weights: the same for the same seed, whole or not there, well formed."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swapserve.testing.models import bfloat16, cached, main, make
from swapserve.testing.weights import BIAS_OUTPUT, END, SIZES, layout, vocabulary, weight


def header_of(safetensors: Path) -> tuple[dict[str, Any], int]:
    with safetensors.open("rb") as file:
        [length] = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), safetensors.stat().st_size - 8 - length


def test_every_token_that_can_be_generated_is_a_word_of_printable_ascii() -> None:
    tokens = vocabulary()
    assert len({token.text for token in tokens}) == len(tokens)
    words = [token.text for token in tokens if token.is_word]
    assert len(words) > 700
    for word in words:
        assert word[0] == "\u2581"
        assert word[1:].isascii()
        assert word[1:].isprintable()


def test_every_word_is_reached_by_joining_two_tokens_of_the_vocabulary() -> None:
    texts = {token.text for token in vocabulary()}
    for token in vocabulary():
        if token.is_word:
            assert {token.text[:3], token.text[3:], token.text[1:3]} <= texts


def test_the_output_layer_reads_only_the_constant_for_tokens_that_must_not_win() -> None:
    tokens = vocabulary()
    shape = SIZES["tiny"]
    output = weight("lm_head.weight", (len(tokens), shape.hidden), tokens, seed=1)
    assert output[END, 0] == BIAS_OUTPUT < 0
    assert not output[END, 1:].any()
    for name, dimensions in layout(shape, len(tokens)):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not weight(name, dimensions, tokens, seed=1)[0].any()


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_a_seed_gives_the_same_model_and_another_seed_another(kind: Any, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        path = make(kind, tmp_path / name, seed=seed)
        return (path if kind == "gguf" else path / "model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)


def test_a_safetensors_header_describes_every_byte(tmp_path: Path) -> None:
    make("hf", tmp_path / "m", seed=1)
    header, data_bytes = header_of(tmp_path / "m" / "model.safetensors")
    del header["__metadata__"]
    assert list(header) == [name for name, _ in layout(SIZES["tiny"], len(vocabulary()))]
    end = 0
    for entry in header.values():
        start, stop = entry["data_offsets"]
        assert start == end
        assert stop - start == 2 * np.prod(entry["shape"])
        end = stop
    assert end == data_bytes


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even() -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-7, 3.0], np.float32)
    assert [hex(bits) for bits in bfloat16(values)] == [
        "0x3f80",
        "0x3f80",
        "0x3f82",
        "0xbf81",
        "0x4040",
    ]


def test_a_model_that_could_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: object, **_options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("swapserve.testing.models.weight", fails)
    with pytest.raises(OSError, match="no space left"):
        make("hf", tmp_path / "m", seed=1)
    with pytest.raises(OSError, match="no space left"):
        make("gguf", tmp_path / "m.gguf", seed=1)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_model_is_made_once(tmp_path: Path) -> None:
    first = cached("gguf", tmp_path, seed=3)
    made_at = first.stat().st_mtime_ns
    assert cached("gguf", tmp_path, seed=3) == first
    assert first.stat().st_mtime_ns == made_at
    assert cached("gguf", tmp_path, seed=4) != first


def test_the_command_line_says_why_it_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hf", str(tmp_path / "m"), "--seed", "1"]) == 0
    assert main(["hf", str(tmp_path / "m"), "--seed", "1"]) == 1
    assert "exists" in capsys.readouterr().err

"""Random weights in the shapes of real models, made in seconds where PyTorch has a GPU.

`python -m evaluation.gpu.weights DIRECTORY --shape 3b --seed 1`, with the engine's Python. Nothing
is downloaded. What a model says follows the same rules as the small ones of
`swapserve.testing.weights`: words of its own vocabulary only, never an end, a greedy text that
depends on its whole context. The rows of the real vocabulary beyond ours are there and never win.
"""

import argparse
import json
import math
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swapserve.testing import models, weights
from swapserve.testing.weights import Shape, Token

SHAPES = {
    # hidden, layers, feed forward, head, heads per key-value head; Meta's Llama 3.2 and 3.1
    "3b": (Shape(3072, 28, 8192, head=128, group=3), 128_256),
    "8b": (Shape(4096, 32, 14336, head=128, group=4), 128_256),
    "tiny": (Shape(256, 4, 512), 1024),
}
BYTES_PER_WEIGHT = 2


def size_of(shape: str) -> int:
    """Return the bytes of all weights."""
    dimensions, rows = SHAPES[shape]
    layout = weights.layout(dimensions, rows)
    return BYTES_PER_WEIGHT * sum(math.prod(of_one) for _, of_one in layout)


def tensor(
    torch: Any,  # noqa: ANN401 - a module that only the engine's Python has
    name: str,
    dimensions: Sequence[int],
    tokens: Sequence[Token],
    generator: Any,  # noqa: ANN401
    *,
    embedding: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Make one tensor by the rules of `weights.weight`; rows beyond the tokens never win.

    The output layer needs the `embedding`, so that no word is said twice in a row.
    """
    device = generator.device
    if len(dimensions) == 1:
        return torch.ones(dimensions, device=device)
    kind = name.rsplit(".", 2)[-2]
    value = torch.randn(tuple(dimensions), generator=generator, device=device)
    if kind == "embed_tokens":
        value[:, 0] = weights.BIAS_INPUT
        return value
    value *= weights.GAIN.get(kind, 1.0) / math.sqrt(dimensions[1])
    if kind in {"o_proj", "down_proj"}:
        value[0] = 0
    if kind == "lm_head":
        value -= weights.REPETITION_PENALTY / dimensions[1] * embedding
        is_word = torch.zeros(dimensions[0], dtype=torch.bool, device=device)
        is_word[: len(tokens)] = torch.tensor([token.is_word for token in tokens], device=device)
        value[~is_word] = 0
        value[:, 0] = torch.where(is_word, 0.0, weights.BIAS_OUTPUT)
    return value


def write(folder: Path, *, shape: str, seed: int, device: str | None = None) -> dict[str, Any]:
    """Write a model folder in Hugging Face's format; return what that took.

    Raises:
        ImportError: there is no PyTorch.
    """
    import torch  # noqa: PLC0415 - only the engine's Python has it

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    begun = time.monotonic()
    dimensions, rows = SHAPES[shape]
    tokens = weights.vocabulary()
    folder.mkdir(parents=True)
    contents = {
        "config.json": models.model_config(dimensions, rows),
        "tokenizer.json": models.tokenizer(tokens),
        "tokenizer_config.json": models.tokenizer_config(tokens),
        # An end of the text would cut answers short, and cannot be said anyway.
        "generation_config.json": {"do_sample": False, "eos_token_id": None, "pad_token_id": 2},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    layout = list(weights.layout(dimensions, rows))
    generator = torch.Generator(device=where)
    embedding: Any = None
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(layout))
        for number, (name, of_one) in enumerate(layout):
            generator.manual_seed(seed * len(layout) + number)
            value = tensor(torch, name, of_one, tokens, generator, embedding=embedding)
            embedding = value if name == weights.EMBEDDING else embedding
            # bfloat16 is nothing to numpy: the same bits as integers are.
            value.to(torch.bfloat16).view(torch.int16).cpu().contiguous().numpy().tofile(file)
    return {"bytes": size_of(shape), "device": where, "seconds": time.monotonic() - begun}


def header(layout: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    """Return how a safetensors file begins: length, then the place of each tensor as JSON."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dimensions in layout:
        end = offset + BYTES_PER_WEIGHT * math.prod(dimensions)
        entries[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def main() -> int:
    """Make one model, as the command line says, and tell what it took as JSON."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.gpu.weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device")
    options = parser.parse_args()
    took = write(options.folder, shape=options.shape, seed=options.seed, device=options.device)
    sys.stdout.write(json.dumps(took) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make small models with random weights, for tests and demonstrations without a model hub.

    python -m swapserve.testing.models gguf OUT.gguf --seed 1 --size tiny     (llama.cpp)
    python -m swapserve.testing.models hf OUTDIR --seed 1 --size tiny         (vLLM)
    python -m swapserve.testing.models gguf FOLDER --cached --seed 1          (unless there)

What they say and why is in `swapserve.testing.weights`. Needs numpy, and for GGUF the package
`gguf`; no torch.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from swapserve.testing.weights import (
    BEGIN,
    END,
    SIZES,
    SPACE,
    UNKNOWN,
    Array,
    Shape,
    Token,
    layout,
    vocabulary,
    weight,
)

Kind = Literal["gguf", "hf"]

FORMAT = 1
"""Goes up when the same seed gives another model; part of the names of cached ones."""

CONTEXT = 8192
NORM_EPSILON = 1e-5
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# --- GGUF -----------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Translate a tensor's name from Hugging Face's convention to llama.cpp's."""
    path = name.removesuffix(".weight")
    if not path.startswith("model.layers."):
        return GGUF_NAMES[path] + ".weight"
    layer, _, rest = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def write_gguf(path: Path, *, seed: int, shape: Shape) -> None:
    """Write a model file for llama.cpp: 16-bit weights, SentencePiece vocabulary.

    Raises:
        ImportError: the package `gguf` is missing.
    """
    import gguf  # noqa: PLC0415 (only this format needs it)

    tokens = vocabulary()
    dtypes: dict[int, np.dtype[Any]] = {1: np.dtype(np.float32), 2: np.dtype(np.float16)}
    with contextlib.closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        describe_model(writer, shape)
        describe_vocabulary(writer, tokens)
        for name, dimensions in layout(shape, len(tokens)):
            dtype = dtypes[len(dimensions)]
            length = math.prod(dimensions) * dtype.itemsize
            writer.add_tensor_info(gguf_name(name), dimensions, dtype, length)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, dimensions in layout(shape, len(tokens)):
            value = weight(name, dimensions, tokens, seed)
            writer.write_tensor_data(value.astype(dtypes[len(dimensions)]))


def describe_model(writer: Any, shape: Shape) -> None:  # noqa: ANN401 (gguf is not loaded here)
    """Write the dimensions."""
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_rope_dimension_count(shape.head)


def describe_vocabulary(writer: Any, tokens: Sequence[Token]) -> None:  # noqa: ANN401 (see above)
    """Write the tokenizer. Types of tokens: 1 normal, 2 unknown, 3 control."""
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_chat_template(CHAT_TEMPLATE)


# --- Hugging Face ---------------------------------------------------------------------------------


def bfloat16(value: Array) -> npt.NDArray[np.uint16]:
    """Round to the nearest bfloat16 (the upper half of a float32), ties to even."""
    bits = value.view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)


def write_safetensors(path: Path, *, seed: int, shape: Shape, tokens: Sequence[Token]) -> None:
    """Write the weights: length of the header (8 bytes), JSON header, raw bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dimensions in layout(shape, len(tokens)):
        end = offset + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dimensions in layout(shape, len(tokens)):
            file.write(bfloat16(weight(name, dimensions, tokens, seed)).tobytes())


def model_config(shape: Shape, vocabulary_size: int) -> dict[str, Any]:
    """Return what stands in config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": END,
    }


def tokenizer(tokens: Sequence[Token]) -> dict[str, Any]:
    """Return what stands in tokenizer.json: a Unigram model with the best-scored cut."""
    metaspace = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always",
        "split": True,
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token.text, "special": True, **special}
            for index, token in enumerate(tokens)
            if token.is_special
        ],
        "normalizer": None,
        "pre_tokenizer": metaspace,
        "post_processor": None,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": UNKNOWN,
            "vocab": [[token.text, token.score] for token in tokens],
            "byte_fallback": False,
        },
    }


def tokenizer_config(tokens: Sequence[Token]) -> dict[str, Any]:
    """Return what stands in tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[UNKNOWN].text,
        "bos_token": tokens[BEGIN].text,
        "eos_token": tokens[END].text,
        "pad_token": tokens[END].text,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_hf(folder: Path, *, seed: int, shape: Shape) -> None:
    """Write a model folder in Hugging Face's format, with bfloat16 weights."""
    folder.mkdir()
    tokens = vocabulary()
    contents = {
        "config.json": model_config(shape, len(tokens)),
        "tokenizer.json": tokenizer(tokens),
        "tokenizer_config.json": tokenizer_config(tokens),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    write_safetensors(folder / "model.safetensors", seed=seed, shape=shape, tokens=tokens)


# --- use ------------------------------------------------------------------------------------------


def make(kind: Kind, out: Path, *, seed: int, size: str = "tiny") -> Path:
    """Make a model at `out`, a file for `gguf` and a folder for `hf`, and return its path.

    It is written beside its place and renamed, so a half written model never has that name.

    Raises:
        FileExistsError: something has that name already.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if kind == "gguf":
            write_gguf(staged, seed=seed, shape=SIZES[size])
        else:
            write_hf(staged, seed=seed, shape=SIZES[size])
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            staged.unlink()
    return out


def cached(kind: Kind, folder: Path, *, seed: int, size: str = "tiny") -> Path:
    """Return the model of that kind, size and seed in `folder`; make it when it is not there."""
    suffix = ".gguf" if kind == "gguf" else ""
    path = folder / f"{kind}-{size}-{seed}-v{FORMAT}{suffix}"
    if not path.exists():
        try:
            make(kind, path, seed=seed, size=size)
        except OSError:
            # Another process may have made the same one meanwhile.
            if not path.exists():
                raise
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one model, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m swapserve.testing.models")
    parser.add_argument("kind", choices=["gguf", "hf"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument(
        "--cached", action="store_true", help="OUT is a folder of models; print the path"
    )
    options = parser.parse_args(arguments)
    create = cached if options.cached else make
    try:
        path = create(options.kind, options.out, seed=options.seed, size=options.size)
    except (OSError, ImportError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    if options.cached:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

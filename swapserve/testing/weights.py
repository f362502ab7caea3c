"""Vocabulary and random weights of small Llamas whose nonsense is a good oracle.

- Only words of printable ASCII can be generated, one token each, so every token of a stream is one
  piece of text. Special tokens, the end of the text among them, cannot win even when sampled.
- Attention is sharp, so greedy text depends on its whole context and does not run in a short loop.
- A text is cut into the same tokens that it was generated from, so a next turn of a chat finds the
  whole last one in an engine's cache.
- Greedy text is the same every time and differs per seed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

HEAD = 64


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama: `head` of one attention head, `group` heads share a key-value head."""

    hidden: int
    layers: int
    feed_forward: int
    head: int = HEAD
    group: int = 2

    @property
    def heads(self) -> int:
        """Return the number of attention heads."""
        return self.hidden // self.head

    @property
    def kv_heads(self) -> int:
        """Return the number of key-value heads."""
        return max(1, self.heads // self.group)


SIZES = {
    "tiny": Shape(hidden=256, layers=4, feed_forward=512),  # 6 MB
    "small": Shape(hidden=768, layers=8, feed_forward=2048),  # 110 MB
    "medium": Shape(hidden=1536, layers=14, feed_forward=4096),  # 740 MB
}

# --- vocabulary -----------------------------------------------------------------------------------

SPACE = "\u2581"  # how SentencePiece writes the blank before a word
UNKNOWN, BEGIN, END = range(3)


@dataclass(frozen=True)
class Token:
    """One entry of the vocabulary: the higher its score, the sooner a text is cut that way."""

    text: str
    score: float
    is_special: bool = False
    is_word: bool = False


def vocabulary(size: int = 1024) -> list[Token]:
    """Return the tokens: three special ones, all of ASCII, syllables, and words of two of them.

    The syllables stand between characters and words because SentencePiece's BPE, which llama.cpp
    uses, reaches a word only by joining two tokens again and again.
    """
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    pairs = [a + b for a in syllables for b in syllables]
    tokens = [Token(text, 0.0, is_special=True) for text in ("<unk>", "<s>", "</s>")]
    tokens += [Token(text, -10.0) for text in (SPACE, "\n", *map(chr, range(33, 127)))]
    tokens += [Token(text, -3.0) for text in syllables]
    tokens += [Token(SPACE + text, -2.0) for text in syllables]
    # A stride that shares no factor with their number picks different pairs from all over.
    words = (SPACE + pairs[i * 1009 % len(pairs)] for i in range(size - len(tokens)))
    return tokens + [Token(text, -1.0, is_word=True) for text in words]


# --- weights --------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"

# The residual stream's dimension 0 is a constant that no layer writes to. The output layer reads it
# for the tokens that must not win, which gives a bias to an architecture that has none.
BIAS_INPUT = 8.0
BIAS_OUTPUT = -20.0
LOGIT_SPREAD = 4.0  # standard deviation; at temperature 1 the best word has a chance of about 1/5
SHARPNESS = 3.0  # standard deviation of the attention's scores
CONTEXT_GAIN = 1.5  # what attention adds, against an embedding of size 1
REPETITION_PENALTY = 8.0  # what the word just said loses of its score
GAIN = {"q_proj": SHARPNESS, "o_proj": CONTEXT_GAIN, "lm_head": LOGIT_SPREAD}


def layout(shape: Shape, vocabulary_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name, as in Hugging Face checkpoints of Llama, and dimensions of every tensor."""
    hidden, wide, kv = shape.hidden, shape.feed_forward, shape.kv_heads * shape.head
    yield EMBEDDING, (vocabulary_size, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (wide, hidden)
        yield prefix + "mlp.up_proj.weight", (wide, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary_size, hidden)


def weight(name: str, dimensions: tuple[int, ...], tokens: Sequence[Token], seed: int) -> Array:
    """Make one tensor; it depends on nothing but the arguments."""
    if len(dimensions) == 1:
        return np.ones(dimensions, np.float32)
    random = np.random.default_rng([seed, *name.encode()])
    value = random.standard_normal(dimensions, np.float32)
    kind = name.rsplit(".", 2)[-2]
    if kind == "embed_tokens":
        value[:, 0] = BIAS_INPUT
        return value
    value *= GAIN.get(kind, 1.0) / math.sqrt(dimensions[1])
    if kind in ("o_proj", "down_proj"):
        value[0] = 0
    if kind == "lm_head":
        value -= REPETITION_PENALTY / dimensions[1] * weight(EMBEDDING, dimensions, tokens, seed)
        is_word = np.array([token.is_word for token in tokens])
        value[~is_word] = 0
        value[:, 0] = np.where(is_word, 0, BIAS_OUTPUT)
    return value

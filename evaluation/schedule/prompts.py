"""Prompts of a wanted number of tokens, for models made by `swapserve.testing.models`."""

import random

from swapserve.testing.weights import SPACE, vocabulary

BEGIN_TOKENS = 1
"""What the engine puts before every prompt."""
_WORDS = [token.text.replace(SPACE, " ") for token in vocabulary() if token.is_word]


def prompt(tokens: int, number: int) -> str:
    """Return a prompt of so many tokens; another number, another one.

    One that would be shorter than its first word has that word.
    """
    rng = random.Random(number)
    words = rng.choices(_WORDS, k=max(1, tokens - BEGIN_TOKENS))
    # The engine puts a blank before a text's first word itself.
    return "".join(words).removeprefix(" ")

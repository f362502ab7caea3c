"""docs/configuration.md says what the dataclasses say."""

from pathlib import Path

from swapserve.config.fields import keys_of
from swapserve.config.layout import parts, top_keys
from swapserve.config.recipes import Recipe
from swapserve.config.reference import update

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_tables_are_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert update(text) == text, "run: python -m swapserve.config.reference docs/configuration.md"


def test_every_key_is_there_with_a_meaning() -> None:
    text = DOCUMENT.read_text()
    keys = [*top_keys(), *(key for part in parts() for key in part.keys), *keys_of(Recipe)]
    for key in keys:
        assert key.doc, f"{key.field} has no description"
        assert f"| `{key.name}` |" in text


def test_a_stale_table_is_noticed() -> None:
    text = DOCUMENT.read_text()
    stale = text.replace("| `quantum` |", "| `quantums` |")
    assert stale != text
    assert update(stale) == text

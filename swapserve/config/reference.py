"""The tables of docs/configuration.md, made from the dataclasses.

`python -m swapserve.config.reference docs/configuration.md` writes them anew between the marks.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from swapserve.config.fields import Key, class_doc, keys_of
from swapserve.config.layout import Part, nested, parts, top_keys
from swapserve.config.recipes import Recipe
from swapserve.config.values import format_duration, format_size

_BEGIN = "<!-- {name}: made from swapserve/config/, do not edit -->"
_END = "<!-- end of {name} -->"

_TYPES = {
    "boolean": "`true`, `false`",
    "duration": "duration",
    "integer": "whole number",
    "api_keys": "list of secrets, or of mappings with the keys below",
    "names": "name or list of names",
    "number": "number",
    "pairs": "mapping",
    "path": "path",
    "paths": "list of paths",
    "secret": "secret",
    "secrets": "list of secrets",
    "size": "size",
    "text": "text",
    "texts": "list of texts",
}


def reference_table() -> str:
    """Return every key of the configuration as Markdown: type, default and meaning."""
    blocks = ["### Top level\n\n" + _table(top_keys(), "")]
    for part in parts():
        blocks.append(_section(part))
        if part.name in nested():
            blocks.append(_section(nested()[part.name]))
    return "\n".join(blocks)


def recipe_table() -> str:
    """Return every key of a recipe as Markdown."""
    return f"{class_doc(Recipe)}\n\n{_table(keys_of(Recipe), '')}"


def default_text(key: Key) -> str:
    """Return a key's default as YAML; an empty text if it has none of its own."""
    value = key.default
    match key.kind:
        case "boolean":
            return str(value).lower()
        case "size" | "duration" if value is not None:
            return format_size(value) if key.kind == "size" else format_duration(value)
        case "texts" | "choices" | "paths" | "secrets" | "api_keys" | "names":
            return f"[{', '.join(value)}]"
        case "pairs":
            return "{" + ", ".join(f"{name}: {text}" for name, text in value.items()) + "}"
        case "number":
            return f"{value:g}"
        case _:
            return "" if value is None else str(value)


def update(text: str) -> str:
    """Return a document with both tables made anew between their marks.

    Raises:
        ValueError: a mark is missing.
    """
    blocks: Mapping[str, str] = {"reference": reference_table(), "recipe keys": recipe_table()}
    for name, block in blocks.items():
        begin, end = _BEGIN.format(name=name), _END.format(name=name)
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if pattern.search(text) is None:
            raise ValueError(f"no marks for the {name}: {begin} ... {end}")
        made = f"{begin}\n\n{block}\n{end}"
        text = pattern.sub(made.replace("\\", r"\\"), text)
    return text


def _section(part: Part) -> str:
    return f"### {_heading(part)}\n\n{part.doc}\n\n{_table(part.keys, '')}"


def _heading(part: Part) -> str:
    return {
        "section": f"`{part.name}`",
        "mapping": f"`{part.name}`: a mapping of names to",
        "list": f"`{part.name}`: a list of",
    }[part.shape]


def _table(keys: Iterable[Key], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{prefix}{key.name}`", _type(key), _default(key), key.doc)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(key: Key) -> str:
    if key.kind == "choice":
        return ", ".join(f"`{choice}`" for choice in key.choices)
    if key.kind == "choices":
        return "list of " + ", ".join(f"`{choice}`" for choice in key.choices)
    if key.low is not None and key.high is not None:
        return f"{_TYPES[key.kind]}, {key.low:g} to {key.high:g}"
    return _TYPES[key.kind]


def _default(key: Key) -> str:
    if key.required:
        return "required"
    if key.default_words is not None:
        return key.default_words
    return f"`{text}`" if (text := default_text(key)) else "none"


def main(path: Path) -> None:
    """Write the tables of one document anew."""
    path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

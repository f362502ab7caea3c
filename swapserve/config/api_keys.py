"""Read `server.api_keys`: secrets, or mappings that also say whose a key is."""

from collections.abc import Sequence
from dataclasses import replace

from swapserve.config.fields import keys_of
from swapserve.config.nodes import Node, Table
from swapserve.config.reader import Reader, Section
from swapserve.config.schema import ApiKey


def read_api_keys(reader: Reader, server: Section, nodes: Sequence[Node]) -> tuple[ApiKey, ...]:
    """Return the keys without a problem.

    Args:
        reader: notes the problems.
        server: the section; `api_keys` becomes one of its bad values if an entry is.
        nodes: the entries.
    """
    found: list[ApiKey] = []
    names: dict[str, int] = {}
    for index, node in enumerate(nodes):
        where = f"{server.key}.api_keys[{index}]"
        section = _entry(reader, node, where)
        values = section.values
        values.setdefault("name", f"key-{index + 1}")
        if (first := names.setdefault(values["name"], index)) != index:
            named = f"{values['name']!r}, which is the name of {server.key}.api_keys[{first}]"
            line = section.line_of("name")
            reader.problems.add(line, f"{where}.name", named, "a name of its own")
        if section.bad:
            server.bad.add("api_keys")
        else:
            found.append(ApiKey(**values))
    return tuple(found)


def _entry(reader: Reader, node: Node, where: str) -> Section:
    keys = keys_of(ApiKey)
    if isinstance(node, Table) and not node.nodes.keys().isdisjoint(key.name for key in keys):
        return reader.section(node, where, keys)
    (secret,) = (key for key in keys if key.kind == "secret")
    table = Table(node.line, {where: node}, {where: node.line})
    return reader.section(table, "", [replace(secret, name=where)])

"""What docs/admin.md says of paths and events is what the code does."""

from dataclasses import fields

from swapserve.api.admin import routes
from swapserve.events import EngineChanged, Notice, RequestEnded, SwapEnded
from tests.meta.test_docs_front_door import DOCS
from tests.support.admin_server import ScriptedControl


def rows(heading: str) -> list[tuple[str, ...]]:
    """Return the cells of the table that follows a heading row."""
    lines = (DOCS / "admin.md").read_text(encoding="utf-8").splitlines()
    first = lines.index(heading)
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
    return found


def test_every_admin_route_is_documented() -> None:
    written = {(row[1], row[0].strip("`")) for row in rows("| path | method | what |")}
    found = routes(ScriptedControl(), ())
    assert written == {(route.method, route.path.replace(":.+", "")) for route in found}


def test_every_event_and_its_fields_are_documented() -> None:
    written = {
        row[0].strip("`"): tuple(name.strip(" `") for name in row[1].split(","))
        for row in rows("| event | fields |")
    }
    kinds = (EngineChanged, SwapEnded, RequestEnded, Notice)
    assert written == {kind.kind: tuple(field.name for field in fields(kind)) for kind in kinds}

"""What the documents say about errors, metrics and endpoints is what the code does."""

from pathlib import Path

from swapserve.api.errors import TABLE
from swapserve.api.openai import FORWARDED, OpenAI
from swapserve.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs"


def table(name: str) -> list[tuple[str, ...]]:
    """Return the cells of the first table of a page, without head and code marks."""
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")))
    return rows


def test_the_table_of_errors_is_the_code_s() -> None:
    written = {row[0]: row[1:4] for row in table("errors.md")}
    shown = {}
    for kind, how in TABLE.items():
        if kind.__name__ == "AdmissionError":
            continue  # only its subclasses are raised
        retry = "" if how.retry_after_s is None else f"{how.retry_after_s} s"
        shown[kind.code] = (str(how.status), how.type, retry)
    assert written == shown


def test_the_table_of_metrics_is_the_code_s() -> None:
    written = [row[:3] for row in table("metrics.md")]
    assert written == [
        (family.name, family.kind, ", ".join(family.labels)) for family in Metrics().families
    ]


def test_the_table_of_endpoints_is_the_code_s() -> None:
    written = {(row[1], row[0]) for row in table("endpoints.md")}
    # The handlers need no working parts to be listed.
    routes = OpenAI.routes(object.__new__(OpenAI))
    assert written == {(route.method, route.path.replace(":.+", "")) for route in routes}
    assert {("POST", path) for path in FORWARDED} <= written

"""A table that cannot outgrow its bound."""

from swapserve.scheduler.knowledge.bounded import Bounded


def test_who_was_not_written_to_for_longest_makes_room() -> None:
    table: Bounded[str, list[int]] = Bounded(2, list)
    table["a"].append(1)
    table["b"].append(2)
    table["a"].append(3)
    assert table.find("b") == [2], "reading it is not writing to it"
    table["c"].append(4)
    assert table.find("b") is None
    assert dict(table.items()) == {"a": [1, 3], "c": [4]}


def test_reading_makes_nothing() -> None:
    table: Bounded[str, list[int]] = Bounded(2, list)
    assert table.find("a") is None
    assert len(table) == 0

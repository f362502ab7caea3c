"""What the daemon remembers across its own death."""

from pathlib import Path

from swapserve.lifecycle.journal import Journal


def opened(path: Path) -> Journal:
    journal = Journal(path)
    journal.open()
    return journal


def test_footprints_and_pins_survive(tmp_path: Path) -> None:
    path = tmp_path / "daemon" / "journal.json"
    journal = opened(path)
    journal.measured("a", 1000)
    journal.pin("a", pinned=True)
    again = opened(path)
    assert again.footprint("a") == 1000
    assert again.pinned("a") is True
    assert again.footprint("b") is None
    assert again.pinned("b") is None


def test_small_changes_are_not_written(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.json")
    journal.measured("a", 1000)
    journal.measured("a", 1050)
    assert journal.footprint("a") == 1000
    journal.measured("a", 1500)
    assert journal.footprint("a") == 1500


def test_a_damaged_journal_is_set_aside_and_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    path.write_text('{"footprints": ')
    journal = opened(path)
    assert journal.footprint("a") is None
    assert path.with_suffix(".unreadable").read_text() == '{"footprints": '
    journal.measured("a", 7)
    assert opened(path).footprint("a") == 7


def test_a_journal_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    journal = opened(tmp_path / "gone" / "journal.json")
    (tmp_path / "gone").rmdir()
    journal.measured("a", 7)
    assert journal.footprint("a") == 7

"""What the daemon remembers across its own death."""

from pathlib import Path

from swapserve.ids import DeviceName
from swapserve.lifecycle.journal import Journal

HOST = DeviceName("host")
GPU = DeviceName("gpu0")


def opened(path: Path) -> Journal:
    journal = Journal(path)
    journal.open()
    return journal


def test_footprints_and_pins_survive(tmp_path: Path) -> None:
    path = tmp_path / "daemon" / "journal.json"
    journal = opened(path)
    journal.measured("a", {HOST: 1000})
    journal.pin("a", pinned=True)
    again = opened(path)
    assert again.footprint("a") == {HOST: 1000}
    assert again.pinned("a") is True
    assert again.footprint("b") is None
    assert again.pinned("b") is None


def test_small_changes_are_not_written(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.json")
    journal.measured("a", {HOST: 1000})
    journal.measured("a", {HOST: 1050})
    assert journal.footprint("a") == {HOST: 1000}
    journal.measured("a", {HOST: 1500})
    assert journal.footprint("a") == {HOST: 1500}


def test_a_damaged_journal_is_set_aside_and_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    path.write_text('{"footprints": ')
    journal = opened(path)
    assert journal.footprint("a") is None
    assert path.with_suffix(".unreadable").read_text() == '{"footprints": '
    journal.measured("a", {HOST: 7})
    assert opened(path).footprint("a") == {HOST: 7}


def test_a_journal_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    journal = opened(tmp_path / "gone" / "journal.json")
    (tmp_path / "gone").rmdir()
    journal.measured("a", {HOST: 7})
    assert journal.footprint("a") == {HOST: 7}


def test_a_reading_of_another_device_is_news_though_the_bytes_are_equal(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.json")
    journal.measured("a", {HOST: 1000})
    journal.measured("a", {GPU: 1000})
    assert journal.footprint("a") == {GPU: 1000}


def test_one_of_several_devices_that_changed_is_news(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.json")
    journal.measured("a", {HOST: 1000, GPU: 1000})
    journal.measured("a", {HOST: 1000, GPU: 2000})
    assert journal.footprint("a") == {HOST: 1000, GPU: 2000}


def test_a_footprint_of_an_earlier_version_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    path.write_text('{"footprints": {"a": 1000}, "pins": {"a": true}}')
    journal = opened(path)
    assert journal.footprint("a") is None
    assert journal.pinned("a") is True
    journal.measured("a", {HOST: 7})
    assert opened(path).footprint("a") == {HOST: 7}


def test_the_costs_of_swaps_survive(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    assert opened(path).costs("a") == {}
    opened(path).set_costs("a", {"checkpoint": [1.0, 2.0]})
    assert opened(path).costs("a") == {"checkpoint": [1.0, 2.0]}

"""The books of one device."""

import pytest

from swapserve.ids import DeviceName, EngineName
from swapserve.scheduler.ledger import Ledger, LedgerViolation

RAM = DeviceName("ram")
A, B, C = EngineName("a"), EngineName("b"), EngineName("c")


def ledger() -> Ledger:
    return Ledger({RAM: 10})


def test_promising_more_than_is_free_raises() -> None:
    books = ledger()
    books.reserve(RAM, A, 7)
    with pytest.raises(LedgerViolation):
        books.reserve(RAM, B, 4)
    with pytest.raises(LedgerViolation):
        books.claim(RAM, B, 4)


def test_a_commitment_replaces_its_reservation() -> None:
    books = ledger()
    books.reserve(RAM, A, 7)
    assert books.commit(RAM, A, 5) == 0
    account = books.account(RAM)
    assert (account.reserved_bytes, account.committed_bytes) == (0, 5)
    assert books.room(RAM) == 5


def test_what_an_engine_holds_counts_towards_its_next_reservation() -> None:
    books = ledger()
    books.commit(RAM, A, 6)
    books.reserve(RAM, A, 8)
    assert books.held(RAM, A) == 8


def test_use_without_room_is_a_debt_that_freed_bytes_pay_first() -> None:
    books = ledger()
    books.commit(RAM, A, 6)
    assert books.commit(RAM, B, 7) == 3
    account = books.account(RAM)
    assert account.committed_bytes == 10
    assert account.excess_bytes == 3
    assert books.room(RAM) == -3
    books.release(RAM, A)
    assert books.account(RAM).excess_bytes == 0
    assert books.room(RAM) == 3


def test_real_use_outranks_claims() -> None:
    books = ledger()
    books.commit(RAM, A, 4)
    books.claim(RAM, C, 6)
    assert books.commit(RAM, A, 9) == 0
    assert books.account(RAM).reserved_bytes == 0


def test_releasing_what_is_not_there_changes_nothing() -> None:
    books = ledger()
    books.release(RAM, A)
    assert books.room(RAM) == 10

"""The books of each device."""

import pytest

from swapserve.ids import DeviceName, EngineName
from swapserve.scheduler.ledger import Ledger, LedgerViolation

RAM, GPU = DeviceName("ram"), DeviceName("gpu")
A, B, C = EngineName("a"), EngineName("b"), EngineName("c")


def ledger() -> Ledger:
    return Ledger({RAM: 10})


def test_promising_more_than_is_free_raises() -> None:
    books = ledger()
    books.reserve(A, {RAM: 7})
    with pytest.raises(LedgerViolation):
        books.reserve(B, {RAM: 4})
    with pytest.raises(LedgerViolation):
        books.claim(B, {RAM: 4})


def test_a_commitment_replaces_its_reservation() -> None:
    books = ledger()
    books.reserve(A, {RAM: 7})
    assert books.commit(A, {RAM: 5}) == 0
    account = books.account(RAM)
    assert (account.reserved_bytes, account.committed_bytes) == (0, 5)
    assert books.room(RAM) == 5


def test_what_an_engine_holds_counts_towards_its_next_reservation() -> None:
    books = ledger()
    books.commit(A, {RAM: 6})
    books.reserve(A, {RAM: 8})
    assert books.held(RAM, A) == 8


def test_use_without_room_is_a_debt_that_freed_bytes_pay_first() -> None:
    books = ledger()
    books.commit(A, {RAM: 6})
    assert books.commit(B, {RAM: 7}) == 3
    account = books.account(RAM)
    assert account.committed_bytes == 10
    assert account.excess_bytes == 3
    assert books.room(RAM) == -3
    books.release(A, (RAM,))
    assert books.account(RAM).excess_bytes == 0
    assert books.room(RAM) == 3


def test_real_use_outranks_claims() -> None:
    books = ledger()
    books.commit(A, {RAM: 4})
    books.claim(C, {RAM: 6})
    assert books.commit(A, {RAM: 9}) == 0
    assert books.account(RAM).reserved_bytes == 0


def test_releasing_what_is_not_there_changes_nothing() -> None:
    books = ledger()
    books.release(A, (RAM,))
    assert books.room(RAM) == 10


@pytest.mark.parametrize("verb", ["reserve", "claim"])
def test_what_has_no_room_on_one_device_takes_nothing_on_the_others(verb: str) -> None:
    books = Ledger({RAM: 10, GPU: 10})
    books.commit(B, {GPU: 5})
    with pytest.raises(LedgerViolation):
        getattr(books, verb)(A, {RAM: 6, GPU: 6})
    assert books.room(RAM) == 10
    getattr(books, verb)(A, {RAM: 6, GPU: 5})
    assert (books.room(RAM), books.room(GPU)) == (4, 0)


def test_cancelling_a_promise_leaves_what_is_in_use() -> None:
    books = ledger()
    books.commit(A, {RAM: 2})
    books.reserve(A, {RAM: 7})
    books.cancel(A, (RAM,))
    assert books.held(RAM, A) == books.committed(RAM, A) == 2
    assert books.room(RAM) == 8


def test_a_promise_that_is_cancelled_pays_the_debt_of_others() -> None:
    books = ledger()
    books.reserve(A, {RAM: 7})
    assert books.commit(B, {RAM: 5}) == 2
    books.cancel(A, (RAM,))
    assert books.account(RAM).excess_bytes == 0
    assert books.room(RAM) == 5

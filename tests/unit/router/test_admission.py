"""Leases: each is ended exactly once, whatever crosses whatever."""

import asyncio
from collections.abc import Callable

import pytest

from swapserve.errors import EngineCrashed, QueueFull
from swapserve.ids import EngineName
from swapserve.messages import Ask, Event, LeaseEnded, LeaseRequested, Used
from swapserve.router.admission import Admission, Lease, Place
from swapserve.states import LeaseState, Priority

pytestmark = pytest.mark.anyio
ENGINE = EngineName("e")
ASK = Ask(priority=Priority.BATCH, deadline_s=3.0, tokens_in=7.0, key="k", conversation=5)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Desk:
    """An admission whose scheduler is the test."""

    def __init__(self) -> None:
        self.posted: list[Event] = []
        self.now = 100.0
        self.admission = Admission(
            post=self.posted.append,
            place=lambda _: Place(host="h", port=1),
            clock=lambda: self.now,
        )

    def ends(self) -> int:
        return sum(isinstance(event, LeaseEnded) for event in self.posted)


async def test_a_granted_lease_is_ended_once_on_the_way_out() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE, ASK) as lease:
        assert desk.posted == [LeaseRequested(lease=lease.id, engine=ENGINE, ask=ASK)]
        desk.now = 103.0
        desk.admission.granted(lease.id)
        await lease.granted()
        states = [lease.state]
        assert lease.granted_at == 103.0
    assert desk.posted[1:] == [LeaseEnded(lease=lease.id)]
    assert [*states, lease.state] == [LeaseState.ACTIVE, LeaseState.ENDED]


async def test_waiting_goes_on_through_a_suspension() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE, ASK) as lease, asyncio.TaskGroup() as group:
        desk.admission.granted(lease.id)
        desk.admission.suspended(lease.id)
        waiter = group.create_task(lease.granted())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiter.done()
        assert lease.state is LeaseState.SUSPENDED
        desk.admission.resumed(lease.id)
        await waiter
        assert lease.suspensions == 1


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (Admission.refused, QueueFull(ENGINE, 1)),
        (Admission.lost, EngineCrashed(ENGINE, "exit 1")),
    ],
)
async def test_a_lease_that_the_scheduler_ended_is_not_ended_again(
    call: Callable[..., None], error: Exception
) -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE, ASK) as lease:
        call(desk.admission, lease.id, error)
        with pytest.raises(type(error)):
            await lease.granted()
    assert desk.ends() == 0


async def test_a_lost_lease_tells_whoever_asks() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE, ASK) as lease:
        desk.admission.granted(lease.id)
        assert not lease.lost.done()
        desk.admission.lost(lease.id, EngineCrashed(ENGINE, "exit 1"))
        assert isinstance(await lease.lost, EngineCrashed)


async def test_cancellation_in_the_queue_ends_the_lease() -> None:
    desk = Desk()

    async def request() -> None:
        async with desk.admission.lease(ENGINE, ASK) as lease:
            await lease.granted()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(request())
        await asyncio.sleep(0)
        task.cancel()
    assert desk.ends() == 1


async def test_effects_that_cross_the_end_of_a_lease_are_ignored() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE, ASK) as lease:
        pass
    error = EngineCrashed(ENGINE, "exit 1")
    desk.admission.granted(lease.id)
    desk.admission.suspended(lease.id)
    desk.admission.resumed(lease.id)
    desk.admission.refused(lease.id, error)
    desk.admission.lost(lease.id, error)
    assert lease.state is LeaseState.ENDED
    assert not lease.lost.done()
    assert desk.ends() == 1


async def test_every_lease_has_a_name_of_its_own() -> None:
    desk = Desk()
    leases: list[Lease] = []
    for _ in range(3):
        async with desk.admission.lease(ENGINE, ASK) as lease:
            leases.append(lease)
    assert len({lease.id for lease in leases}) == 3


async def test_what_was_used_is_told_at_the_end_if_the_answer_was_whole() -> None:
    desk = Desk()
    used = Used(tokens_in=7.0, tokens_out=3.0, prefill_s=None, decode_s=1.0)
    async with desk.admission.lease(ENGINE, ASK) as lease:
        desk.admission.granted(lease.id)
        lease.used = used
    assert desk.posted[-1] == LeaseEnded(lease=lease.id, used=used)


async def test_a_lease_knows_when_its_engine_was_away() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE, ASK) as lease:
        desk.admission.granted(lease.id)
        assert not lease.away(0.0, 1e9)
        for left, back in ((110.0, 120.0), (130.0, 140.0)):
            desk.now = left
            desk.admission.suspended(lease.id)
            assert lease.away(left, left)
            assert lease.away(left + 1e6, left + 2e6)
            desk.now = back
            desk.admission.resumed(lease.id)
        assert lease.away(115.0, 116.0)
        assert lease.away(120.0, 125.0)
        assert lease.away(135.0, 150.0)
        assert lease.away(0.0, 110.0)
        for begin, end in ((100.0, 109.9), (120.1, 129.9), (140.1, 1e9)):
            assert not lease.away(begin, end)
        assert lease.suspensions == 2

"""Leases: each is ended exactly once, whatever crosses whatever."""

import asyncio
from collections.abc import Callable

import pytest

from swapserve.errors import EngineCrashed, QueueFull
from swapserve.ids import EngineName
from swapserve.messages import Event, LeaseEnded, LeaseRequested
from swapserve.router.admission import Admission, Lease, Place
from swapserve.states import LeaseState

pytestmark = pytest.mark.anyio
ENGINE = EngineName("e")


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
    async with desk.admission.lease(ENGINE) as lease:
        assert desk.posted == [LeaseRequested(lease=lease.id, engine=ENGINE)]
        desk.now = 103.0
        desk.admission.granted(lease.id)
        await lease.granted()
        states = [lease.state]
        assert lease.granted_at == 103.0
    assert desk.posted[1:] == [LeaseEnded(lease=lease.id)]
    assert [*states, lease.state] == [LeaseState.ACTIVE, LeaseState.ENDED]


async def test_waiting_goes_on_through_a_suspension() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE) as lease, asyncio.TaskGroup() as group:
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
    async with desk.admission.lease(ENGINE) as lease:
        call(desk.admission, lease.id, error)
        with pytest.raises(type(error)):
            await lease.granted()
    assert desk.ends() == 0


async def test_a_lost_lease_tells_whoever_asks() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE) as lease:
        desk.admission.granted(lease.id)
        assert not lease.lost.done()
        desk.admission.lost(lease.id, EngineCrashed(ENGINE, "exit 1"))
        assert isinstance(await lease.lost, EngineCrashed)


async def test_cancellation_in_the_queue_ends_the_lease() -> None:
    desk = Desk()

    async def request() -> None:
        async with desk.admission.lease(ENGINE) as lease:
            await lease.granted()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(request())
        await asyncio.sleep(0)
        task.cancel()
    assert desk.ends() == 1


async def test_effects_that_cross_the_end_of_a_lease_are_ignored() -> None:
    desk = Desk()
    async with desk.admission.lease(ENGINE) as lease:
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
        async with desk.admission.lease(ENGINE) as lease:
            leases.append(lease)
    assert len({lease.id for lease in leases}) == 3

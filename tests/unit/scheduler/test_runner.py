"""The runner: events in, effects through the ports, the timer, commands."""

import asyncio
from collections.abc import Callable

import pytest

from swapserve.errors import CapacityError, ShuttingDown, SwapServeError
from swapserve.ids import EngineName, LeaseId
from swapserve.messages import (
    BringIn,
    EngineLeft,
    EngineReady,
    EngineSeen,
    LeaseRequested,
    SwapOut,
)
from swapserve.scheduler.core import Core
from swapserve.scheduler.runner import Runner
from swapserve.states import EngineState, Tier
from tests.stateful.world import DEVICE, World, engine

A = EngineName("a")


class Ports:
    """Engines that obey at once, and a record of what leases were told."""

    def __init__(self) -> None:
        self.runner: Runner
        self.told: list[str] = []
        self.changed = asyncio.Event()

    def _tell(self, text: str) -> None:
        self.told.append(text)
        self.changed.set()

    async def until(self, text: str) -> None:
        async with asyncio.timeout(10):
            while text not in self.told:
                self.changed.clear()
                await self.changed.wait()

    def bring_in(self, order: BringIn) -> None:
        self._tell(f"in {order.engine}, to {order.to}")
        self.runner.post(EngineReady(engine=order.engine, footprint={DEVICE: 6}, seconds=0.0))

    def swap_out(self, order: SwapOut) -> None:
        self._tell(f"out {order.engine} {order.in_flight} {order.cause}, to {order.to}")
        self.runner.post(EngineLeft(engine=order.engine, tier=Tier.DISK, seconds=0.0))

    def stop(self, engine: EngineName) -> None:
        self._tell(f"stop {engine}")
        self.runner.post(EngineLeft(engine=engine, tier=Tier.NONE, seconds=0.0))

    def drain(self, engine: EngineName, on: bool) -> None:
        self._tell(f"drain {engine} {on}")

    def granted(self, lease: LeaseId) -> None:
        self._tell(f"granted {lease}")

    def refused(self, lease: LeaseId, error: SwapServeError) -> None:
        self._tell(f"refused {lease} {error.code}")

    def suspended(self, lease: LeaseId) -> None:
        self._tell(f"suspended {lease}")

    def resumed(self, lease: LeaseId) -> None:
        self._tell(f"resumed {lease}")

    def lost(self, lease: LeaseId, error: SwapServeError) -> None:
        self._tell(f"lost {lease} {error.code}")


def build(ports: Ports, *, quantum: float = 0.05) -> Runner:
    specs = (engine("a"), engine("b"), engine("huge", 11))
    plan = World(*specs, quantum=quantum, see=False)
    runner = Runner(Core(plan.devices, specs, plan.rules, plan.policy), ports, ports)
    ports.runner = runner
    for spec in specs:
        runner.post(
            EngineSeen(
                engine=spec.name,
                state=EngineState.STOPPED,
                tier=Tier.NONE,
                footprint=None,
                can_preempt=True,
            )
        )
    return runner


def with_runner(check: Callable[[Runner, Ports], object]) -> None:
    async def main() -> None:
        ports = Ports()
        runner = build(ports)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(runner.run())
            await check(runner, ports)  # type: ignore[misc]
            task.cancel()

    asyncio.run(main())


def test_effects_go_through_the_ports_and_the_timer_rings() -> None:
    async def check(runner: Runner, ports: Ports) -> None:
        runner.post(LeaseRequested(lease=LeaseId("1"), engine=A))
        runner.post(LeaseRequested(lease=LeaseId("2"), engine=EngineName("b")))
        await ports.until("granted 2")
        await ports.until("resumed 1")
        assert ports.told[:5] == [
            "in a, to device",
            "granted 1",
            "suspended 1",
            "out a 1 room for b, to disk",
            "in b, to device",
        ]

    with_runner(check)


def test_a_command_waits_for_its_outcome() -> None:
    async def check(runner: Runner, ports: Ports) -> None:
        await runner.command("swap_in", A)
        assert ports.told == ["in a, to device"]
        await runner.command("stop", A)
        assert runner.core.state(A) is EngineState.STOPPED

    with_runner(check)


def test_a_command_that_fails_raises_its_error() -> None:
    async def check(runner: Runner, ports: Ports) -> None:
        with pytest.raises(CapacityError):
            await runner.command("swap_in", EngineName("huge"))
        assert ports.told == []

    with_runner(check)


def test_cancelling_the_wait_does_not_cancel_the_command() -> None:
    async def check(runner: Runner, ports: Ports) -> None:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(runner.command("swap_in", A))
            await asyncio.sleep(0)
            waiting.cancel()
        await ports.until("in a, to device")

    with_runner(check)


def test_commands_end_when_the_runner_ends() -> None:
    async def main() -> None:
        runner = build(Ports())
        async with asyncio.TaskGroup() as group:
            task = group.create_task(runner.run())
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(ShuttingDown):
            await runner.command("pin", A)

    asyncio.run(main())

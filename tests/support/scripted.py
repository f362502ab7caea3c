"""A keeper and an engine that do as they are told, for what is above them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from swapserve.config.recipes import Mechanism, Recipe
from swapserve.config.schema import ImagesConfig, ModelConfig
from swapserve.engines.base import Canary, Rest
from swapserve.ids import DeviceName, EngineName
from swapserve.keeper.client import KeeperClient
from swapserve.keeper.protocol import Held, Holding, ImageKind, Measured, VerbReport
from swapserve.states import Tier
from swapserve.swap.moves import Mover

GPU, UUID = DeviceName("gpu0"), "GPU-0"
MIB = 1 << 20
ON_GPU = ModelConfig(
    name=EngineName("a"),
    recipe=Recipe(name="generic", adapter="generic", argv=("a",)),
    devices=(GPU,),
    gpus=(UUID,),
    ram=DeviceName("host"),
    tiers=(Tier.HOST,),
)
RUNNING = Holding(
    engine="a",
    held=Held.RUNNING,
    verb=None,
    pid=1,
    address="127.0.0.1:1",
    golden=False,
    live_image_bytes=0,
    golden_image_bytes=0,
    restored_from=None,
    can_dump=False,
    can_suspend=True,
)
SUSPENDED = replace(RUNNING, held=Held.SUSPENDED, host_bytes=100 * MIB)
NOTHING = replace(RUNNING, held=Held.NOTHING, pid=None)

Does = Exception | Callable[[], Awaitable[None]]


@dataclass
class Script:
    """What was called, and what is to fail or to happen at a call."""

    calls: list[str] = field(default_factory=list)
    does: dict[str, Does] = field(default_factory=dict)

    async def run(self, name: str) -> None:
        self.calls.append(name)
        does = self.does.get(name)
        if isinstance(does, Exception):
            raise does
        if does is not None:
            await does()


class ScriptedKeeper(KeeperClient):
    """Verbs take no time and do what they say, unless they were told otherwise."""

    def __init__(self, script: Script, held: Holding = RUNNING) -> None:
        self.script = script
        self.held = held
        self.measured = Measured(host_bytes=MIB, device_bytes={UUID: 100 * MIB}, dump_bytes=MIB)
        self.moved = 100 * MIB

    async def _carry_out(self, verb: str, held: Holding) -> VerbReport:
        await self.script.run(verb)
        self.held = held
        moved = self.moved if held.held is Held.SUSPENDED else 0
        return VerbReport(seconds=0.0, bytes=moved)

    async def holding(self, engine: EngineName, *, settled: bool = False) -> Holding:
        if settled:
            await self.script.run("settled")
        return self.held

    async def spawn(self, engine: EngineName) -> VerbReport:
        return await self._carry_out("spawn", RUNNING)

    async def suspend(self, engine: EngineName) -> VerbReport:
        return await self._carry_out("suspend", SUSPENDED)

    async def resume(self, engine: EngineName) -> VerbReport:
        runs = replace(self.held, held=Held.RUNNING, pid=RUNNING.pid, host_bytes=0)
        return await self._carry_out("resume", runs)

    async def dump(
        self, engine: EngineName, kind: ImageKind, canary: dict[str, Any] | None = None
    ) -> VerbReport:
        live = replace(NOTHING, held=Held.LIVE_IMAGE)
        return await self._carry_out(f"dump {kind}", live if kind == "live" else self.held)

    async def restore(
        self, engine: EngineName, kind: ImageKind, *, resume: bool = True
    ) -> VerbReport:
        """Restore; from a golden image, that stays."""
        golden = kind == "golden"
        if resume:
            return await self._carry_out(
                f"restore {kind}", replace(RUNNING, golden=golden, restored_from=kind)
            )
        rests = replace(
            self.held,
            held=Held.SUSPENDED,
            pid=SUSPENDED.pid,
            host_bytes=SUSPENDED.host_bytes,
            golden=golden,
            restored_from=kind,
        )
        return await self._carry_out(f"promote {kind}", rests)

    async def discard(self, engine: EngineName) -> VerbReport:
        return await self._carry_out("discard", NOTHING)

    async def stop(self, engine: EngineName, grace_s: float) -> VerbReport:
        return await self._carry_out("stop", NOTHING)

    async def drop_image(self, engine: EngineName, kind: ImageKind) -> VerbReport:
        return await self._carry_out(f"drop {kind}", self.held)

    async def canary_passed(self, engine: EngineName) -> None:
        await self.script.run("canary_passed")

    async def measure(self, engine: EngineName) -> Measured:
        await self.script.run("measure")
        return self.measured

    async def log_tail(self, engine: EngineName, lines: int) -> str:
        return "its last words"


class ScriptedEngine:
    """An adapter."""

    def __init__(self, script: Script, *mechanisms: Mechanism) -> None:
        self.script = script
        self.mechanisms = frozenset(mechanisms)
        self.asleep: bool | None = False
        self.sick = 0
        """How many probes fail before one succeeds."""
        self.says: Canary | None = None

    async def healthy(self, address: str) -> bool:
        await self.script.run("healthy")
        self.sick -= 1
        return self.sick < 0

    async def warm_up(self, address: str) -> Canary | None:
        await self.script.run("warm_up")
        return self.says

    async def rest(self, address: str, how: Rest) -> None:
        await self.script.run(how)
        self.asleep = True

    async def wake(self, address: str) -> None:
        await self.script.run("wake")
        self.asleep = False

    async def resting(self, address: str) -> bool | None:
        await self.script.run("resting")
        return self.asleep


class Stage:
    """An engine's moves, with a keeper and an engine that are scripted."""

    def __init__(
        self, *mechanisms: Mechanism, held: Holding = RUNNING, model: ModelConfig = ON_GPU
    ) -> None:
        self.script = Script()
        self.keeper = ScriptedKeeper(self.script, held)
        self.engine = ScriptedEngine(self.script, *mechanisms)
        self.notices: list[str] = []
        self.mover = Mover(
            model,
            ImagesConfig(),
            self.keeper,
            self.engine,
            close_idle=lambda: self.script.run("close_idle"),
            notice=self.notices.append,
        )

    @property
    def did(self) -> list[str]:
        """Return what was called since the last time."""
        calls, self.script.calls = self.script.calls, []
        return calls

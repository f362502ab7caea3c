"""One simulated engine: where it is, what moves it, and the server inside."""

from evaluation.simulate.cluster import Model, gpu_name
from evaluation.simulate.server import NEVER, Server
from swapserve.messages import Footprint
from swapserve.states import EngineState, Tier


class IllegalEffect(Exception):
    """The core asked for something that a machine cannot do, or that costs an answer."""


class Engine:
    """One engine. `World` and `Books` write it."""

    __slots__ = (
        "active",
        "gpus",
        "host_bytes",
        "index",
        "kept",
        "kind",
        "model",
        "move_end",
        "name",
        "parts",
        "pending",
        "server",
        "state",
        "suspended",
        "target",
        "tier",
        "took_s",
        "works",
    )

    def __init__(self, index: int, model: Model, server: Server) -> None:
        self.index = index
        self.model = model
        self.kind = model.kind
        self.name = model.name
        self.gpus = model.gpus
        self.server = server
        self.state = EngineState.STOPPED
        self.tier = Tier.NONE
        self.target = Tier.NONE
        """Where the move under way ends."""
        self.kept = False
        """Whether what rests of it holds its requests and cache."""
        self.host_bytes = 0
        """What it holds of host memory."""
        self.move_end = NEVER
        self.took_s = 0.0
        """How long its last move takes."""
        self.active = 0
        self.suspended = 0
        self.works = False
        self.parts = 1
        """Into how many its GPU's time is divided."""
        self.pending = NEVER
        """When the agenda's entry for it is due."""

    def footprint(self) -> Footprint:
        """Return what it holds of its GPUs while it serves."""
        return {gpu_name(gpu): self.kind.bytes for gpu in self.gpus}

    def residue(self) -> Footprint:
        """Return what it still holds of them where it rests now."""
        kept = self.kind.residue_bytes if self.tier is Tier.HOST else 0
        return {gpu_name(gpu): kept for gpu in self.gpus} if kept else {}

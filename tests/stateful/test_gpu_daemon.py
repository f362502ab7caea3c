"""The real daemon and keeper on the stand-in driver: clients, operators, faults, crashes."""

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from tests.support.gpu_daemon import MIB, cuda, gpu_site
from tests.support.gpu_world import GpuWorld, Part, looping

NAMES = ("a", "b", "c")
"""`a` and `b` do not fit together; `c` is half as large, unmeasured, and may sleep."""
ON_HOST: dict[str, Any] = {"tiers": ["host"], "sandbox": False}
PACE = ("--dialect=vllm", "--delay-per-token=0.005")
EXAMPLES = int(os.environ.get("SWAPSERVE_GPU_EXAMPLES", "0"))
"""More of them, other ones each time, by hand."""
STEPS = 14
GPU_BYTES = 48 * MIB
FAULTS = {
    "state": ("error", "hang_before", "kill_caller"),
    "thread": ("error", "hang_before", "kill_caller"),
    "lock": ("error", "error_after", "timeout", "hang", "hang_before", "hang_after", "kill_caller"),
    "checkpoint": (
        *("error", "error_after", "failed", "slow", "linger"),
        *("hang_after", "kill_caller", "kill_target"),
    ),
    "restore": (
        *("error", "error_after", "failed", "oom", "slow"),
        *("hang_before", "kill_caller", "kill_target"),
    ),
    "unlock": ("error", "error_after", "hang_before", "hang_after", "kill_caller"),
}
faults = st.one_of(
    *(st.tuples(st.just(op), st.sampled_from(kinds)) for op, kinds in FAULTS.items())
)
names = st.sampled_from(NAMES)


class GpuDaemon(RuleBasedStateMachine):
    """Everything that may happen to a daemon; what must hold is checked at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._world: GpuWorld | None = None

    @property
    def world(self) -> GpuWorld:
        assert self._world is not None
        return self._world

    @initialize()
    def begin(self) -> None:
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-")))
        here = self._stack.enter_context(
            gpu_site(
                directory,
                NAMES[:2],
                gpus=(GPU_BYTES,),
                recipe_changes={
                    "adapter": "vllm",
                    "gpu_args": ["--enable-sleep-mode"],
                    "gpu_env": {"VLLM_SERVER_DEV_MODE": "1"},
                    "mechanisms": ["checkpoint", "lean", "sleep", "deep_sleep", "restart"],
                },
                args=PACE,
                model={**ON_HOST, "mechanism": "checkpoint"},
                keeper={"cuda_lock_timeout": "500ms"},
                scheduling={"quantum": "100ms", "max_wait": "2s", "retry_backoff": "100ms"},
            )
        )
        third = cuda("c", here.gpus, *PACE, share=0.3, mechanism="auto", **ON_HOST)
        del third["memory"]
        here.site.models = [*here.site.models, third]
        here.site.configure(here.site.models, **here.site.sections)
        self._world = GpuWorld(here, self._stack.enter_context(looping()))
        for name in NAMES:
            self.world.ask(name, 4)

    @rule(model=names, tokens=st.sampled_from([4, 60, 400]))
    def ask(self, model: str, tokens: int) -> None:
        self.world.ask(model, tokens)

    @rule(model=names, tokens=st.sampled_from([4, 60, 400]))
    def ask_more(self, model: str, tokens: int) -> None:
        self.world.ask(model, tokens)

    @rule(which=st.integers(0, 7))
    def cancel(self, which: int) -> None:
        if open_ones := self.world.open():
            self.world.leave(open_ones[which % len(open_ones)])

    @rule(
        verb=st.sampled_from(["swap-in", "swap-out", "swap-out", "stop", "start", "pin", "unpin"]),
        model=names,
    )
    def command(self, verb: str, model: str) -> None:
        self.world.command(verb, model)

    @rule(fault=faults, nth=st.sampled_from([1, 1, 1, 2, 3]), order=st.permutations("abc"))
    def go_wrong(self, fault: tuple[str, str], nth: int, order: list[str]) -> None:
        """Let a call of the driver fail soon: these three take turns on the GPU."""
        self.world.fault(*fault, nth)
        for name in order:
            self.world.ask(name, 4)

    @rule(model=names, part=st.sampled_from(["front", "rank"]))
    def kill_engine(self, model: str, part: Part) -> None:
        self.world.kill_engine(model, part)

    @rule(share=st.sampled_from([0.0, 0.5]))
    def foreign(self, share: float) -> None:
        self.world.foreign(share)

    @rule(who=st.sampled_from(["daemon", "keeper"]))
    def kill(self, who: str) -> None:
        if who == "daemon":
            self.world.kill_daemon()
        else:
            self.world.kill_keeper()

    @rule(seconds=st.sampled_from([0.02, 0.2, 0.8]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    def teardown(self) -> None:
        broken = sys.exc_info()[0] is not None
        with self._stack:
            if self._world is None or broken:
                return
            try:
                self.world.settle()
            except BaseException:
                self.world.tell()
                raise


@pytest.mark.slow
@pytest.mark.timeout(0 if EXAMPLES else 400)
def test_whatever_happens_answers_are_right_and_nothing_is_left() -> None:
    run_state_machine_as_test(
        GpuDaemon,
        settings=settings(
            max_examples=EXAMPLES or 6,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not EXAMPLES,
            database=None,
            phases=[Phase.generate],  # to shrink one takes too long; its steps are printed
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )

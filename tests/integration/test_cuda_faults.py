"""Whatever goes wrong, in whatever combination: what was promised of the outcome holds."""

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from swapserve.errors import CudaError
from swapserve.keeper.cuda.calls import CudaState
from swapserve.keeper.phases import Phases
from tests.support.cuda_bench import Bench, bench, hurry
from tests.support.cuda_target import Target, target

ENGINE = 3
FAULTS = {
    "state": ("error", "hang_before", "kill_caller"),
    "thread": ("error", "hang_before", "kill_caller"),
    "lock": ("error", "error_after", "timeout", "hang", "hang_before", "hang_after", "kill_caller"),
    "checkpoint": ("error", "error_after", "failed", "linger", "hang_after", "kill_caller"),
    "restore": ("error", "error_after", "failed", "oom", "hang_before", "kill_target"),
    "unlock": ("error", "error_after", "hang_before", "hang_after", "kill_caller"),
}
faults = st.one_of(
    *(
        st.tuples(st.just(op), st.sampled_from(kinds), st.integers(1, 4))
        for op, kinds in FAULTS.items()
    )
)


async def outcome(here: Bench, engine: list[Target]) -> str:
    """Suspend and resume; return what was promised at the end."""
    try:
        moved = await here.suspended(*engine)
    except CudaError as error:
        return "lost" if error.lost else "running"
    assert here.gpu.used(here.gpu.uuids[0]) == 0
    try:
        await here.resumed(moved, *engine)
    except CudaError as error:
        return "lost" if error.lost else "suspended"
    return "running"


async def play(
    directory: Path, wrong: list[tuple[str, str, int]], patch: pytest.MonkeyPatch
) -> None:
    async with bench(directory, patch, legal=False) as here:
        with ExitStack() as targets:
            engine = [targets.enter_context(target(here.gpu.env, mib=1)) for _ in range(ENGINE)]
            for op, kind, nth in wrong:
                here.gpu.fault(op, kind, nth=nth)
            promised = await outcome(here, engine)
            here.gpu.clear_faults()
            if promised == "running":
                assert await here.running(*engine)
            elif promised == "suspended":
                assert set(await here.states(*engine)) == {CudaState.CHECKPOINTED}
            else:
                assert here.gpu.illegal() == []
                settled = await here.tree(*engine).settle({}, Phases())
                left = [one for one in engine if one.ref.alive()]
                assert settled.state != "none" or not left
                assert settled.state != "running" or await here.running(*left)
        # A keeper kills what it has lost; asked to mend it here, it may try what cannot be mended.
        assert {call.illegal for call in here.gpu.illegal()} <= {
            "restore after an out-of-memory restore"
        }


@pytest.mark.slow
@pytest.mark.timeout(400)
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),  # what hangs takes seconds each time: no shrinking
    suppress_health_check=list(HealthCheck),
)
@given(wrong=st.lists(faults, min_size=1, max_size=3))
def test_the_outcome_is_as_promised(wrong: list[tuple[str, str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        hurry(patch)
        asyncio.run(play(Path(directory), wrong, patch))

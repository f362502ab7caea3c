"""What an engine's actor learns of it, and what it takes for no lesson."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.errors import CudaError, KeeperError, QuiesceFailed, SwapServeError
from swapserve.ids import DeviceName
from swapserve.keeper.protocol import Measured
from swapserve.lifecycle.figures import Figures
from swapserve.lifecycle.journal import Journal
from swapserve.states import Tier
from swapserve.swap.mechanisms import TRIES, Choice
from tests.support.scripted import GPU, MIB, ON_GPU, RUNNING, UUID

ALL: frozenset[Mechanism] = frozenset({"checkpoint", "lean", "sleep", "deep_sleep", "restart"})
UNSEEN = Measured(host_bytes=9 * MIB, device_bytes={}, dump_bytes=0)
KEPT = CudaError("a", "lock", "busy", lost=False)


def taking(size: int) -> Measured:
    return replace(UNSEEN, device_bytes={UUID: size})


class Known(Figures):
    """Figures whose journal and choice can be looked into."""

    def __init__(
        self, path: Path, model: ModelConfig = ON_GPU, mechanisms: frozenset[Mechanism] = ALL
    ) -> None:
        self.journal = Journal(path / "journal.json")
        self.journal.open()
        super().__init__(model, self.journal, mechanisms)

    def record(self, mechanism: Mechanism) -> tuple[list[float], list[float], int]:
        """Return seconds out, seconds in and failures, as they are remembered."""
        found = self.journal.costs("a")["records"].get(mechanism)
        return ([], [], 0) if found is None else (found["out"], found["in"], found["failures"])

    def swap(self, way: str, back: str, out_s: float = 1.0, in_s: float = 2.0) -> None:
        self.left(way, out_s, rested=False)  # type: ignore[arg-type]
        self.came(back, in_s)  # type: ignore[arg-type]


# ----------------------------------------------------------------- footprint


def test_a_reading_is_remembered_by_device(tmp_path: Path) -> None:
    figures = Known(tmp_path)
    assert figures.measured(taking(100)) == {GPU: 100}
    assert figures.footprint == {GPU: 100}
    assert Known(tmp_path).footprint_bytes == 100


def test_a_serving_engine_that_nvml_does_not_list_is_not_one_that_takes_nothing(
    tmp_path: Path,
) -> None:
    figures = Known(tmp_path)
    assert figures.measured(UNSEEN) is None
    assert figures.footprint is None, "it would be let in beside what fills the GPU"
    figures.measured(taking(100))
    assert figures.measured(UNSEEN) is None
    assert figures.footprint == {GPU: 100}


def test_a_gpu_of_several_that_is_not_used_is_a_reading(tmp_path: Path) -> None:
    two = replace(ON_GPU, devices=(GPU, DeviceName("gpu1")), gpus=(UUID, "GPU-1"))
    assert Known(tmp_path, two).measured(taking(100)) == {GPU: 100, "gpu1": 0}


def test_off_a_gpu_its_ram_counts(tmp_path: Path) -> None:
    host = replace(ON_GPU, devices=(DeviceName("host"),), gpus=())
    assert Known(tmp_path, host).measured(UNSEEN) == {"host": 9 * MIB}


def test_what_is_configured_goes_before_what_is_measured(tmp_path: Path) -> None:
    figures = Known(tmp_path, replace(ON_GPU, memory_bytes=500))
    figures.measured(taking(100))
    assert figures.footprint == {GPU: 500}


def test_what_an_engine_asleep_keeps_is_what_it_had_less_what_it_has(tmp_path: Path) -> None:
    figures = Known(tmp_path)
    figures.measured(taking(100))
    assert figures.rested("sleep", taking(10)) == {GPU: 10}
    figures.left("sleep", 1.0, rested=False)
    assert figures.kept_bytes == 90
    figures.left("checkpoint", 1.0, rested=True)
    assert figures.kept_bytes == 90, "the driver has moved only what was left on the GPU"
    figures.came("resume", 1.0)
    assert figures.kept_bytes == 0
    assert figures.rested("deep_sleep", taking(10)) == {GPU: 10}
    assert figures.kept_bytes == 0


def test_one_that_was_listed_and_is_no_longer_has_given_all_back(tmp_path: Path) -> None:
    figures = Known(tmp_path)
    figures.measured(taking(100))
    assert figures.rested("sleep", UNSEEN) == {GPU: 0}


def test_what_one_that_was_never_listed_has_given_back_nobody_knows(tmp_path: Path) -> None:
    figures = Known(tmp_path, replace(ON_GPU, memory_bytes=500))
    with pytest.raises(QuiesceFailed):
        figures.rested("sleep", UNSEEN)
    with pytest.raises(QuiesceFailed):
        figures.found_asleep(UNSEEN)


@pytest.mark.parametrize(
    ("wanted", "mechanisms", "kept"),
    [
        ("auto", ALL, 90),
        ("auto", ALL - {"sleep"}, 0),
        ("sleep", ALL, 90),
        ("deep_sleep", ALL, 0),
    ],
)
def test_of_one_found_asleep_the_most_is_assumed_that_it_may_have_kept(
    tmp_path: Path, wanted: Mechanism, mechanisms: frozenset[Mechanism], kept: int
) -> None:
    Known(tmp_path).measured(taking(100))
    figures = Known(tmp_path, replace(ON_GPU, mechanism=wanted), mechanisms)
    assert figures.found_asleep(taking(10)) == {GPU: 10}
    assert figures.kept_bytes == kept


# --------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("way", "back", "mechanism"),
    [
        ("checkpoint", "resume", "checkpoint"),
        ("lean", "resume", "lean"),
        ("sleep", "wake", "sleep"),
        ("deep_sleep", "wake", "deep_sleep"),
        ("discard", "golden", "restart"),
        ("kill", "cold", "restart"),
    ],
)
def test_a_way_out_and_its_way_back_are_the_cost_of_one_mechanism(
    tmp_path: Path, way: str, back: str, mechanism: Mechanism
) -> None:
    figures = Known(tmp_path)
    figures.swap(way, back)
    assert figures.record(mechanism) == ([1.0], [2.0], 0)
    assert Choice.from_json(Known(tmp_path).journal.costs("a")).as_json()["moves"] == 1


@pytest.mark.parametrize("rescue", ["cold", "golden"])
def test_a_start_after_a_lost_state_is_not_the_cost_of_coming_back(
    tmp_path: Path, rescue: str
) -> None:
    figures = Known(tmp_path)
    figures.left("checkpoint", 1.0, rested=False)
    figures.lost("resume")
    figures.came(rescue, 20.0)  # type: ignore[arg-type]
    assert figures.record("checkpoint") == ([1.0], [], 1), "but it has failed"


def test_a_golden_image_that_fails_makes_a_restart_dear(tmp_path: Path) -> None:
    figures = Known(tmp_path)
    figures.left("discard", 1.0, rested=False)
    figures.lost("golden")
    figures.came("cold", 20.0)
    assert figures.record("restart") == ([1.0], [20.0], 0)


def test_an_end_of_its_own_is_no_failure_of_the_way_it_had_left(tmp_path: Path) -> None:
    figures = Known(tmp_path)
    figures.left("checkpoint", 1.0, rested=False)
    figures.gone()
    figures.came("cold", 20.0)
    assert figures.record("checkpoint") == ([1.0], [], 0)


def test_further_down_is_no_way_out(tmp_path: Path) -> None:
    figures = Known(tmp_path)
    figures.left("checkpoint", 1.0, rested=False)
    figures.left("kill", 0.1, rested=True)
    figures.came("cold", 20.0)
    assert figures.record("checkpoint") == ([1.0], [], 0)
    assert figures.record("restart") == ([], [20.0], 0), "the first start tells what a start costs"


def test_what_an_earlier_daemon_began_is_not_measured(tmp_path: Path) -> None:
    figures = Known(tmp_path)
    figures.came("resume", 2.0)
    assert figures.record("checkpoint") == ([], [], 0)


@pytest.mark.parametrize(
    ("error", "failures"),
    [(KEPT, 1), (KeeperError("'a' cannot suspend: it does not run"), 0)],
)
def test_a_mechanism_that_fails_rests_but_not_for_an_engine_that_had_ended(
    tmp_path: Path, error: SwapServeError, failures: int
) -> None:
    figures = Known(tmp_path)
    figures.swap("checkpoint", "resume")
    figures.failed("checkpoint", error)
    assert figures.record("checkpoint")[2] == failures


def test_a_call_that_the_engine_lacks_is_never_tried_again(tmp_path: Path) -> None:
    figures = Known(tmp_path, mechanisms=frozenset({"sleep", "restart"}))
    lacking = QuiesceFailed("a", "sleep", "404", left_awake=True, unsupported=True)
    figures.failed("sleep", lacking)
    for _ in range(3 * TRIES):
        assert figures.mechanism(RUNNING, in_flight=0, rests=False) == "restart"
        figures.swap("kill", "cold")


# ----------------------------------------------------------------- mechanism


def test_requests_in_flight_go_by_the_driver_or_stay(tmp_path: Path) -> None:
    figures = Known(tmp_path, replace(ON_GPU, mechanism="sleep"))
    assert figures.mechanism(RUNNING, in_flight=1, rests=False) == "checkpoint"
    stuck = replace(RUNNING, can_suspend=False)
    assert figures.mechanism(stuck, in_flight=1, rests=False) is None
    assert figures.mechanism(stuck, in_flight=0, rests=False) == "sleep"


def test_without_host_tier_there_is_no_mechanism(tmp_path: Path) -> None:
    figures = Known(tmp_path, replace(ON_GPU, tiers=(Tier.DISK,)))
    assert figures.mechanism(RUNNING, in_flight=0, rests=False) is None


def test_one_asleep_goes_on_by_the_driver_alone(tmp_path: Path) -> None:
    assert Known(tmp_path).mechanism(RUNNING, in_flight=0, rests=True) == "checkpoint"
    sleeper = Known(tmp_path, mechanisms=frozenset({"sleep", "restart"}))
    assert sleeper.mechanism(RUNNING, in_flight=0, rests=True) is None


def test_a_cache_that_is_to_be_kept_is_slept_over_only_where_an_end_is_all_that_is_left(
    tmp_path: Path,
) -> None:
    """None means an end, or an image where images are possible."""
    always = replace(ON_GPU, keep_cache="always", mechanism="sleep")
    sleeps: frozenset[Mechanism] = frozenset({"sleep", "restart"})
    stuck = replace(RUNNING, can_suspend=False)
    figures = Known(tmp_path, always, sleeps)
    figures.served()
    assert figures.mechanism(stuck, in_flight=0, rests=False) == "sleep"
    disk = Known(tmp_path, replace(always, tiers=(Tier.HOST, Tier.DISK)), sleeps)
    disk.served()
    assert disk.mechanism(replace(stuck, can_dump=True), in_flight=0, rests=False) is None


# --------------------------------------------------------------------- cache


@pytest.mark.parametrize(("keep", "kept"), [("never", False), ("always", True), ("auto", True)])
def test_a_cache_that_saves_much_is_kept_unless_that_is_not_wanted(
    tmp_path: Path, keep: Literal["never", "always", "auto"], kept: bool
) -> None:
    figures = Known(tmp_path, replace(ON_GPU, keep_cache=keep, memory_bytes=10**9))
    figures.served()
    assert figures.keeps_cache(5.0) is kept


@pytest.mark.parametrize("way", ["discard", "kill", "sleep", "deep_sleep", "lean"])
def test_what_has_served_nobody_since_it_lost_its_cache_has_none_to_keep(
    tmp_path: Path, way: str
) -> None:
    figures = Known(tmp_path, replace(ON_GPU, keep_cache="always"))
    assert not figures.keeps_cache(0.0)
    figures.served()
    assert figures.keeps_cache(0.0), "always, whatever it may be worth"
    figures.left("live", 1.0, rested=False)
    figures.came("live", 1.0)
    assert figures.keeps_cache(0.0)
    figures.left(way, 1.0, rested=False)  # type: ignore[arg-type]
    assert not figures.keeps_cache(0.0)


def test_a_cache_is_weighed_against_a_dump_a_guess_first_then_as_measured(tmp_path: Path) -> None:
    figures = Known(tmp_path, replace(ON_GPU, memory_bytes=3 * 10**9))
    assert not figures.keeps_cache(2.9)
    assert figures.keeps_cache(3.1)
    figures.left("live", 8.0, rested=False)
    assert not figures.keeps_cache(7.9)
    assert figures.keeps_cache(8.1)


def test_what_came_by_way_of_host_memory_is_no_lesson_about_the_way_it_had_left(
    tmp_path: Path,
) -> None:
    figures = Known(tmp_path)
    figures.left("discard", 1.0, rested=False)
    figures.promoted()
    figures.came("resume", 0.5)
    assert figures.record("restart") == ([1.0], [], 0)
    assert figures.record("checkpoint") == ([], [], 0)

"""The engine model against hand-computed cases, and against one that counts ticks."""

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.simulate.server import NEVER, Requests, Server, Speed

PLAIN = Speed(prefill_tokens_per_s=100.0, itl_s=0.1, max_seqs=4)

Job = tuple[float, int, int]
"""Arrival, tokens of the prompt, tokens of the answer."""


def drive(
    speed: Speed,
    jobs: Sequence[Job],
    *,
    pauses: Sequence[tuple[float, float]] = (),
    conversation: Sequence[int] = (),
    shares: Sequence[tuple[float, int]] = (),
) -> tuple[list[float], list[float], Server]:
    """Run jobs to their end; return first tokens, ends and the server."""
    first = [-1.0] * len(jobs)
    ends = [-1.0] * len(jobs)
    server = Server(
        speed,
        Requests(
            tokens_in=[job[1] for job in jobs],
            tokens_out=[job[2] for job in jobs],
            conversation=conversation or [0] * len(jobs),
            first_at=first,
        ),
    )
    todo = sorted(
        [
            *((at, 0, lambda n=n: server.add(n)) for n, (at, _, _) in enumerate(jobs)),
            *((begin, 1, server.freeze) for begin, _ in pauses),
            *((end, 2, server.thaw) for _, end in pauses),
            *((at, 3, lambda parts=parts: server.share(parts)) for at, parts in shares),
        ],
        key=lambda one: one[:2],
    )
    while todo or server.due != NEVER:
        if todo and todo[0][0] <= server.due:
            at, _, act = todo.pop(0)
            server.advance(at)
            act()
        else:
            now = server.due
            server.advance(now)
            for done in server.step():
                ends[done] = now
    return first, ends, server


def test_one_request_takes_its_prompt_and_its_gaps() -> None:
    first, ends, server = drive(PLAIN, [(1.0, 50, 11)])
    assert first == [pytest.approx(1.5)]
    assert ends == [pytest.approx(2.5)]
    assert PLAIN.alone_s(50, 11) == pytest.approx(1.5)
    assert server.prompt_tokens == 50
    assert not server.working


def test_prompts_are_done_one_after_another_while_others_get_tokens() -> None:
    first, ends, _ = drive(PLAIN, [(0.0, 100, 11), (0.0, 50, 1)])
    assert first == [pytest.approx(1.0), pytest.approx(1.5)]
    assert ends == [pytest.approx(2.0), pytest.approx(1.5)]


def test_a_full_batch_is_slower_for_all_until_somebody_is_done() -> None:
    speed = Speed(prefill_tokens_per_s=1e9, itl_s=0.1, itl_growth=1.0)
    _, ends, _ = drive(speed, [(0.0, 0, 11), (0.0, 0, 6)])
    # Both get a token each 0.2 s; after five gaps the first one is alone for its other five.
    assert ends == [pytest.approx(1.0 + 0.5), pytest.approx(1.0)]


def test_more_than_fit_queue_in_the_engine() -> None:
    speed = Speed(prefill_tokens_per_s=100.0, itl_s=0.1, max_seqs=1)
    first, ends, _ = drive(speed, [(0.0, 10, 3), (0.0, 10, 1)])
    assert ends[0] == pytest.approx(0.3)
    assert first[1] == pytest.approx(0.4)


def test_a_frozen_engine_keeps_everything_and_does_nothing() -> None:
    jobs = [(0.0, 100, 11), (0.2, 30, 2)]
    undisturbed = drive(PLAIN, jobs)
    first, ends, _ = drive(PLAIN, jobs, pauses=[(0.5, 3.5), (4.2, 5.2)])
    assert first == [pytest.approx(1.0 + 3.0), pytest.approx(1.3 + 4.0)]
    assert ends == [pytest.approx(end + 4.0) for end in undisturbed[1]]


def test_half_of_a_gpu_is_half_as_fast() -> None:
    _, ends, _ = drive(PLAIN, [(0.0, 0, 11)], shares=[(0.5, 2)])
    assert ends == [pytest.approx(0.5 + 2 * 0.5)]


def test_a_prompt_can_block_the_batch() -> None:
    speed = Speed(prefill_tokens_per_s=100.0, itl_s=0.1, prefill_blocks=True)
    first, ends, _ = drive(speed, [(0.0, 0, 11), (0.5, 100, 1)])
    assert first[1] == pytest.approx(1.5)
    assert ends[0] == pytest.approx(2.0)


def test_what_was_said_before_is_not_computed_again() -> None:
    speed = Speed(prefill_tokens_per_s=100.0, itl_s=0.01, cache_tokens=1000)
    jobs = [(0.0, 100, 11), (10.0, 150, 1), (20.0, 150, 1)]
    first, _, server = drive(speed, jobs, conversation=[7, 7, 8])
    assert first[1] - 10.0 == pytest.approx((150 - 111) / 100)
    assert first[2] - 20.0 == pytest.approx(1.5)
    assert server.prompt_tokens == 100 + 39 + 150


def test_the_cache_is_bounded_and_the_oldest_conversation_goes_first() -> None:
    speed = Speed(prefill_tokens_per_s=100.0, itl_s=0.01, cache_tokens=200)
    jobs = [(0.0, 100, 1), (10.0, 120, 1), (20.0, 100, 1), (30.0, 120, 1)]
    first, _, _ = drive(speed, jobs, conversation=[1, 2, 1, 2])
    # The second conversation has taken the place of the first one, and then the other way round.
    assert first[2] - 20.0 == pytest.approx(1.0)
    assert first[3] - 30.0 == pytest.approx(1.2)


def test_a_discarded_engine_has_lost_its_cache_and_must_be_empty() -> None:
    requests = Requests(tokens_in=[10], tokens_out=[5], conversation=[1], first_at=[-1.0])
    server = Server(PLAIN, requests)
    server.add(0)
    with pytest.raises(ValueError, match="1 requests are inside"):
        server.forget()


def test_tokens_made_are_counted_to_the_present() -> None:
    requests = Requests(tokens_in=[100], tokens_out=[50], conversation=[0], first_at=[-1.0])
    server = Server(PLAIN, requests)
    server.add(0)
    server.advance(server.due)
    assert server.tokens_made(0) == 0
    server.step()
    assert server.tokens_made(0) == 1
    server.advance(1.0 + 0.25)
    assert server.tokens_made(0) == 3


# ------------------------------------------------------------- by ticks

TICK_S = 0.002


class Ticked:
    """The same in small steps of time, each request counted by itself."""

    def __init__(self, speed: Speed, jobs: Sequence[Job]) -> None:
        self.first = [-1.0] * len(jobs)
        self.ends = [-1.0] * len(jobs)
        self._speed = speed
        self._jobs = jobs
        self._queue = deque(sorted(range(len(jobs)), key=lambda n: (jobs[n][0], n)))
        self._prompts: deque[list[float]] = deque()
        self._batch: dict[int, float] = {}

    def run(self, pauses: Sequence[tuple[float, float]]) -> None:
        tick = 0
        while any(end < 0 for end in self.ends):
            tick += 1
            now = tick * TICK_S
            if not any(begin < now <= end for begin, end in pauses):
                self._admit(now)
                waiting = bool(self._prompts)
                if not (waiting and self._speed.prefill_blocks):
                    self._decode(now)
                if waiting:
                    self._prefill(now)

    def _admit(self, now: float) -> None:
        speed, queue = self._speed, self._queue
        while (
            queue
            and self._jobs[queue[0]][0] <= now
            and len(self._prompts) + len(self._batch) < speed.max_seqs
        ):
            number = queue.popleft()
            prompt_s = speed.first_s + self._jobs[number][1] / speed.prefill_tokens_per_s
            self._prompts.append([number, prompt_s])

    def _decode(self, now: float) -> None:
        pace = self._speed.itl_s * (1.0 + self._speed.itl_growth * (len(self._batch) - 1))
        for number in list(self._batch):
            self._batch[number] -= TICK_S / pace
            if self._batch[number] <= 1e-6:
                self.ends[number] = now
                del self._batch[number]

    def _prefill(self, now: float) -> None:
        self._prompts[0][1] -= TICK_S
        if self._prompts[0][1] <= 1e-6:
            number = int(self._prompts.popleft()[0])
            self.first[number] = now
            if self._jobs[number][2] == 1:
                self.ends[number] = now
            else:
                self._batch[number] = self._jobs[number][2] - 1


@given(
    jobs=st.lists(
        st.tuples(
            st.integers(0, 40).map(lambda tenths: tenths / 10),
            st.integers(0, 150),
            st.integers(1, 30),
        ),
        min_size=1,
        max_size=7,
    ),
    pause=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    growth=st.sampled_from([0.0, 0.25, 1.0]),
    max_seqs=st.integers(1, 5),
    blocks=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_it_agrees_with_a_simulation_by_ticks(
    jobs: list[Job], pause: tuple[int, int], growth: float, max_seqs: int, *, blocks: bool
) -> None:
    speed = Speed(
        prefill_tokens_per_s=200.0,
        itl_s=0.05,
        itl_growth=growth,
        first_s=0.02,
        max_seqs=max_seqs,
        prefill_blocks=blocks,
    )
    begin = pause[0] / 10 + 0.0501  # between ticks and arrivals
    pauses = [(begin, begin + pause[1] / 10)]
    jobs = sorted(jobs)
    first, ends, _ = drive(speed, jobs, pauses=pauses)
    by_ticks = Ticked(speed, jobs)
    by_ticks.run(pauses)
    # Each change of the batch costs the other one up to a tick for everybody inside.
    allowed = TICK_S * (6 + 4 * len(jobs)) * (1.0 + growth * max_seqs)
    assert first == pytest.approx(by_ticks.first, abs=allowed)
    assert ends == pytest.approx(by_ticks.ends, abs=allowed)

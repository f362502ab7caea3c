"""What hypothesis draws for the random worlds: policies, requests, what they took, times."""

from hypothesis import strategies as st

from swapserve.messages import Ask, Used
from swapserve.scheduler.policies.registry import DEFAULT, POLICIES
from swapserve.states import Priority

policies = st.sampled_from([*(DEFAULT,) * len(POLICIES), *POLICIES])
"""Every policy there is, the default about half of the time."""
seldom = st.sampled_from([False, False, False, True])
"""Most runs must get far: what ends leases and engines happens a quarter of the time."""
slots = st.sampled_from([None, None, 1, 2])
queue_limits = st.sampled_from([None, 1, 2])

asks = st.builds(
    Ask,
    priority=st.sampled_from(Priority),
    deadline_s=st.sampled_from([None] * 8 + [0.0, 1.0, 25.0, 400.0]),
    tokens_in=st.sampled_from([0.0, 1.0, 300.0, 1e6]),
    tokens_max=st.sampled_from([None, 1, 64, 100_000]),
    key=st.sampled_from(["", "batch", "chat"]),
    conversation=st.integers(0, 3),
    streams=st.booleans(),
)
"""Requests of all kinds; most allow any wait."""

used = st.none() | st.builds(
    Used,
    tokens_in=st.sampled_from([0.0, 1.0, 300.0, 1e6]),
    tokens_out=st.sampled_from([0.0, 1.0, 40.0, 1e6]),
    prefill_s=st.sampled_from([None, 0.0, 0.2, 1e4]),
    decode_s=st.sampled_from([None, 0.0, 3.0, 1e4]),
)
"""Whatever an engine may say that a request took, however unlikely; None: it was not answered."""

swap_seconds = st.sampled_from([*(1.0,) * 6, 0.0, 1e-6, 0.3, 4.0, 60.0, 1e4])
"""What a swap may be said to have taken: predictions made from it are wrong."""

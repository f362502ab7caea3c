"""The policies that come with SwapServe, by the names that operators write. Pure."""

from collections.abc import Mapping

from swapserve.scheduler.policies.adaptive import Adaptive
from swapserve.scheduler.policies.base import Policy
from swapserve.scheduler.policies.fifo import FifoDrain
from swapserve.scheduler.policies.recency import Lfu, Lru, LruDrain
from swapserve.scheduler.policies.static import Static
from swapserve.scheduler.policies.time_slice import TimeSliceDrain

DEFAULT = Adaptive.name

_ALL: tuple[type[Policy], ...] = (Adaptive, Lru, Lfu, LruDrain, FifoDrain, TimeSliceDrain, Static)

POLICIES: Mapping[str, type[Policy]] = {kind.name: kind for kind in _ALL}
"""Policy classes by name, the default first."""

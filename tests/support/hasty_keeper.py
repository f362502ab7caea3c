"""A keeper that gives up soon what hangs: `python -m tests.support.hasty_keeper CONFIG`.

Everything else about it is the real one.
"""

import sys

from swapserve.keeper import server
from swapserve.keeper.cuda import crew, pool, suspend, tree

HASTE_S = 2.0
"""Much longer than anything takes on the stand-in that does not hang."""

WAITS = (
    (crew, "PROBE_TIMEOUT_S"),
    (crew, "MOVE_FIXED_S"),
    (crew, "UNLOCK_TIMEOUT_S"),
    (pool, "LOCK_MARGIN_S"),
    (suspend, "FREED_TIMEOUT_S"),
    (tree, "ADMIT_TIMEOUT_S"),
)


def main() -> int:
    """Keep until TERM."""
    for module, name in WAITS:
        assert hasattr(module, name)
        setattr(module, name, HASTE_S)
    return server.main(sys.argv)


if __name__ == "__main__":
    sys.exit(main())

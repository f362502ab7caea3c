"""Work that runs to its end although its caller is cancelled."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def sheltered(
    work: Coroutine[Any, Any, _T], *, cancelled: Callable[[], None] = lambda: None
) -> _T:
    """Await work that must come to an end of its own; the work bounds its own time.

    Cancellation: `cancelled` is told, the work goes on, its outcome is delivered, and the caller is
    cancelled at its next await. So nobody is left not knowing what was done.
    """
    # Not in a task group: that would cancel it. It is awaited right here, until it is done.
    task = asyncio.get_running_loop().create_task(work)
    caller = asyncio.current_task()
    assert caller is not None
    asked = 0
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            asked += 1
            caller.uncancel()
            cancelled()
    for _ in range(asked):
        caller.cancel()
    return task.result()

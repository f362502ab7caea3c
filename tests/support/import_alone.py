"""Import each module named on standard input in a process where none of the others is loaded.

Run as a program, with -W error. The processes are forks of one that has loaded what we depend on,
which costs a few milliseconds a module instead of half a second.
"""

import contextlib
import importlib
import os
import sys
import traceback

DEPENDENCIES = ("asyncio", "aiohttp.web", "click", "httpx", "numpy", "psutil", "yaml")


def imports_alone(name: str) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                importlib.import_module(name)
                status = 0
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                raise
            finally:
                sys.stdout.flush()
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def main() -> int:
    for name in DEPENDENCIES:
        importlib.import_module(name)
    loaded = [name for name in sys.modules if name.partition(".")[0] == "swapserve"]
    if loaded:
        sys.stdout.write(f"loaded before: {loaded}\n")
        return 1
    names = sys.stdin.read().split()
    failed = [name for name in names if not imports_alone(name)]
    sys.stdout.write(f"{len(names)} modules, failed: {failed}\n")
    return 1 if failed or not names else 0


if __name__ == "__main__":
    sys.exit(main())

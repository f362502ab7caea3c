"""What the demonstration prints: lines that stay, and on a terminal one line that lives."""

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TextIO

TICK_S = 0.1
SLOW_TICK_S = 10.0
"""How often something that lasts is mentioned where output is no terminal."""


class Screen:
    """Writes to one stream; no line is longer than the terminal is wide."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._tty = out.isatty()
        self.failures: list[str] = []

    def head(self, text: str) -> None:
        """Begin a part."""
        self._write(f"\n{self._bold(text)}\n")

    def line(self, text: str = "") -> None:
        """Print a line that stays."""
        self._write(f"{text}\n")

    def check(self, good: bool, text: str) -> None:
        """Print what was checked, and remember it if it was not so."""
        if not good:
            self.failures.append(text)
        self.line(f"  [{'ok' if good else 'FAIL'}] {text}")

    @asynccontextmanager
    async def watching(self, describe: Callable[[], str]) -> AsyncIterator[None]:
        """Show what goes on, and for how long, while the block runs."""
        failure: Exception | None = None
        async with asyncio.TaskGroup() as tasks:
            ticker = tasks.create_task(self._tick(describe))
            try:
                yield
            except Exception as error:  # noqa: BLE001 - raised below: the group would wrap it
                failure = error
            finally:
                ticker.cancel()
                if self._tty:
                    self._write("\r\033[K")
        if failure is not None:
            raise failure

    async def _tick(self, describe: Callable[[], str]) -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S if self._tty else SLOW_TICK_S)
            text = f"  {time.monotonic() - started:5.1f} s  {describe()}"
            if self._tty:
                width = shutil.get_terminal_size().columns - 1
                self._write(f"\r\033[K{text[:width]}")
            else:
                self._write(f"{text}\n")

    def _bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self._tty else text

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def table(rows: list[list[str]]) -> str:
    """Return rows as columns, the first and the last left and the others right aligned."""
    last = len(rows[0]) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(f"  {line.rstrip()}" for line in lines)

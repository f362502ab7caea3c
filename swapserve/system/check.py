"""One finding of the doctor, and what every check is told."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from swapserve.config.schema import Config

Result = Literal["ok", "warn", "fail", "off"]
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: `ok`; `warn`: works, with a loss; `fail`: something that is asked for cannot work;
            `off`: does not work, and nothing asks for it.
        found: what is there.
        why: what it is good for.
        mend: a command or a sentence that says what to do; empty if nothing is to be done.
    """

    name: str
    status: Result
    found: str
    why: str
    mend: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a check may know."""

    profile: Literal["root", "unprivileged"]
    config: Config | None = None
    root: Path = Path("/")
    """Where `proc` and `sys` are."""

    @property
    def without(self) -> Result:
        """What the lack of a privileged mechanism means here."""
        return "fail" if self.profile == "root" else "off"

    def read(self, path: str) -> str:
        """Return a file of the kernel's, such as `proc/self/status`.

        Raises:
            OSError: it is not there or not for us.
        """
        return (self.root / path).read_text(encoding="utf-8").strip()


def gib(count: int) -> str:
    """Return bytes as people read them."""
    return f"{count / _GIB:.1f} GiB"

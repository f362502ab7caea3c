"""Packages that offer policies, put where Python finds them as pip would."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[[str, str, dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function: module name, its text, entry points by name -> an installed package."""
    installed: list[str] = []
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def add(module: str, text: str, policies: dict[str, str]) -> None:
        site = tmp_path / module
        info = site / f"the_{module}-1.5.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(text)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: the-{module}\nVersion: 1.5\n")
        points = "".join(f"{name} = {target}\n" for name, target in policies.items())
        (info / "entry_points.txt").write_text(f"[swapserve.policies]\n{points}")
        monkeypatch.syspath_prepend(str(site))
        installed.append(module)

    yield add
    for module in installed:
        sys.modules.pop(module, None)

"""The demonstration from end to end, as a build server runs it."""

import sys
from pathlib import Path

import pytest

from swapserve.quickstart.daemon import Place
from tests.support.daemon import needs_criu
from tests.support.tools import output_of

pytestmark = [*needs_criu, pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_smoke_test_finds_every_token_right_and_stops_everything(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "swapserve.quickstart", "--smoke", "--port", "0"]
    said = output_of([*argv, "--dir", str(tmp_path), "--subnet", "10.233.0.0/16"])
    assert said.count("[ok]") == 9
    assert "[FAIL]" not in said
    assert Place(tmp_path).keeper_pid() is None

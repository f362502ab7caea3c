"""A machine with one stand-in GPU, a caller of the checkpoint API, and an engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cuda import Caller, EngineOnGpu, caller, cuda_engine
from tests.support.gpu import MIB, StandIn, standin


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[StandIn]:
    with standin(tmp_path / "gpu", gpus=[96 * MIB]) as here:
        yield here


@pytest.fixture
def call(gpu: StandIn) -> Iterator[Caller]:
    with caller(gpu) as one:
        yield one


@pytest.fixture
def engine(gpu: StandIn) -> Iterator[EngineOnGpu]:
    with cuda_engine(gpu, "--vram-mb=16", "--cache-mb=4") as one:
        yield one

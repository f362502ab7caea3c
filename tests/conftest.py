"""What holds for every test: asyncio, and nothing of the user's own settings or home."""

from pathlib import Path

import pytest

SETTINGS = [
    *("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"),
    *("SWAPSERVE_CONFIG", "SWAPSERVE_URL", "SWAPSERVE_ADMIN_KEY"),
]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home: Path = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)

from pathlib import Path

import pytest

from swapserve.config.machine import default_paths, find_binary, resolve_profile


def test_the_root_profile_uses_the_systems_places() -> None:
    paths = default_paths("root")
    assert [str(p) for p in (paths.state_dir, paths.image_dir, paths.run_dir)] == [
        "/var/lib/swapserve",
        "/var/lib/swapserve/images",
        "/run/swapserve",
    ]


def test_the_unprivileged_profile_uses_the_users_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_HOME", "CACHE_HOME", "RUNTIME_DIR"):
        monkeypatch.setenv(f"XDG_{name}", f"/x/{name}")
    paths = default_paths("unprivileged")
    assert [str(p) for p in (paths.state_dir, paths.image_dir, paths.run_dir)] == [
        "/x/STATE_HOME/swapserve",
        "/x/CACHE_HOME/swapserve/images",
        "/x/RUNTIME_DIR/swapserve",
    ]


def test_without_xdg_everything_is_below_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = default_paths("unprivileged")
    assert paths.state_dir == tmp_path / ".local/state/swapserve"
    assert paths.image_dir == tmp_path / ".cache/swapserve/images"
    assert paths.run_dir == tmp_path / ".cache/swapserve/run"


@pytest.mark.parametrize(("uid", "profile"), [(0, "root"), (1000, "unprivileged")])
def test_the_automatic_profile_follows_the_account(
    monkeypatch: pytest.MonkeyPatch, uid: int, profile: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert resolve_profile("auto") == profile
    assert resolve_profile("root") == "root"
    assert resolve_profile("unprivileged") == "unprivileged"


def test_path_comes_before_the_private_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(directory: str) -> Path:
        path = tmp_path / directory / "tool-x"
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
        return path

    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_binary("tool-x") is None
    in_prefix = make("prefix/bin")
    assert find_binary("tool-x") == in_prefix
    on_path = make("path")
    assert find_binary("tool-x") == on_path
    assert find_binary(str(in_prefix)) == in_prefix
    assert find_binary(str(tmp_path)) is None
    in_prefix.chmod(0o644)
    assert find_binary(str(in_prefix)) is None

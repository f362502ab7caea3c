import os
from pathlib import Path

import pytest

from swapserve.config.check import check_ownership, config_files
from swapserve.config.load import load
from swapserve.config.recipe_files import recipe_paths
from swapserve.errors import ConfigError


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "swapserve.yaml"
    path.parent.mkdir()
    path.write_text("models: [{name: a, recipe: generic, params: {binary: /bin/sh}}]\n")
    path.chmod(0o644)
    path.parent.chmod(0o755)
    return path


def test_files_only_we_can_change_are_trusted(config_file: Path) -> None:
    check_ownership(config_file)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_can_write_is_not(config_file: Path, mode: int) -> None:
    config_file.chmod(mode)
    with pytest.raises(ConfigError) as raised:
        check_ownership(config_file)
    (problem,) = raised.value.problems
    assert problem.key == str(config_file)
    assert "lets others write" in problem.found


def test_a_directory_in_which_others_can_replace_it_is_not_unless_sticky(config_file: Path) -> None:
    config_file.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="lets others write"):
        check_ownership(config_file)
    config_file.parent.chmod(0o1777)
    check_ownership(config_file)


def test_the_target_of_a_link_counts(config_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(config_file)
    check_ownership(link)
    config_file.chmod(0o666)
    with pytest.raises(ConfigError) as raised:
        check_ownership(link)
    assert str(config_file) in {problem.key for problem in raised.value.problems}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_owner_is_not_trusted(config_file: Path) -> None:
    os.chown(config_file, 12345, 0)
    with pytest.raises(ConfigError, match="the owner 12345"):
        check_ownership(config_file)


def test_a_file_that_is_not_there_is_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        check_ownership(tmp_path / "none.yaml")


def test_a_shipped_recipe_is_as_trusted_as_the_program_beside_it(config_file: Path) -> None:
    assert [path.name for path in config_files(load(config_file))] == ["swapserve.yaml"]


def test_a_recipe_of_ones_own_is_looked_at(config_file: Path) -> None:
    folder = config_file.parent / "recipes"
    folder.mkdir()
    (folder / "generic.yaml").write_bytes(recipe_paths()["generic"].read_bytes())
    config_file.write_text(f"recipe_dirs: [recipes]\n{config_file.read_text()}")
    names = [path.name for path in config_files(load(config_file))]
    assert names == ["swapserve.yaml", "generic.yaml"]


def test_every_file_that_is_not_trusted_is_named(config_file: Path) -> None:
    other = config_file.with_name("mine.yaml")
    other.touch()
    for path in (other, config_file):
        path.chmod(0o666)
    with pytest.raises(ConfigError) as raised:
        check_ownership(config_file, other)
    assert [problem.key for problem in raised.value.problems] == [str(config_file), str(other)]

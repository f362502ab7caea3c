from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.recipe_files import find_recipes, load_recipe
from swapserve.errors import ConfigError

GOOD = """\
name: mine
adapter: generic
params: {binary: "", mode: fast}
argv: ["{binary}", --mode, "{mode}", --port, "{port}"]
env: {NAME: "{name}"}
start_timeout: 2m
needs_model: false
"""


def test_a_recipe_is_read_with_its_source(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    recipe = load_recipe(path)
    assert recipe.argv == ("{binary}", "--mode", "{mode}", "--port", "{port}")
    assert recipe.params == {"binary": "", "mode": "fast"}
    assert recipe.start_timeout_s == 120.0
    assert recipe.needs_model is False
    assert recipe.source == path


@pytest.mark.parametrize(
    ("change", "line", "key", "found"),
    [
        (("name: mine", "name: other"), 1, "name", "'other'"),
        (("adapter: generic", "adapter: tgi"), 2, "adapter", "'tgi'"),
        (("{mode}", "{mood}"), 4, "argv[2]", "{mood}"),
        (("{name}", "{nam}"), 5, "env.NAME", "{nam}"),
        (("mode: fast", "mode: fast, port: 1"), 3, "params.port", "taken"),
        (("mode: fast", "mode: fast, Big: 1"), 3, "params.Big", "lower-case"),
        (
            ('argv: ["{binary}", --mode, "{mode}", --port, "{port}"]', "argv: []"),
            4,
            "argv",
            "empty",
        ),
        (("start_timeout", "start_timeot"), 6, "start_timeot", "unknown key"),
        (("2m", "soon"), 6, "start_timeout", "'soon'"),
        (("needs_model: false", 'gpu_args: ["{mood}"]'), 7, "gpu_args[0]", "{mood}"),
        (("needs_model: false", "gpu_env: {A: '{mood}'}"), 7, "gpu_env.A", "{mood}"),
        (("needs_model: false", "mechanisms: [nap]"), 7, "mechanisms[0]", "'nap'"),
    ],
)
def test_a_wrong_recipe_says_where(
    tmp_path: Path, change: tuple[str, str], line: int, key: str, found: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    (problem,) = raised.value.problems
    assert (problem.path, problem.line, problem.key) == (str(path), line, key)
    assert found in problem.found


def test_several_wrong_recipes_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nadapter: generic\nargv: ['{x}', '{y}']\n")
    (tmp_path / "b.yaml").write_text("name: a\nadapter: generic\n")
    with pytest.raises(ConfigError) as raised:
        find_recipes([tmp_path])
    assert [(Path(p.path).name, p.key) for p in raised.value.problems] == [
        ("a.yaml", "argv[0]"),
        ("a.yaml", "argv[1]"),
        ("b.yaml", "argv"),
        ("b.yaml", "name"),
    ]


def test_ones_own_recipe_wins_over_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "vllm.yaml").write_text("name: vllm\nadapter: generic\nargv: [mine]\n")
    recipes = find_recipes([tmp_path])
    assert recipes["vllm"].argv == ("mine",)
    assert {"vllm", "llamacpp", "generic"} <= recipes.keys()


def test_a_wrong_recipe_is_part_of_the_configurations_problems_once(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("name: mine\nargv: [x]\n")
    path = tmp_path / "swapserve.yaml"
    path.write_text(
        "recipe_dirs: [own]\nmodels:\n  - {name: a, recipe: mine}\n  - {name: b, recipe: mine}\n"
        "log: {level: loud}\n"
    )
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert [(Path(p.path).name, p.key) for p in raised.value.problems] == [
        ("mine.yaml", "adapter"),
        ("swapserve.yaml", "log.level"),
    ]


def test_a_wrong_recipe_that_no_model_uses_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("nonsense")
    path = tmp_path / "swapserve.yaml"
    path.write_text("recipe_dirs: [own]\n")
    assert load(path).recipe_dirs == (tmp_path / "own",)

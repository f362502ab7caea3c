"""Find and read recipe files."""

from collections.abc import Iterable
from pathlib import Path

import swapserve
from swapserve.config.fields import keys_of
from swapserve.config.nodes import Problems, near, one_of, parse
from swapserve.config.reader import Reader, Section
from swapserve.config.recipes import BUILT_IN, Recipe, placeholders
from swapserve.errors import ConfigError, ConfigProblem


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file.

    Raises:
        ConfigError: with every problem in it.
    """
    path = path.absolute()
    problems = Problems(path)
    section = Reader(problems).section(parse(path, problems), "", keys_of(Recipe))
    _check_name(section, path, problems)
    _check_argv(section, problems)
    _check_placeholders(section, problems)
    problems.check()
    return Recipe(**section.values, source=path)


def find_recipes(dirs: Iterable[Path] = ()) -> dict[str, Recipe]:
    """Read every recipe of `dirs` and of the shipped ones; the first of a name wins.

    Raises:
        ConfigError: with every problem in every file.
    """
    recipes: dict[str, Recipe] = {}
    problems: list[ConfigProblem] = []
    for name, path in recipe_paths(dirs).items():
        try:
            recipes[name] = load_recipe(path)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return recipes


def recipe_paths(dirs: Iterable[Path] = ()) -> dict[str, Path]:
    """Return recipe files by name: those of `dirs`, the wheel's, the checkout's."""
    found: dict[str, Path] = {}
    for directory in (*dirs, *_shipped_dirs()):
        for path in sorted(directory.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def shipped_recipes() -> set[Path]:
    """Return the recipe files that came with this program."""
    return {path.absolute() for folder in _shipped_dirs() for path in folder.glob("*.yaml")}


def _shipped_dirs() -> tuple[Path, Path]:
    package = Path(swapserve.__file__).parent
    return (package / "_recipes", package.parent / "engines")


class RecipeBook:
    """Recipes read when they are first asked for; problems of each are noted once."""

    def __init__(self, dirs: Iterable[Path], problems: Problems) -> None:
        self._paths = recipe_paths(dirs)
        self._problems = problems
        self._read: dict[str, Recipe | None] = {}

    def get(self, name: str, line: int, key: str) -> Recipe | None:
        """Return a recipe, or None after noting why there is none."""
        if name not in self._paths:
            expected = one_of(self._paths) + near(name, self._paths)
            self._problems.add(line, key, f"the unknown recipe {name!r}", expected)
            return None
        if name not in self._read:
            self._read[name] = self._load(self._paths[name])
        return self._read[name]

    def _load(self, path: Path) -> Recipe | None:
        try:
            return load_recipe(path)
        except ConfigError as error:
            self._problems.found.extend(error.problems)
            return None


def _check_name(section: Section, path: Path, problems: Problems) -> None:
    name = section.values.get("name")
    if name is not None and name != path.stem:
        problems.add(section.line_of("name"), "name", f"the text {name!r}", f"{path.stem!r}")


def _check_argv(section: Section, problems: Problems) -> None:
    if "argv" in section.values and not section.values["argv"]:
        problems.add(section.line_of("argv"), "argv", "an empty list", "at least the program")


def _check_placeholders(section: Section, problems: Problems) -> None:
    params = section.values.get("params", {})
    line = section.line_of("params")
    for name in params:
        if name in BUILT_IN or not name.isidentifier() or not name.islower():
            problems.add(line, f"params.{name}", "a name that is taken or not a lower-case word",
                         f"a lower-case word other than {', '.join(BUILT_IN)}")  # fmt: skip
    known = [*BUILT_IN, *params]
    env = section.values.get("env", {})
    texts = [(f"argv[{i}]", "argv", t) for i, t in enumerate(section.values.get("argv", ()))]
    texts += [(f"env.{name}", "env", text) for name, text in env.items()]
    texts += [
        (f"gpu_args[{i}]", "gpu_args", t) for i, t in enumerate(section.values.get("gpu_args", ()))
    ]
    gpu_env = section.values.get("gpu_env", {})
    texts += [(f"gpu_env.{name}", "gpu_env", text) for name, text in gpu_env.items()]
    paths = section.values.get("read_only_paths", ())
    texts += [(f"read_only_paths[{i}]", "read_only_paths", t) for i, t in enumerate(paths)]
    for key, item, text in texts:
        for name in placeholders(text):
            if name not in known:
                found = f"the unknown placeholder {{{name}}}"
                expected = one_of(known) + near(name, known)
                problems.add(section.line_of(item), key, found, expected)

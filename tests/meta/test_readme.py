"""What README.md tells people to type exists, and its configuration is one."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from swapserve.cli.main import cli
from swapserve.config.load import load
from swapserve.quickstart.__main__ import parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "DESIGN.md", "CHANGELOG.md", *sorted(map(str, Path("docs").glob("*.md")))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == language]


def command_lines() -> list[str]:
    """Return the lines of all shell blocks and of all code spans, without comments."""
    lines = [line for text in blocks("bash") for line in text.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", README))
    return [line.partition("  #")[0].strip() for line in lines]


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", found) for sub, found in commands(command))


def options_of(command: click.Command) -> set[str]:
    return {text for param in command.params for text in param.opts}


def uses() -> list[list[str]]:
    """Return the words after `swapserve` of each line that calls it."""
    found = []
    for line in command_lines():
        words = line.removeprefix("sudo ").split()
        if words and words[0].rpartition("/")[2] == "swapserve" and len(words) > 1:
            found.append(words[1:])
    return found


def test_there_is_something_to_check() -> None:
    assert len(uses()) > 10


@pytest.mark.parametrize("words", uses(), ids=" ".join)
def test_a_command_in_the_readme_exists_with_its_options(words: list[str]) -> None:
    known = dict(commands(cli))
    if words[0] == "--config":
        words = words[2:]
    names = [" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in known]
    assert names, f"swapserve {' '.join(words)}"
    for word in words:
        if word.startswith("-"):
            assert word in options_of(known[names[0]]), f"{names[0]} has no {word}"


def test_every_command_is_in_the_readme() -> None:
    table = README.partition("## The command line")[2].partition("\n## ")[0]
    missing = [name for name, found in commands(cli) if f"{name}" not in table]
    assert set(missing) <= {"config", "version"}


def test_every_script_in_the_readme_exists_and_can_be_run() -> None:
    scripts = set(re.findall(r"\./(scripts/[a-z-]+)", README))
    assert scripts >= {"scripts/quickstart", "scripts/test", "scripts/setup"}
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script


def test_options_of_the_quickstart_exist() -> None:
    known = {text for action in parser()._actions for text in action.option_strings}
    for line in command_lines():
        if "scripts/quickstart" in line:
            assert set(re.findall(r"--[a-z-]+", line)) <= known, line


@pytest.mark.parametrize(
    ("number", "models"), [(0, ["small", "large"]), (1, ["chat", "code", "mine"])]
)
def test_the_examples_are_configurations(tmp_path: Path, number: int, models: list[str]) -> None:
    examples = blocks("yaml")
    assert len(examples) == 2
    path = tmp_path / "swapserve.yaml"
    path.write_text(examples[number])
    config = load(path, check_binaries=False)
    assert list(config.models) == models


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(name: str) -> None:
    path = ROOT / name
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_heading_leads_to_one(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(#([^)]+)\)", text):
        assert target in headings, f"{name} links to #{target}"

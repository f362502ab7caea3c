from pathlib import Path

import pytest

from swapserve.config.nodes import Items, Problems, Scalar, Table, parse
from swapserve.errors import ConfigError


def read(tmp_path: Path, text: str) -> tuple[Table, Problems]:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    problems = Problems(path)
    return parse(path, problems), problems


def test_every_node_knows_its_line(tmp_path: Path) -> None:
    tree, problems = read(tmp_path, "a: 1\nb:\n  - x\n  - {c: true}\n")
    assert not problems.found
    assert tree.lines == {"a": 1, "b": 2}
    items = tree.nodes["b"]
    assert isinstance(items, Items)
    assert items.nodes[0] == Scalar(3, "x", "text")
    assert isinstance(items.nodes[1], Table)
    assert items.nodes[1].nodes["c"] == Scalar(4, "true", "boolean")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1", "integer"),
        ("-3", "integer"),
        ("1.5", "number"),
        ("1e3", "number"),
        ("true", "boolean"),
        ("~", "null"),
        ("", "null"),
        ("yes", "text"),
        ("on", "text"),
        ("1:30", "text"),
        ("2024-01-01", "text"),
        ("0x10", "text"),
        ("'1'", "text"),
        ("8GiB", "text"),
    ],
)
def test_scalars_follow_the_core_schema(tmp_path: Path, text: str, kind: str) -> None:
    tree, _ = read(tmp_path, f"k: {text}\n")
    node = tree.nodes["k"]
    assert isinstance(node, Scalar)
    assert node.kind == kind


def test_a_key_that_stands_twice_is_a_problem_on_its_second_line(tmp_path: Path) -> None:
    tree, problems = read(tmp_path, "a:\n  b: 1\n  c: 2\n  b: 3\n")
    (problem,) = problems.found
    assert (problem.line, problem.key) == (4, "a.b")
    assert "first on line 2" in problem.found
    assert isinstance(tree.nodes["a"], Table)
    assert tree.nodes["a"].nodes["b"] == Scalar(2, "1", "integer")


def test_merge_keys_bring_in_what_is_not_there(tmp_path: Path) -> None:
    tree, problems = read(tmp_path, "a: &d {x: 1, y: 2}\nb:\n  <<: *d\n  y: 3\n")
    assert not problems.found
    table = tree.nodes["b"]
    assert isinstance(table, Table)
    assert {name: node.text for name, node in table.nodes.items() if isinstance(node, Scalar)} == {
        "x": "1",
        "y": "3",
    }
    assert table.lines == {"x": 1, "y": 4}


def test_a_value_inside_itself_is_a_problem(tmp_path: Path) -> None:
    _, problems = read(tmp_path, "a: &a [1, *a]\n")
    assert [(p.line, p.key) for p in problems.found] == [(1, "a[1]")]


def test_a_foreign_tag_is_a_problem_and_runs_nothing(tmp_path: Path) -> None:
    _, problems = read(tmp_path, "a: !!python/object/apply:os.getcwd []\nb: !!int '3'\n")
    assert [(p.line, p.key) for p in problems.found] == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("text", "line"), [("a: [1\nb: 2\n", 2), ("a: 'x\n", 2), ("- 1\n", 1), ("plain", 1)]
)
def test_what_is_no_mapping_or_no_yaml_names_a_line(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert raised.value.problems[0].line == line


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    tree, problems = read(tmp_path, "# nothing\n")
    assert not tree.nodes
    assert not problems.found


def test_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        parse(tmp_path / "none.yaml", Problems(tmp_path / "none.yaml"))


def test_a_file_that_is_not_text_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        parse(path, Problems(path))

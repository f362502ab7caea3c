import pytest
from click.testing import CliRunner

from evaluation.__main__ import cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profiles", "balanced,steady"], "'steady' is none of balanced"),
        (["--profiles", "mixed,mixed"], "names something twice"),
        (["--policies", "fair"], "'fair' is none of adaptive"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--engines", "1"], "1 is not in the range"),
        (["--part", "0"], "0.0 is not in the range"),
        (["--size", "huge"], "'huge' is not one of"),
        (["--work-dir", "/nowhere/at/all"], "does not exist"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["schedule", *arguments])
    assert done.exit_code == 2
    assert said in done.output

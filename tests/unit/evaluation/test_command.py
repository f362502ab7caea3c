import pytest
from click.testing import CliRunner

from evaluation.__main__ import cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engines", "vllm,ollama"], "'ollama' is none of vllm, llamacpp"),
        (["--engines", "vllm,vllm"], "names something twice"),
        (["--cycles", "0"], "0 is not in the range"),
        (["--idle", "0,long"], "no list of seconds"),
        (["--idle", "-1"], "not between 0 and 3600"),
        (["--idle", "nan"], "not between 0 and 3600"),
        (["--huge-pages", "always"], "'always' is none of off, on"),
        (["--size", "huge"], "'huge' is not one of"),
        (["--work-dir", "/nowhere/at/all"], "does not exist"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["swap", *arguments])
    assert done.exit_code == 2
    assert said in done.output

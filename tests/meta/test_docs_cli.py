"""docs/cli.md is what the program says of itself; run as a program, this file writes it anew."""

from collections.abc import Iterator
from pathlib import Path

import click

from swapserve.cli.context import EXIT_STATUS
from swapserve.cli.main import cli

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"

HEAD = """\
# Command line

Every command takes `--json` and then prints JSON: one object, or one per line for `events` and
`status --watch`. (`serve` runs the daemon, which logs as `log.format` says; `config schema` is
JSON anyway.) With `--json` errors are JSON too, on standard error, except for wrong usage:
`{"error": {"code": ..., "message": ...}}`.

## Which daemon

The address is `--url` or `SWAPSERVE_URL`, else `server.host` and `server.port` of the
configuration, else http://127.0.0.1:8080. The admin key is `--key` or `SWAPSERVE_ADMIN_KEY`, else
the first of `server.admin_keys` of the configuration. The configuration is `--config` or
`SWAPSERVE_CONFIG`, else `./swapserve.yaml`, else `/etc/swapserve/swapserve.yaml`.

Without `server.admin_keys` the daemon takes admin calls only from its own machine, by a loopback
address, and not through a proxy. API keys are never enough.

## Exit status

| status | means |
|---:|---|
| 0 | done |
| 1 | the operation failed, or `doctor` found that something asked for cannot work |
| 2 | wrong usage, or a configuration that cannot be used |
| 3 | no daemon answers |

"""


def pages(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield every command's full name and help text, depth first."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            assert sub is not None
            yield from pages(sub, click.Context(sub, info_name=name, parent=context))


def rendered() -> str:
    """Return the whole document."""
    context = click.Context(cli, info_name="swapserve", **cli.context_settings)
    context.max_content_width = context.terminal_width = 80
    parts = [
        f"## {'Commands' if name == 'swapserve' else f'`{name}`'}\n\n```text\n{text}\n```\n"
        for name, text in pages(cli, context)
    ]
    return HEAD + "\n".join(parts)


def test_the_document_is_what_the_program_says() -> None:
    assert DOCS.read_text() == rendered(), "stale; run: python tests/meta/test_docs_cli.py"


def test_every_exit_status_is_documented() -> None:
    for status in {0, *(status for _, status in EXIT_STATUS)}:
        assert f"\n| {status} | " in DOCS.read_text()


def test_every_command_has_the_json_switch() -> None:
    context = click.Context(cli, info_name="swapserve")
    exempt = {"swapserve serve", "swapserve config", "swapserve config schema"}
    lacking = {name for name, text in pages(cli, context) if "--json" not in text}
    assert lacking == exempt


if __name__ == "__main__":
    DOCS.write_text(rendered())

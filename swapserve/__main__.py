"""`python -m swapserve` is `swapserve`."""

from swapserve.cli.main import cli

cli()

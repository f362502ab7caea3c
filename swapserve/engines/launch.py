"""What an engine's command line and environment switch on and off."""

from swapserve.config.recipes import launch_argv, launch_env
from swapserve.config.schema import ModelConfig

_OFF = {"", "0", "false", "no", "off"}


class Launch:
    """The command line and environment that an engine is started with.

    Flags are compared with dashes for underscores: vLLM takes both.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._words = launch_argv(model, host="", port=0)
        self.env = launch_env(model, host="", port=0)

    def has(self, flag: str) -> bool:
        """Whether a flag like `--enable-x` is given, and not taken back by a later `--no-...`."""
        given = False
        for word in self._words:
            name = _flag(word)
            if name in {flag, f"--no-{flag.removeprefix('--')}"}:
                given = name == flag
        return given

    def value(self, *flags: str) -> str | None:
        """Return what follows the last of these flags, as `--flag value` or `--flag=value`."""
        found = None
        following = (*self._words[1:], None)
        for word, after in zip(self._words, following, strict=True):
            if _flag(word) in flags:
                _, equals, attached = word.partition("=")
                found = attached if equals else after
        return found

    def is_set(self, variable: str) -> bool:
        """Whether an environment variable is set to something that means yes."""
        return self.env.get(variable, "").lower() not in _OFF


def _flag(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")

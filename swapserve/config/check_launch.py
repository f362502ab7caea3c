"""What is refused of engines that are containers, and of those that others have started."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from swapserve.config.machine import find_binary
from swapserve.config.models import Read
from swapserve.config.nodes import Problems
from swapserve.config.reader import Section
from swapserve.config.recipes import launch_read_only_paths
from swapserve.config.schema import KeeperConfig, ModelConfig, ServerConfig
from swapserve.states import Tier

LAST_PORT = 65535
_OURS = ("--name", "--rm", "--restart", "--detach", "-d", "--pull", "--entrypoint")
"""Options of `run` by which SwapServe knows its containers again; `--name x` and `--name=x`."""
_NOT_ATTACHED = {
    "args": "it runs already, with arguments of its own",
    "env": "it runs already, with an environment of its own",
    "params": "it runs already, with a command line of its own",
    "model": "it has loaded its own",
    "image": "it runs already",
    "sandbox": "it runs already, where it is",
    "golden": "CRIU brings back only what ran in a sandbox",
    "stop_grace_s": "it is never ended by SwapServe",
}
_NOT_CONTAINED = {
    "sandbox": "the container is its sandbox",
    "golden": "CRIU brings back only what ran in a sandbox",
}


class _Refusal(NamedTuple):
    field: str
    """Whose line counts."""
    at: str
    """The key below the model."""
    found: str
    expected: str


def check_runtime(keeper: KeeperConfig, section: Section, problems: Problems) -> None:
    """Check the program of the container runtime; it need not be there unless it is named."""
    program, key = keeper.container_program, "keeper.container_program"
    if program is None:
        return
    line = section.line_of("container_program")
    if keeper.container_runtime == "auto":
        expected = "keeper.container_runtime, too: its options are not those of the others"
        problems.add(line, key, f"{program}, without saying what it is", expected)
    elif find_binary(str(program)) is None:
        problems.add(line, key, f"{program}, which is not there", "an executable file")


def check_models(
    reads: Sequence[Read],
    keeper: KeeperConfig,
    server: ServerConfig,
    problems: Problems,
    *,
    look: bool,
) -> None:
    """Check each model that is not simply a process of ours.

    Args:
        reads: the models.
        keeper: which runtime runs containers.
        server: whose port no engine can be at.
        problems: what is found is noted here.
        look: whether images that are files must be there.
    """
    targets: dict[str, str] = {}
    for read in reads:
        model = read.model
        refusals: list[_Refusal] = []
        if model.launch == "attached":
            given = set(read.section.lines)
            refusals += _attached(model, given, server)
            refusals += _twice(model, read.section.key, targets)
        elif model.launch == "container":
            refusals += _contained(model, set(read.section.lines))
            refusals += _image(model, keeper, look=look)
        for refusal in refusals:
            line = read.section.line_of(refusal.field)
            key = f"{read.section.key}.{refusal.at}"
            problems.add(line, key, refusal.found, refusal.expected)


def attach_target(attach: str) -> tuple[str, str]:
    """Return what kind of thing is attached to (`pid`, `port`, `container`), and which."""
    kind, _, which = attach.partition(":")
    return kind, which


def _attached(model: ModelConfig, given: set[str], server: ServerConfig) -> Iterator[_Refusal]:
    assert model.attach is not None
    kind, which = attach_target(model.attach)
    for field, why in _NOT_ATTACHED.items():
        if field in given:
            at = field.removesuffix("_s")
            yield _Refusal(field, at, "a value, beside `attach`", f"no such key: {why}")
    if model.mechanism == "restart":
        expected = "another one: an engine that others have started is never ended"
        yield _Refusal("mechanism", "mechanism", "restart, beside `attach`", expected)
    wrong = [tier for tier in model.tiers if tier is not Tier.HOST or not model.gpus]
    if wrong:
        can = "host" if model.gpus else "no tier: only GPU state can be taken from it"
        found = f"{', '.join(wrong)}, beside `attach`"
        yield _Refusal("tiers", "tiers", found, f"{can}; its process is never ended")
    if kind == "port":
        port = int(which)
        if port > LAST_PORT:
            yield _Refusal("attach", "attach", f"the port {port}", f"at most {LAST_PORT}")
        if port == server.port:
            found = f"the port {port}, which is server.port"
            yield _Refusal("attach", "attach", found, "the port of an engine")
        if model.port is not None:
            yield _Refusal("port", "port", "a value, beside `attach: port:N`", "no such key")


def _twice(model: ModelConfig, key: str, targets: dict[str, str]) -> Iterator[_Refusal]:
    assert model.attach is not None
    if model.attach in targets:
        found = f"{model.attach!r}, which {targets[model.attach]} has too"
        yield _Refusal("attach", "attach", found, "an engine of its own")
    targets.setdefault(model.attach, f"{key}.attach")


def _contained(model: ModelConfig, given: set[str]) -> Iterator[_Refusal]:
    for field, why in _NOT_CONTAINED.items():
        if field in given:
            yield _Refusal(field, field, "a value, beside `image`", f"no such key: {why}")
    if Tier.DISK in model.tiers and "tiers" in given and not model.gpus:  # on a GPU: check_gpu
        expected = "none: CRIU brings back only what ran in a sandbox"
        yield _Refusal("tiers", "tiers", "disk, for a container", expected)
    for word in model.recipe.container_args:
        if word.partition("=")[0] in _OURS:
            found = f"the recipe's container_args with {word!r}"
            expected = "other options: SwapServe sets this one, to know its containers again"
            yield _Refusal("recipe", "recipe", found, expected)
    for path in mounted(model):
        if set(str(path)) & set(',:"'):
            found = f"{str(path)!r}"
            expected = 'a path without , : and ": no container runtime takes those in a mount'
            yield _Refusal("model", "model", found, expected)


def mounted(model: ModelConfig) -> tuple[Path, ...]:
    """Return the paths that a model's container is told of by name."""
    paths = launch_read_only_paths(model)
    return (Path(model.model), *paths) if model.model is not None else paths


def _image(model: ModelConfig, keeper: KeeperConfig, *, look: bool) -> Iterator[_Refusal]:
    if keeper.container_runtime != "apptainer":
        return
    image = model.container_image or ""
    if not image.startswith("/"):
        expected = "the absolute path of a SIF file or a directory: nothing is pulled"
        yield _Refusal("image", "image", f"{image!r}, for apptainer", expected)
    elif look and not Path(image).exists():
        yield _Refusal("image", "image", f"{image!r}, which is not there", "an image for apptainer")

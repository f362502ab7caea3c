"""Which GPU takes the state of which: a whole mapping for the driver out of the moves wanted."""

from collections.abc import Mapping, Sequence

from swapserve.keeper.cuda.calls import Pairs
from swapserve.system.gpu import Gpu


class NoMapping(Exception):
    """State cannot go that way; the driver would have spoilt it in the attempt."""


def whole_mapping(pairs: Pairs, gpus: Sequence[Gpu]) -> Pairs:
    """Complete pairs of (old UUID, new UUID) to a mapping of all GPUs; none if nothing moves.

    If there is a mapping, the driver wants every GPU in it, also those that it does not concern.
    Source: cuda.h 13.0, cuCheckpointProcessRestore ("must contain every checkpointed GPU", "the
    same chip type"); cuda-core 1.2.2, checkpoint.py ("every GPU visible to the kernel-mode
    driver").

    Raises:
        NoMapping: two GPUs would become one, or a GPU one of another kind or one that is not there.
    """
    moves = {old: new for old, new in pairs if old != new}
    if not moves:
        return ()
    names = {gpu.uuid: gpu.name for gpu in gpus}
    _check(dict(pairs), names)
    mapping = dict(pairs)
    free = [uuid for uuid in names if uuid not in mapping.values()]
    rest = [uuid for uuid in names if uuid not in mapping]
    for uuid in [uuid for uuid in rest if uuid in free]:
        mapping[uuid] = uuid
        free.remove(uuid)
    # Whose place was taken gets one that became free; to none of these does state belong.
    taken = [uuid for uuid in rest if uuid not in mapping]
    mapping.update(zip(taken, free, strict=False))
    return tuple(mapping.items())


def _check(pairs: Mapping[str, str], names: Mapping[str, str]) -> None:
    if len(set(pairs.values())) < len(pairs):
        raise NoMapping("the state of two GPUs cannot come to one")
    for old, new in pairs.items():
        if new not in names:
            raise NoMapping(f"there is no GPU {new}; `nvidia-smi -L` lists them")
        if names.get(old, names[new]) != names[new]:
            raise NoMapping(
                f"GPU {new} ({names[new]}) is not of the kind of {old} ({names[old]}), so it cannot"
                " take its state"
            )

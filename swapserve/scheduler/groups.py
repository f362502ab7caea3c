"""Which devices are planned together: those that some engine ties to each other. Pure.

An engine ties the devices it spans, and the RAM that takes its state in the host tier. A plan
that sees all of them at once can keep one order of age over all wishes, so that two engines
which need the same two devices never hold one each.
"""

from collections.abc import Iterable

from swapserve.ids import DeviceName
from swapserve.messages import EngineSpec


def uses(spec: EngineSpec) -> tuple[DeviceName, ...]:
    """Return every device on which the engine may ever hold bytes."""
    return spec.devices if spec.ram is None else (*spec.devices, spec.ram)


def groups(
    devices: Iterable[DeviceName], specs: Iterable[EngineSpec]
) -> list[tuple[DeviceName, ...]]:
    """Return the devices in groups that no engine crosses, each in the order given."""
    order = tuple(devices)
    group = {device: position for position, device in enumerate(order)}
    for spec in specs:
        tied = {group[device] for device in uses(spec)}
        for device, number in group.items():
            if number in tied:
                group[device] = min(tied)
    numbers = dict.fromkeys(group.values())
    return [tuple(device for device in order if group[device] == one) for one in numbers]

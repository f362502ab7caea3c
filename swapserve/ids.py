"""Names for the identifiers that travel between layers."""

from typing import NewType

EngineName = NewType("EngineName", str)
"""The configured name of a model; one engine serves it."""

DeviceName = NewType("DeviceName", str)
"""The configured name of a device: a GPU, or host RAM on a machine without one."""

LeaseId = NewType("LeaseId", str)
"""One request on one engine, unique within a daemon's life."""

CommandId = NewType("CommandId", str)
"""One operator command waiting for its outcome."""

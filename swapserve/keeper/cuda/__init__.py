"""CUDA state of engine processes: the driver's checkpoint calls, and their safe order."""

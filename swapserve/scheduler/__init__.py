"""Who is on which device and who waits: a pure core, and the task that drives it."""

"""The demonstration behind scripts/quickstart: two models, room for one, a preempted stream."""

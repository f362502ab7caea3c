"""Traces against real engines, and what the simulator says of them."""

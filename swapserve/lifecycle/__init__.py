"""The life of each engine: one actor is the only writer of its state."""

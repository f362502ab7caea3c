"""The privileged side that holds the engines, and its client."""

"""Serve many LLMs on few GPUs by swapping whole inference engines."""

__version__ = "0.1.0"

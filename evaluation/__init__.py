"""Measurements of SwapServe with real engines; not part of the package."""

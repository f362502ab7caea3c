"""Adapters: what the daemon knows of an engine's behaviour (settings are in the recipes)."""

"""The configuration: its schema, how it is read, and recipes of engines."""

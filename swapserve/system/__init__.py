"""The only code, with the keeper, that touches the machine."""

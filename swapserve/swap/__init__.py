"""How an engine moves between tiers: which way, in which steps, at what cost."""

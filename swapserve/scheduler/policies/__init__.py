"""Who waits and who leaves: the default policy, and others for comparison. Pure."""

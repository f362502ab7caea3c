"""`python -m evaluation gpu`: what moving GPU state costs on this machine, in one short run."""

"""The privileged side: all of this package runs as root, nothing else does."""

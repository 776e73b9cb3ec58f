"""The enforcer's life in one process: its own code, a clock and hardware that the test holds."""

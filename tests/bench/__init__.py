"""Measures the agent's speed and cost on a simulated node: `python -m tests.bench`."""

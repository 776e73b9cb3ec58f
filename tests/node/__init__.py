"""Whole processes on a simulated node: the real programs, sockets and NVML calls."""

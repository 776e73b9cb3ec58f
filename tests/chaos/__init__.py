"""Attacks and faults: kills at every step, hostile clients and pods, broken disks and drivers."""

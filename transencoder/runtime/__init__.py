"""Processes, disk and devices: what every stage stands on."""

"""A run of the driver: its paths, its plan, its table."""

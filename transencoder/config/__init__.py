"""Options: each one once, read from the command line and from recipes."""

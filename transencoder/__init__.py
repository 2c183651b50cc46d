"""The shared module behind the scripts: unsupervised sentence-pair models by self- and mutual-distillation."""

import os

# PyTorch's threads wait for one another by spinning. On a machine with other work that takes the CPU from the very
# thread they wait for, and makes training of a tiny model ten times slower. libgomp reads this when torch is imported,
# which no script does before this package.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"

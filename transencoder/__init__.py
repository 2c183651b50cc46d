"""The shared module behind the scripts: unsupervised sentence-pair models by self- and mutual-distillation."""

__version__ = "0.1.0"

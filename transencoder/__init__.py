"""The shared module behind the scripts: unsupervised sentence-pair models by self- and mutual-distillation."""

import os
import sys
from types import TracebackType

# PyTorch's threads wait for one another by spinning. On a machine with other work that takes the CPU from the very
# thread they wait for, and makes training of a tiny model ten times slower. libgomp reads this when torch is imported,
# which no script does before this package.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"


def _on_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell Ctrl-C in one line, wherever it comes: also while a script's imports take their seconds."""
    if not issubclass(kind, KeyboardInterrupt):
        _excepthook(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: stopped by Ctrl-C", file=sys.stderr)


_excepthook, sys.excepthook = sys.excepthook, _on_ctrl_c

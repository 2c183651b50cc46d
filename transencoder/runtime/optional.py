"""Libraries that only some commands need: imported where they are used, as one that is broken must harm no other."""

import importlib
from types import ModuleType

from transencoder.errors import InputError

# What each is for, and what pip calls it.
LIBRARIES = {
    "bm25s": ("looking for neighbours by words", "bm25s"),
    "faiss": ("looking for neighbours by vectors", "faiss-cpu"),
    "matplotlib": ("drawing a plot", "matplotlib"),
    "networkx": ("looking for groups of paraphrases", "networkx"),
    "onnx": ("the export", "onnx"),
    "onnxruntime": ("the export", "onnxruntime"),
    "onnxscript": ("the export", "onnxscript"),
    "sklearn": ("the lexical teacher", "scikit-learn"),
}


def load_optional(module: str) -> ModuleType:
    """Import one of `LIBRARIES`, or a module of it, such as "matplotlib.figure".

    Raises:
        InputError: it is not installed, or its import fails, be it in a library of its own.
    """
    name = module.partition(".")[0]
    purpose, package = LIBRARIES[name]
    try:
        return importlib.import_module(module)
    except Exception as error:
        why = "is not installed" if getattr(error, "name", None) == name else f"cannot be imported ({error!r})"
        raise InputError(f"{purpose} needs {name}, which {why}: pip install {package}") from error

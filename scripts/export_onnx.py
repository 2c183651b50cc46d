#!/usr/bin/env python3
"""Write a bi- or cross-encoder as an ONNX file, and check that it gives the same scores.

python scripts/export_onnx.py runs/quickstart/best/bi-encoder exported/bi-encoder

The file's inputs are what the tokenizer beside it makes. Its output is `sentence_embedding` (compare two by their
cosine) or `logits` (their sigmoid is the score). Needs onnx, onnxscript and onnxruntime.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import StageParser
from transencoder.encoders import load_encoder
from transencoder.errors import InputError, one_line_errors
from transencoder.hub.export import FILES, ONNX_FILE, check_packages, export_onnx
from transencoder.model_checks import check_encoders
from transencoder.model_files import ModelOptions
from transencoder.pooling import POOLINGS
from transencoder.runtime.accelerator import log, quiet_libraries


def parse() -> argparse.Namespace:
    parser = StageParser((), __doc__)
    parser.add_argument("encoder", help="folder or Hub id")
    parser.add_argument("output_dir", type=Path, help="new folder for the file and the tokenizer")
    parser.add_argument("--pooling", choices=tuple(POOLINGS), help="only for a plain language model")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args()


@one_line_errors
def main() -> None:
    arguments = parse()
    quiet_libraries()
    check_packages()
    folder = arguments.output_dir
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        ours = ONNX_FILE in names and names <= FILES  # not a model with an ONNX file beside its weights
        if not (arguments.overwrite and ours):
            raise InputError(f"{folder}: exists; {'add --overwrite or ' if ours else ''}choose another folder")
    options = ModelOptions(arguments.pooling)
    check_encoders([arguments.encoder], options)

    difference = export_onnx(load_encoder(arguments.encoder, options), folder)
    log(f"{folder / ONNX_FILE}: the same scores as the original, within {difference:.1g}")


if __name__ == "__main__":
    main()

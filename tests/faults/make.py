"""Writes the tests' tiny BERT and their corpus: python tests/faults/make.py MODEL_FOLDER CORPUS_FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import save_tiny_bert, write_corpus

save_tiny_bert(Path(sys.argv[1]))
write_corpus(Path(sys.argv[2]))

"""A library that is missing or broken stops the commands that need it, with one line, and no others."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl

from transencoder.errors import InputError
from transencoder.runtime.optional import LIBRARIES, load_optional

BROKEN = "raise AttributeError('module jax has no attribute lax')"


@pytest.fixture
def broken(tmp_path):
    """A folder for PYTHONPATH in which every library breaks when it is imported."""
    folder = tmp_path / "broken"
    for name in LIBRARIES.keys() - {"sklearn"}:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(BROKEN)
    return folder


@pytest.fixture
def fresh(monkeypatch, broken):
    """This process, in which the libraries are broken, whatever was imported before."""
    for name in [name for name in sys.modules if name.partition(".")[0] in LIBRARIES.keys() - {"sklearn"}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(broken))


def test_nothing_breaks_that_does_not_need_it(broken):
    """Every file of the package is imported (transformers itself imports scikit-learn)."""
    files = sorted((ROOT / "transencoder").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    code = "\n".join(f"import {name.removesuffix('.__init__')}" for name in names)
    environment = os.environ | {"PYTHONPATH": str(broken), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert len(names) > 30 and result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["bm25s", "faiss", "matplotlib.figure", "networkx", "onnxruntime"])
def test_a_broken_library_is_one_line(fresh, module):
    with pytest.raises(InputError) as caught:
        load_optional(module)
    name = module.partition(".")[0]
    purpose, package = LIBRARIES[name]
    reason = "AttributeError('module jax has no attribute lax')"
    assert str(caught.value) == f"{purpose} needs {name}, which cannot be imported ({reason}): pip install {package}"


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="by vectors needs faiss, which is not installed: pip install faiss-cpu"):
        load_optional("faiss")


@pytest.mark.parametrize(("mix", "name"), [("lexical=1", "bm25s"), ("nearest=1", "faiss"), ("random=1", "matplotlib")])
def test_mining_says_so_before_it_encodes(fresh, monkeypatch, run_script, tiny_bert, tmp_path, mix, name):
    monkeypatch.setattr("transencoder.search.mining.embed", None)
    sentences = write_jsonl(tmp_path / "sentences.jsonl", [{"sentence": f"sentence {n}"} for n in range(20)])
    words = ["--encoders", tiny_bert, "--pooling", "mean", "--sentences", sentences, "--mix", mix]
    result = run_script("mine_pairs.py", *words, "--output", tmp_path / "pairs.parquet")
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mine_pairs.py: error: ") and f"needs {name}" in last and "Traceback" not in result.stderr

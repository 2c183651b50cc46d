"""ONNX files, and MTEB's verdict on what was saved and exported."""

import json
import shutil
import subprocess
import sys

import datasets
import mteb
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, save_telling_encoders, warm_python
from mteb.abstasks.sts import AbsTaskSTS
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from transencoder.encoders import load_encoder
from transencoder.evaluation import Spearman
from transencoder.hub import export


@pytest.fixture(scope="module")
def saved(tiny_bert, tmp_path_factory):
    """A bi- and a cross-encoder, with weights that make scores differ."""
    folder = tmp_path_factory.mktemp("saved")
    save_telling_encoders(folder, tiny_bert, max_lengths=(24, 40))
    return folder


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """The bi-encoder's ONNX file, made as a person makes it."""
    folder = tmp_path_factory.mktemp("exported") / "bi"
    command = [warm_python().path / "python", ROOT / "scripts/export_onnx.py", saved / "bi", folder]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stderr.splitlines()) == 1 and str(folder / "model.onnx") in result.stderr
    return folder


class OnnxSentences:
    """The exported bi-encoder with nothing but onnxruntime and the tokenizer beside it."""

    def __init__(self, folder):
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, sentences):
        inputs = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="np")
        names = [item.name for item in self.session.get_inputs()]
        return self.session.run(["sentence_embedding"], {name: inputs[name] for name in names})[0]


def test_an_exported_bi_encoder_gives_the_same_embeddings(saved, exported):
    sentences = ["my parcel is late", "pay " * 60, "cancel"]
    expected = SentenceTransformer(str(saved / "bi"), device="cpu").encode(sentences)
    np.testing.assert_allclose(OnnxSentences(exported)(sentences), expected, atol=1e-5)


def test_an_exported_cross_encoder_gives_the_same_logits(saved, tmp_path):
    encoder = load_encoder(str(saved / "cross"))
    assert export.export_onnx(encoder, tmp_path / "cross") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "cross" / "model.onnx"))
    inputs = export.tokens_of(encoder, [["my parcel is late", "pay " * 60]])
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, encoder(**inputs), atol=1e-5)


def test_an_export_whose_scores_differ_is_not_kept(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "greatest_difference", lambda *_: float("nan"))
    with pytest.raises(FloatingPointError, match="differ by nan"):
        export.export_onnx(load_encoder(str(saved / "bi")), tmp_path / "bi")
    assert not (tmp_path / "bi").exists()


def test_the_check_notices_another_model(saved, exported):
    other = load_encoder(str(saved / "bi"))
    with torch.no_grad():
        other.backbone.encoder.layer[0].output.dense.weight.mul_(-30)
    assert export.greatest_difference(other, exported / "model.onnx") > export.TOLERANCE


def test_bad_input_is_refused(saved, exported, tiny_bert, tmp_path, monkeypatch, run_script):
    for words, expected in (
        ([saved / "bi", exported], "--overwrite"),
        ([saved / "bi", saved], "choose another folder"),
        ([tiny_bert, tmp_path / "new"], "--pooling"),
        ([tmp_path / "nowhere", tmp_path / "new"], "nowhere"),
    ):
        result = run_script("export_onnx.py", *words)
        assert result.returncode == 2 and expected in result.stderr and len(result.stderr.splitlines()) == 1
    with_onnx = tmp_path / "model"  # as many on the Hub
    shutil.copytree(saved / "bi", with_onnx)
    shutil.copy(exported / "model.onnx", with_onnx)
    result = run_script("export_onnx.py", with_onnx, with_onnx, "--overwrite")
    assert result.returncode == 2 and "exists; choose another folder" in result.stderr
    assert (with_onnx / "model.safetensors").is_file()
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = run_script("export_onnx.py", saved / "bi", tmp_path / "new")
    assert result.returncode == 2 and "pip install onnx" in result.stderr and not (tmp_path / "new").exists()


# --- MTEB ------------------------------------------------------------------------------------------------------------


class LocalPairs(AbsTaskSTS):
    """MTEB's task of scored pairs, with a local file in place of a dataset of the Hub."""

    metadata = mteb.TaskMetadata(
        name="LocalPairs",
        description="Random pairs of sentences with the share of common words as their score.",
        dataset={"path": "local/pairs", "revision": "1"},
        type="STS",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )
    min_score, max_score = 0, 5

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def load_data(self, **_):
        self.dataset = {"default": {"test": datasets.Dataset.from_list(self.rows)}}
        self.data_loaded = True


class OnnxModel(AbsEncoder):
    """The exported bi-encoder as a model of MTEB."""

    def __init__(self, folder):
        self.run = OnnxSentences(folder)
        self.mteb_model_meta = ModelMeta.create_empty({"name": "local/onnx", "revision": "1"})

    def encode(self, inputs, **_):
        return np.concatenate([self.run(batch["text"]) for batch in inputs])


def test_mteb_measures_what_we_measure(saved, exported, corpus):
    rows = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    rows = [
        row for row in rows if row["sentence1"] != row["sentence2"]
    ]  # whose cosines of 1 would be tied by rounding
    model = SentenceTransformer(str(saved / "bi"), device="cpu")
    first, second = (model.encode([row[side] for row in rows]) for side in ("sentence1", "sentence2"))
    cosines = torch.nn.functional.cosine_similarity(torch.tensor(first), torch.tensor(second)).tolist()
    ours = Spearman(keep_in_memory=True).compute(predictions=cosines, references=[row["score"] for row in rows])
    for measured in (model, OnnxModel(exported)):
        result = mteb.evaluate(measured, LocalPairs(rows), cache=None, show_progress_bar=False)
        (scores,) = result.task_results[0].scores["test"]
        assert 100 * scores["cosine_spearman"] == pytest.approx(ours["spearman"], abs=1e-3)

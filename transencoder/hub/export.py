"""Encoders as ONNX files, checked against the originals.

torch's own exporter does it: the newest release of Optimum (optimum-onnx 0.1.0) refuses transformers from 4.58 on.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.model_files import Kind
from transencoder.runtime.files import replacing
from transencoder.runtime.optional import load_optional

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_FILE = "model.onnx"
# All that an export may consist of.
FILES = {ONNX_FILE, f"{ONNX_FILE}.data", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
OUTPUTS = {"bi": "sentence_embedding", "cross": "logits"}
TOLERANCE = 1e-3  # of a cosine or a probability; other kernels add in another order
# Of several lengths, one beyond any model's positions, so that the check sees padding and cutting off.
CHECK_PAIRS = [
    ("where is my parcel", "my package has not arrived"),
    ("cancel my plan", "How do I change the e-mail address of my account before the next order is sent?"),
    ("Zürich, 3 o'clock", "yes"),
    ("a long text " * 400, "a short one"),
]


def check_packages() -> None:
    """Raise `InputError` if what the export needs cannot be imported."""
    for name in PACKAGES:
        load_optional(name)


class Exported(nn.Module):
    """An encoder whose inputs have an order instead of names, as the exporter wants them."""

    def __init__(self, encoder: BiEncoder | CrossEncoder, names: list[str]):
        super().__init__()
        self.encoder, self.names = encoder, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Return what the encoder does: embeddings float32 [n, d], not normalized, or logits float32 [n]."""
        return self.encoder(**dict(zip(self.names, values, strict=True)))


def tokens_of(encoder: BiEncoder | CrossEncoder, texts: list) -> dict[str, torch.Tensor]:
    """Sentences, or pairs of them, as the encoder's inputs: int64 [n, longest]."""
    columns = zip(*texts, strict=True) if encoder.kind == "cross" else [texts]
    return encoder.preprocessor().batch(*map(list, columns))


def export_onnx(encoder: BiEncoder | CrossEncoder, folder: Path) -> float:
    """Write model.onnx and the tokenizer to `folder`, which appears when the file gives the encoder's scores.

    Returns:
        The greatest difference of a score.
    Raises:
        FloatingPointError: it is above `TOLERANCE`.
    """
    encoder = encoder.eval().cpu()
    texts = [list(pair) for pair in CHECK_PAIRS] if encoder.kind == "cross" else [a for a, _ in CHECK_PAIRS]
    inputs = tokens_of(encoder, texts)
    names = list(inputs)
    sizes = tuple({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")} for _ in names)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            Exported(encoder, names),
            tuple(inputs.values()),
            dynamo=True,
            input_names=names,
            output_names=[OUTPUTS[encoder.kind]],
            dynamic_shapes={"values": sizes},
            verbose=False,
        )
    with replacing(folder) as temporary:
        temporary.mkdir()
        program.save(str(temporary / ONNX_FILE))
        encoder.tokenizer.save_pretrained(temporary)
        difference = greatest_difference(encoder, temporary / ONNX_FILE)
        if not difference <= TOLERANCE:
            raise FloatingPointError(f"the exported model's scores differ by {difference:.2g}; nothing was kept")
    return difference


def greatest_difference(encoder: BiEncoder | CrossEncoder, path: Path) -> float:
    """Between the scores of an encoder and of its ONNX file, over `CHECK_PAIRS`, all together and each alone."""
    onnxruntime = load_optional("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run_file(texts: list) -> torch.Tensor:
        inputs = {name: value.numpy() for name, value in tokens_of(encoder, texts).items()}
        return torch.from_numpy(session.run(None, inputs)[0])

    def run_encoder(texts: list) -> torch.Tensor:
        with torch.no_grad():
            return encoder(**tokens_of(encoder, texts))

    differences = [
        np.abs(_scores(encoder.kind, run_file, pairs) - _scores(encoder.kind, run_encoder, pairs)).max()
        for pairs in (CHECK_PAIRS, *([pair] for pair in CHECK_PAIRS))
    ]
    return float(max(differences))


def _scores(kind: Kind, run: Callable[[list], torch.Tensor], pairs: list[tuple[str, str]]) -> np.ndarray:
    """Cosines or sigmoids, float32 [pairs]."""
    if kind == "cross":
        return run([list(pair) for pair in pairs]).sigmoid().numpy()
    first, second = (run([pair[side] for pair in pairs]) for side in (0, 1))
    return torch.nn.functional.cosine_similarity(first, second).numpy()

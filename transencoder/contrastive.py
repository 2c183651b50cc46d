"""Step 1: two views of every sentence, the head that training puts on top, and drophead."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from transencoder.config.arguments import ContrastiveArguments
from transencoder.data.pools import read_sentence_pool
from transencoder.data.tables import SENTENCES, content_checksum, sample
from transencoder.data.tokens import tokenize, training_tokens
from transencoder.embeddings import embed
from transencoder.encoders import BiEncoder, load_bi_encoder
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.losses import InfoNCE, QueueLoss
from transencoder.model_files import ModelOptions
from transencoder.runtime.locks import unlock
from transencoder.runtime.records import model_identity
from transencoder.runtime.shards import Shards

# What the output of a layer's attention heads goes into, in BERT/RoBERTa/XLM-R/DeBERTa, DistilBERT, MPNet, ModernBERT.
ATTENTION_OUTPUT = re.compile(r"(attention\.output\.dense|attention\.out_lin|attention\.attn\.o|attn\.Wo)$")


def read_sentences(arguments: ContrastiveArguments) -> datasets.Dataset:
    """Read the distinct sentences to train on, a sample of them if so asked."""
    sentences = read_sentence_pool(arguments.sentences, arguments.data_dir, arguments)
    return sample(sentences, arguments.num_sentences, arguments.seed)


def load_start(arguments: ContrastiveArguments, options: ModelOptions) -> BiEncoder:
    """Load the language model with the pooling, head and drophead that step 1 trains it with."""
    # Drophead takes the place of dropout (Mirror-BERT, section 3).
    dropout = 0.0 if arguments.drophead and arguments.dropout is None else arguments.dropout
    encoder = load_bi_encoder(arguments.model_name_or_path, options, dropout)
    if arguments.mlp_head:
        encoder.head = MLPHead(encoder.width)
    if arguments.drophead:
        add_drophead(encoder, arguments.drophead)
    return encoder


def task_of(
    sentences: datasets.Dataset, encoder: BiEncoder, arguments: ContrastiveArguments, inference: Inference
) -> tuple[Dataset, InfoNCE | QueueLoss]:
    """Return what step 1 trains on, and its loss."""
    if arguments.teacher is None:
        return views_of(sentences, encoder, arguments), InfoNCE(arguments.temperature)
    vectors = teacher_vectors(sentences, arguments, inference)
    size = min(arguments.queue_size, len(sentences))
    chosen = np.sort(np.random.default_rng(arguments.seed).choice(len(sentences), size, replace=False))
    queue, reduced = (torch.from_numpy(rows) for rows in (vectors[chosen], with_width(vectors[chosen], encoder.width)))
    loss_of = QueueLoss(queue, reduced, arguments.temperature, arguments.teacher_temperature)
    return TeacherViews(sentences, encoder, arguments.max_length, vectors, chosen), loss_of


def teacher_vectors(sentences: datasets.Dataset, arguments: ContrastiveArguments, inference: Inference) -> np.ndarray:
    """Return what the teacher makes of the sentences: float32 [sentences, d], of unit length, memory-mapped.

    The file lies among the checkpoints, and goes with them.
    """
    output, accelerator = Path(arguments.output_dir) / "checkpoints" / "teacher", inference.accelerator
    metadata = {**model_identity(arguments.teacher, None), "read": content_checksum(sentences)}
    shards = Shards(output, metadata, arguments.shard_rows, accelerator)
    teacher = inference.load(arguments.teacher)
    teacher.compare_by_cosine()
    tokens = tokenize(sentences, SENTENCES, teacher.preprocessor())
    kept = dataclasses.replace(inference, shards=shards)
    vectors = embed([(teacher, [tokens])], shards.folder / "vectors.vec", kept)
    if accelerator.is_main_process:
        unlock(output)  # the output folder has a lock of its own
    return vectors


def with_width(vectors: np.ndarray, width: int) -> np.ndarray:
    """Return vectors of unit length (float32 [n, d]) in `width` dimensions, with inner products as near as can be.

    The principal directions are kept; where there are fewer of them than `width`, zeros follow.
    """
    _, directions = np.linalg.eigh(vectors.T @ vectors)
    directions = directions[:, ::-1][:, :width]
    strongest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[strongest, np.arange(directions.shape[1])])  # the same everywhere
    reduced = vectors @ directions
    reduced = np.pad(reduced, ((0, 0), (0, width - reduced.shape[1])))
    return (reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def views_of(sentences: datasets.Dataset, encoder: BiEncoder, arguments: ContrastiveArguments) -> Dataset:
    """Return two views of every sentence, as the method makes them."""
    if arguments.method == "mirror":
        return MaskedViews(sentences, encoder, arguments.max_length, arguments.mask_characters, arguments.seed)
    return DropoutViews(sentences, encoder, arguments.max_length)


class DropoutViews(Dataset):
    """Step 1, SimCSE: every sentence of the batch twice; dropout makes the two differ."""

    def __init__(self, table: datasets.Dataset, encoder: BiEncoder, max_length: int):
        self.tokens = training_tokens(table, SENTENCES, encoder.preprocessor(max_length=max_length))
        self.lengths = self.tokens.lengths

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"inputs": self.tokens.batch(np.concatenate([indices, indices]))}


class TeacherViews(DropoutViews):
    """Step 1, from a teacher: every sentence once, with what the teacher makes of it.

    Args:
        vectors: the teacher's, float32 [sentences, d].
        queue: int [queue], rows of the sentences that the others are compared with.
    """

    def __init__(
        self, table: datasets.Dataset, encoder: BiEncoder, max_length: int, vectors: np.ndarray, queue: np.ndarray
    ):
        super().__init__(table, encoder, max_length)
        self.vectors, self.places = vectors, np.full(len(table), -1)
        self.places[queue] = np.arange(len(queue))

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        teacher, places = torch.from_numpy(self.vectors[indices]), torch.from_numpy(self.places[indices])
        return {"inputs": self.tokens.batch(np.asarray(indices)), "teacher": teacher, "places": places}


class MaskedViews(Dataset):
    """Step 1, Mirror-BERT: every sentence as it is, and with a random span of characters replaced by the mask token.

    Args:
        table: column sentence.
        span: length of the masked span, in characters; sentences under `MIN_CHARACTERS` stay whole.
    Raises:
        InputError: the tokenizer has no mask token.
    """

    MIN_CHARACTERS = 30

    def __init__(self, table: datasets.Dataset, encoder: BiEncoder, max_length: int, span: int, seed: int):
        self.mask = encoder.tokenizer.mask_token
        if self.mask is None:
            raise InputError("--method mirror: the model's tokenizer has no mask token; use --method simcse")
        self.texts, self.span, self.seed, self.epoch = table["sentence"], span, seed, 0
        self.preprocessor = encoder.preprocessor(max_length=max_length)
        self.lengths = training_tokens(table, SENTENCES, self.preprocessor).lengths

    def mask_span(self, text: str, index: int) -> str:
        """Return `text` with the span masked; which one depends on seed, epoch and row, never on the world size."""
        if len(text) < self.MIN_CHARACTERS:
            return text
        span = min(self.span, len(text))
        start = np.random.default_rng((self.seed, self.epoch, index)).integers(len(text) - span + 1)
        return text[:start] + self.mask + text[start + span :]

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        texts = [self.texts[index] for index in indices]
        masked = [self.mask_span(text, index) for text, index in zip(texts, indices, strict=True)]
        return {"inputs": self.preprocessor.batch(texts + masked)}


class MLPHead(nn.Sequential):
    """SimCSE's head: dense + tanh, float32."""

    def __init__(self, size: int):
        super().__init__(nn.Linear(size, size), nn.Tanh())


def add_drophead(encoder: BiEncoder, probability: float) -> None:
    """Drop whole attention heads in training, the rest scaled up (Zhou et al. 2020, as Mirror-BERT uses it).

    Args:
        encoder: changed in place.
        probability: of each head of each layer, drawn for every input of the batch.
    """
    layers = [module for name, module in encoder.backbone.named_modules() if ATTENTION_OUTPUT.search(name)]
    if not layers:
        raise InputError(
            f"--drophead: the attention layers of a {encoder.backbone.config.model_type} model are not known"
        )
    heads = encoder.backbone.config.num_attention_heads

    def drop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not encoder.training:
            return None
        states = inputs[0]  # [n, length, heads * size]
        keep = (torch.rand(states.shape[0], 1, heads, 1, device=states.device) >= probability).to(states.dtype)
        scale = heads / keep.sum(2, keepdim=True).clamp(min=1)
        return ((states.unflatten(-1, (heads, -1)) * keep * scale).flatten(-2), *inputs[1:])

    for layer in layers:
        layer.register_forward_pre_hook(drop)

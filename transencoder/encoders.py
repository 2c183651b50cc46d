"""The two kinds of model: a SentenceTransformer and a CrossEncoder of sentence-transformers, with tensors in and out.

What their authors meant (modules, prompts, lengths, similarity) is read and saved by sentence-transformers itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transencoder.data.tokens import Preprocessor
from transencoder.model_checks import check_finite, check_whole, inspect_encoder, keeps_head
from transencoder.model_files import (
    NO_OPTIONS,
    Kind,
    ModelOptions,
    dropouts,
    label_of,
    prompts_of,
    read_config,
    read_modules,
    root_of,
    told_in_one_line,
)
from transencoder.pooling import POOLINGS
from transencoder.runtime.accelerator import log
from transencoder.runtime.speed import read_first_token_only
from transencoder.sanity import check_outputs

UNLIMITED = 2**20  # tokens; who names more, as the libraries do for no limit, or none, gets
LONGEST = 512
SAFE = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}


class Encoder(nn.Module):
    """A sentence-transformers model whose inputs and outputs are padded batches.

    Args:
        model: a SentenceTransformer or a CrossEncoder that begins with a Transformer.
        prompts: put before the first and the second sentence of a pair.

    Attributes:
        name: of its folder, for progress bars.
    """

    kind: Kind

    def __init__(self, model: Any, prompts: tuple[str | None, str | None] = (None, None)):
        super().__init__()
        self.model, self.prompts, self.name = model, prompts, self.kind
        self._no_split_modules = _layer_classes(self.backbone)
        if self.reads_first_token:
            read_first_token_only(self.backbone)

    @property
    def backbone(self) -> PreTrainedModel:
        """The language model."""
        return self.model[0].model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What cuts text into tokens; `preprocessor` uses it as the model wants it used."""
        return self.model[0].tokenizer

    @property
    def max_length(self) -> int:
        """Most tokens of an input, as the model says."""
        return self.model[0].max_seq_length

    def preprocessor(self, side: int = 0, max_length: int | None = None) -> Preprocessor:
        """Return what makes tokens of text.

        Args:
            side: 0 for the first sentence of a pair, or for both; 1 for the second.
            max_length: fewer tokens than the model's own `max_length`.
        """
        return Preprocessor(self.model[0], self.prompts[side], max_length, pairs=self.kind == "cross")

    def features(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return what the modules make of a padded batch."""
        transformer = self.model[0]
        extra = {"modality": "message" if "message" in transformer.modality_config else "text"}
        if transformer.transformer_task == "text-generation":
            extra["logits_to_keep"] = 1
        return self.model({**inputs, **extra})

    def save_pretrained(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write the model as sentence-transformers does. `state`: its gathered weights, where they are sharded."""
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_truncation()  # or the length of training would be saved with it
        with _weights_of(self, state or {}):
            self.model.save_pretrained(str(folder), create_model_card=False)


class BiEncoder(Encoder):
    """A SentenceTransformer: sentences -> embeddings, compared by its similarity function.

    Args:
        head: used in training only (SimCSE's MLP), and never saved.
    """

    kind: Kind = "bi"

    def __init__(self, model: Any, prompts: tuple[str | None, str | None] = (None, None)):
        super().__init__(model, prompts)
        self.head: nn.Module | None = None
        # Pooling reads the token vectors; a pooler that gets no gradient would stop data-parallel training.
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler.requires_grad_(False)
        # Pooled in float32, whatever the autocast type.
        model[0].register_forward_hook(_token_embeddings_in_float32)

    @property
    def reads_first_token(self) -> bool:
        """Whether nothing but the first token's vector is read of the language model."""
        pooling = self.model[1] if len(self.model) > 1 else None
        # Where the prompt is left out, the first token is the first one behind it.
        return getattr(pooling, "pooling_mode", None) == "cls" and pooling.include_prompt

    @property
    def similarity(self) -> str:
        """A key of `scoring.SIMILARITIES`: "cosine", "dot", "euclidean" or "manhattan"."""
        return self.model.similarity_fn_name

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return self.model.truncate_dim or self.model.get_embedding_dimension()

    def compare_by_cosine(self) -> None:
        """Make the cosine its similarity, as the losses do; a start that says otherwise is told of."""
        if self.similarity != "cosine":
            log(f"{self.name} compares by {self.similarity}; what is trained from it compares by cosine, and says so")
            self.model.similarity_fn_name = "cosine"

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return embeddings, float32 [n, width], of a padded batch (int64 [n, length]); not normalized by us."""
        embeddings = self.features(inputs)["sentence_embedding"].float()[:, : self.model.truncate_dim]
        return self.head(embeddings) if self.head is not None and self.training else embeddings


class CrossEncoder(Encoder):
    """A CrossEncoder: a pair in one input -> a logit, and its score by the model's activation function.

    Args:
        label: place of the label whose probability is the score, of a classifier with several labels.
    """

    kind: Kind = "cross"

    def __init__(self, model: Any, prompts: tuple[str | None, str | None] = (None, None), label: int | None = None):
        super().__init__(model, prompts)
        self.label = label
        *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
        if last.out_features == model.num_labels:
            _compute_in_float32(last)

    @property
    def reads_first_token(self) -> bool:
        """Whether nothing but the first token's vector is read of the language model."""
        return self.model[0].module_output_name == "scores"

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [n], of a padded batch (int64 [n, length])."""
        logits = self.features(inputs)["scores"].float()
        if self.label is None:
            return logits[:, 0]
        others = torch.arange(logits.shape[1], device=logits.device) != self.label
        return logits[:, self.label] - logits[:, others].logsumexp(dim=1)  # its sigmoid is the label's softmax

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores of logits, float32 [n]; as `predict` does, or the probability of the label."""
        return logits.sigmoid() if self.label is not None else self.model.activation_fn(logits)

    @property
    def is_bounded(self) -> bool:
        """Whether scores lie between 0 and 1."""
        return self.label is not None or isinstance(self.model.activation_fn, nn.Sigmoid)


def load_encoder(name: str, options: ModelOptions = NO_OPTIONS) -> BiEncoder | CrossEncoder:
    """Load what was saved at `name`, a folder or Hub id, for scoring."""
    return load_cross_encoder(name, options) if inspect_encoder(name) == "cross" else load_bi_encoder(name, options)


def load_bi_encoder(name: str, options: ModelOptions = NO_OPTIONS, dropout: float | None = None) -> BiEncoder:
    """Load a SentenceTransformer, or a plain language model with the pooling of `options`.

    Args:
        name: folder or Hub id.
        dropout: overrides the configuration's.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    is_plain = inspect_encoder(name) == "plm"
    config = read_config(name, dropout)
    check_whole(name, config, classifier=False)
    with told_in_one_line(name, "model"):
        if is_plain:
            transformer = _transformer(name, "feature-extraction", config, dropout)
            pooling = Pooling(transformer.get_embedding_dimension(), POOLINGS[options.pooling].function)
            model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        else:
            changed = dropouts(config, dropout)
            model = SentenceTransformer(name, device="cpu", model_kwargs=dict(SAFE), config_kwargs=changed)
        encoder = BiEncoder(_checked(name, model), prompts_of(name, options))
        check_outputs(name, encoder)
    encoder.name = Path(name).name
    return encoder


def load_cross_encoder_start(name: str, dropout: float | None = None) -> CrossEncoder:
    """Load what step 2 trains: a cross-encoder that gives one score, as it is, or any other model with a new head."""
    new_head = not keeps_head(name)
    log(f"{name}: {'gets a new head' if new_head else 'a cross-encoder already, which keeps its head'}")
    encoder = load_cross_encoder(name, dropout=dropout, new_head=new_head)
    encoder.model.activation_fn = nn.Sigmoid()  # as the losses have it; many a reranker's score is the logit itself
    return encoder


def load_cross_encoder(
    name: str, options: ModelOptions = NO_OPTIONS, dropout: float | None = None, new_head: bool | None = None
) -> CrossEncoder:
    """Load a CrossEncoder, or a plain language model with a new head, whose weights depend on the seed.

    Args:
        name: folder or Hub id.
        dropout: overrides the configuration's.
        new_head: whether there is one; by default, where the model is no cross-encoder.
    """
    from sentence_transformers import CrossEncoder as Model

    new_head = inspect_encoder(name) != "cross" if new_head is None else new_head
    config = read_config(name, dropout)
    if new_head:
        config.num_labels = 1
    if len(read_modules(name)) < 2 or new_head:
        check_whole(name, config, classifier=True, new_head=new_head)
    with told_in_one_line(name, "model"):
        if new_head:
            model = Model(modules=[_transformer(name, "sequence-classification", config, dropout)], device="cpu")
        else:
            changed = dropouts(config, dropout)
            model = Model(name, device="cpu", model_kwargs=dict(SAFE), config_kwargs=changed)
        prompts = (None, None) if new_head else prompts_of(name, options)
        encoder = CrossEncoder(_checked(name, model), prompts, None if new_head else label_of(name, options.label))
        check_outputs(name, encoder)
    encoder.name = Path(name).name
    return encoder


def _transformer(name: str, task: str, config: Any, dropout: float | None) -> nn.Module:
    """Load a plain language model as a sentence-transformers module; a head that it lacks is random."""
    from sentence_transformers.base.modules import Transformer

    changed = dropouts(config, dropout) | ({"num_labels": 1} if task == "sequence-classification" else {})
    # A language model that was tuned for something else may bring a head of another size: it is not used.
    weights = SAFE | {"ignore_mismatched_sizes": task == "sequence-classification"}
    root = root_of(read_modules(name))
    inside = {"subfolder": root} if root else {}
    transformer = Transformer(
        name,
        transformer_task=task,
        model_kwargs=weights | inside,
        config_kwargs={"trust_remote_code": False, **changed, **inside},
        processor_kwargs={"trust_remote_code": False, **inside},
    )
    # Sentences are sentences: a chat template is for models that were tuned with it, which say so themselves.
    transformer.modality_config.pop("message", None)
    return transformer


def _checked(name: str, model: Any) -> Any:
    """Return `model`, its weights being numbers, its inputs no longer than its positions, its padding known."""
    check_finite(name, model.named_parameters())
    transformer = model[0]
    transformer.max_seq_length = _fit(transformer.max_seq_length, transformer.model.config)
    if getattr(transformer.model.config, "pad_token_id", None) is None:
        transformer.model.config.pad_token_id = transformer.tokenizer.pad_token_id
    return model


def _fit(length: float, config: Any) -> int:
    """Return `length`, or what the model's positions allow (RoBERTa's begin behind the padding id)."""
    positions = getattr(config, "max_position_embeddings", None) or -1
    if positions < 0:  # T5, XLNet: any number will do
        positions = length if length <= UNLIMITED else getattr(config, "n_positions", None) or LONGEST
    if config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
        positions -= 2
    return int(min(length, positions))


def _token_embeddings_in_float32(module: nn.Module, inputs: Any, features: dict[str, Any]) -> None:
    features["token_embeddings"] = features["token_embeddings"].float()


def _compute_in_float32(layer: nn.Linear) -> None:
    """Take the layer out of autocast: logits rounded to bf16 have a few dozen values only, and tie."""

    def in_float32(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.float()
            return nn.functional.linear(states.float(), layer.weight.float(), bias)

    layer.forward = in_float32


@contextmanager
def _weights_of(encoder: Encoder, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let `encoder` have the weights of `state`, by their names in its state dict, while it is entered."""
    before = []
    for name in state:
        holder, _, last = name.rpartition(".")
        owner = encoder.get_submodule(holder)
        if last in owner._parameters:
            before.append((owner, last, owner._parameters[last]))
            owner._parameters[last] = nn.Parameter(state[name], requires_grad=False)
    try:
        yield
    finally:
        for owner, last, parameter in before:
            owner._parameters[last] = parameter


def _layer_classes(backbone: PreTrainedModel) -> list[str]:
    """Return the class names of the model's layers, each of which FSDP gathers by itself."""
    stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    longest = max(stacks, key=len, default=())
    return sorted({type(layer).__name__ for layer in longest})

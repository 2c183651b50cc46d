"""The two kinds of model. Both are saved as plain folders that transformers and sentence-transformers load."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from transencoder.errors import InputError
from transencoder.model_files import (
    POOLINGS,
    Kind,
    check_finite,
    inspect_encoder,
    load_tokenizer,
    pickled,
    pooling_of,
    read_config,
    saved_length,
    told_in_one_line,
)
from transencoder.runtime.files import write_json
from transencoder.runtime.speed import read_first_token_only

# These class paths are the ones that sentence-transformers 3 to 6 all resolve.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
# What the output of a layer's attention heads goes into, in BERT/RoBERTa/XLM-R/DeBERTa, DistilBERT, MPNet, ModernBERT.
ATTENTION_OUTPUT = re.compile(r"(attention\.output\.dense|attention\.out_lin|attention\.attn\.o|attn\.Wo)$")


class BiEncoder(nn.Module):
    """A language model and a pooling: sentences -> embeddings, compared by cosine.

    Args:
        backbone: a transformers encoder.
        pooling: "cls" (last layer's first token, no pooler) or "mean" (padding left out).
        max_length: most tokens of a sentence.
        head: used in training only (SimCSE's MLP), and never saved.
    """

    kind: Kind = "bi"

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str,
        max_length: int,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone, self.tokenizer, self.pooling, self.max_length, self.head = (
            backbone,
            tokenizer,
            pooling,
            max_length,
            head,
        )
        self._no_split_modules = _layer_classes(backbone)
        if pooling == "cls":
            read_first_token_only(backbone)

    @classmethod
    def from_pretrained(
        cls, name: str, pooling: str | None = None, max_length: int | None = None, dropout: float | None = None
    ) -> "BiEncoder":
        """Load a sentence-transformers model, or a plain language model with a given `pooling`.

        Args:
            name: folder or Hub id.
            pooling: for a plain language model; a sentence-transformers model says it itself.
            max_length: overrides what was saved.
            dropout: overrides the configuration's.
        """
        kind, pooling = inspect_encoder(name), pooling_of(name, pooling)
        backbone = _load_backbone(AutoModel, name, read_config(name, dropout))
        # Pooling reads the token vectors; a pooler that gets no gradient would stop data-parallel training.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)
        tokenizer = load_tokenizer(name)
        length = max_length or (saved_length(name) if kind == "bi" else None) or tokenizer.model_max_length
        return cls(backbone, tokenizer, pooling, _fit(length, backbone))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Token ids and mask [n, length] -> embeddings float32 [n, d], not normalised."""
        states = self.backbone(**accepted_inputs(self.backbone, inputs)).last_hidden_state.float()
        if self.pooling == "cls":
            embeddings = states[:, 0]
        else:
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            embeddings = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.head(embeddings) if self.head is not None and self.training else embeddings

    def save_pretrained(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write the sentence-transformers layout. `state`: this model's gathered weights, where they are sharded."""
        _save_backbone(self, folder, state)
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(folder)
        (folder / "1_Pooling").mkdir()
        flags = {flag: pooling == self.pooling for pooling, flag in POOLINGS.items()}
        size = {"word_embedding_dimension": self.backbone.config.hidden_size}
        write_json(folder / "modules.json", MODULES)
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": self.max_length, "do_lower_case": False})
        write_json(folder / "1_Pooling" / "config.json", {**size, **flags})
        write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


class CrossEncoder(nn.Module):
    """A language model with one logit on top: a pair in one input -> a score."""

    kind: Kind = "cross"

    def __init__(self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int):
        super().__init__()
        self.backbone, self.tokenizer, self.max_length = backbone, tokenizer, max_length
        self._no_split_modules = _layer_classes(backbone)
        read_first_token_only(backbone)
        for layer in backbone.modules():
            if isinstance(layer, nn.Linear) and layer.out_features == 1:
                _compute_in_float32(layer)

    @classmethod
    def from_pretrained(cls, name: str, max_length: int | None = None, dropout: float | None = None) -> "CrossEncoder":
        """Load a cross-encoder, or a language model with a new head, whose weights depend on the seed.

        Args:
            name: folder or Hub id.
            max_length: overrides what was saved.
            dropout: overrides the configuration's.
        """
        config = read_config(name, dropout)
        config.num_labels = 1
        # As sentence-transformers 4 to 6 read it: scores are the sigmoid of the logit.
        config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
        # A language model that was tuned for something else may bring a head of another size: it is not used.
        new_head = inspect_encoder(name) != "cross"
        backbone = _load_backbone(AutoModelForSequenceClassification, name, config, new_head)
        tokenizer = load_tokenizer(name)
        return cls(backbone, tokenizer, _fit(max_length or tokenizer.model_max_length, backbone))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Token ids, mask and types [n, length] -> logits float32 [n]."""
        return self.backbone(**accepted_inputs(self.backbone, inputs)).logits.squeeze(-1).float()

    def save_pretrained(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write a plain sequence classifier. `state`: this model's gathered weights, where they are sharded."""
        _save_backbone(self, folder, state)
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(folder)


def load_encoder(name: str, pooling: str | None = None) -> BiEncoder | CrossEncoder:
    """Load what was saved at `name` for scoring."""
    if inspect_encoder(name) == "cross":
        return CrossEncoder.from_pretrained(name)
    return BiEncoder.from_pretrained(name, pooling)


def _compute_in_float32(layer: nn.Linear) -> None:
    """Take the layer out of autocast: logits rounded to bf16 have a few dozen values only, and tie."""

    def in_float32(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.float()
            return nn.functional.linear(states.float(), layer.weight.float(), bias)

    layer.forward = in_float32


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


def _load_backbone(auto: Any, name: str, config: Any, new_head: bool = False) -> PreTrainedModel:
    """Weights of a folder or Hub id, in float32; never pickled ones.

    Args:
        new_head: what lies on top of the encoder may be missing, or be of another size, and then it is random.
    """
    with told_in_one_line(name, "model"):
        try:
            backbone, report = auto.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=new_head,
                use_safetensors=True,  # of a public model on the Hub it finds the conversion that the Hub's robot made
                trust_remote_code=False,
                output_loading_info=True,
            )
        except OSError as error:
            if "use_safetensors" not in str(error):
                raise
            raise InputError(pickled(name, auto.__name__, "DIR") + ", and pass DIR") from error
    # What is missing is random. A new head is; so is a pooler, which a bi-encoder does not read and a language model
    # may come without.
    inside = f"{backbone.base_model_prefix}." if new_head else ""
    may_lack_pooler = new_head or auto is AutoModel
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    absent = sorted(key for key in absent if key.startswith(inside) and not (may_lack_pooler and "pooler" in key))
    if absent:
        raise InputError(f"{name}: its weights lack {absent[0]}, or have it in another size than config.json says")
    check_finite(name, backbone.named_parameters())
    return backbone


def _fit(length: int, backbone: PreTrainedModel) -> int:
    """`length`, or what the model's positions allow (RoBERTa's begin behind the padding id)."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or length
    if backbone.config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
        positions -= 2
    return min(length, positions)


def _layer_classes(backbone: PreTrainedModel) -> list[str]:
    """Class names of the model's layers, each of which FSDP gathers by itself (its name for them in `accelerate`)."""
    stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    longest = max(stacks, key=len, default=())
    return sorted({type(layer).__name__ for layer in longest})


def accepted_inputs(backbone: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Only the inputs that the model takes: DistilBERT, for one, knows no token types."""
    names = inspect.signature(backbone.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _save_backbone(encoder: BiEncoder | CrossEncoder, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    prefix = "backbone."
    if state is not None:
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    encoder.backbone.save_pretrained(folder, state_dict=state)

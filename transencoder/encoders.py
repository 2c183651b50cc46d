"""The two kinds of model. Both are saved as plain folders that transformers and sentence-transformers load.

A folder says itself what it holds: `modules.json` makes it a bi-encoder, a sequence classifier with one label in
`config.json` makes it a cross-encoder, anything else is a plain language model.
"""

import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from transencoder.errors import InputError
from transencoder.files import RUN_FILE, write_json

Kind = Literal["bi", "cross", "plm"]
POOLINGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
# These class paths are the ones that sentence-transformers 3 to 6 all resolve.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}  # Normalize changes no cosine
# What the output of a layer's attention heads goes into, in BERT/RoBERTa/XLM-R/DeBERTa, DistilBERT, MPNet, ModernBERT.
ATTENTION_OUTPUT = re.compile(r"(attention\.output\.dense|attention\.out_lin|attention\.attn\.o|attn\.Wo)$")


# --- what a name stands for ------------------------------------------------------------------------------------------


def inspect_encoder(name: str) -> Kind:
    """What `name`, a folder or a Hub id, holds, from its configuration alone: no weights are loaded.

    Raises:
        InputError: not a model, or neither a folder nor a Hub id that can be reached.
    """
    config = read_model_file(name, "config.json")
    if config is None:
        raise InputError(f"{name}: not an encoder (no config.json)")
    if not isinstance(config, dict) or str(config.get("model_type")) not in CONFIG_MAPPING:
        raise InputError(f"{name}: not an encoder (config.json names no model_type that transformers knows)")
    if Path(name).is_dir():
        _check_folder(Path(name))
    architectures = config.get("architectures") or []
    classifier = any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
    # sentence-transformers 6 writes modules.json for a cross-encoder too, with one module.
    modules = _modules(name)
    if modules is not None and not (classifier and len(modules) == 1):
        return "bi"
    if classifier:
        labels = len(config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"})
        if labels != 1:
            raise InputError(f"{name}: a classifier with {labels} labels, not a cross-encoder (which has one)")
        return "cross"
    return "plm"


def _check_folder(folder: Path) -> None:
    """Refuse a model's folder without readable weights or without a tokenizer, or one that is still being written."""
    run = read_model_file(str(folder), RUN_FILE)
    if isinstance(run, dict) and run.get("status") == "running":
        raise InputError(f"{folder}: its training is not finished; run the same command again")
    weights = [path for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    if not weights:
        raise InputError(f"{folder}: no weights (model.safetensors)")
    for path in weights:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass  # reads the header, and compares the file's length with it
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: damaged: {error}") from error
    if not any(path for pattern in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(pattern)):
        raise InputError(f"{folder}: no tokenizer")


def _modules(name: str) -> list[str] | None:
    """Class names of a sentence-transformers model's modules; None for a plain model."""
    modules = read_model_file(name, "modules.json")
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise InputError(f"{name}: modules.json is not a list of modules")
    return [str(module["type"]).rpartition(".")[2] for module in modules]


def read_model_file(name: str, file: str) -> Any:
    """A JSON file of a model, from its folder or the Hub; None where the model has no such file."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{name}: not a folder with an encoder")
    path = folder / file if folder.is_dir() else _from_hub(name, file)
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {file} cannot be read: {error}") from error


def _from_hub(name: str, file: str) -> Path | None:
    """A file of a Hub model in the local cache, downloaded where needed; None where the model has no such file."""
    try:
        return Path(huggingface_hub.hf_hub_download(name, file, local_files_only=not _hub_answers(name)))
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        if huggingface_hub.try_to_load_from_cache(name, "config.json"):
            return None  # the model is in the cache, and this file is not part of it
        raise InputError(
            f"{name}: no such folder, and the Hub cannot be reached; download the model elsewhere "
            f"(hf download {name} --local-dir DIR) and pass its folder"
        ) from error
    except huggingface_hub.errors.EntryNotFoundError:
        return None


@functools.cache
def _hub_answers(name: str) -> bool:
    """One quick question, because the Hub client's own downloads retry for half a minute where there is no network."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except huggingface_hub.errors.HFValidationError as error:
        raise InputError(f"{name}: no such folder, and not a Hub id (ORG/NAME)") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise InputError(f"{name}: no such folder, and no such model on the Hub (or it is private)") from error
    except Exception:  # offline mode, or one of the HTTP client's many ways to say "no connection"
        return False
    return True


def check_bi_encoder(name: str, pooling: str | None) -> None:
    """Refuse, before any weights are loaded, what cannot be a bi-encoder."""
    kind = inspect_encoder(name)
    if kind == "cross":
        raise InputError(f"{name}: a cross-encoder, where a bi-encoder is needed")
    if kind == "plm" and pooling is None:
        raise InputError(
            f"{name}: a plain language model does not say how it pools; add --pooling cls or --pooling mean"
        )
    if kind == "bi":
        read_pooling(name)


def check_encoders(names: list[str], pooling: str | None) -> None:
    """Refuse, before any weights are loaded, what cannot score pairs."""
    for name in names:
        if inspect_encoder(name) != "cross":
            check_bi_encoder(name, pooling)


def check_bi_encoders(names: list[str], pooling: str | None) -> None:
    """As `check_bi_encoder`, for several."""
    for name in names:
        check_bi_encoder(name, pooling)


def check_language_model(name: str) -> None:
    """Refuse, before any weights are loaded, what a cross-encoder or step 1 cannot start from."""
    if inspect_encoder(name) == "cross":
        raise InputError(f"{name}: already a cross-encoder, where a pretrained language model is needed")


def check_cross_encoder(name: str, flag: str) -> None:
    """Refuse, before any weights are loaded, what is not a cross-encoder. `flag`: what asks for one."""
    if inspect_encoder(name) != "cross":
        raise InputError(f"{flag}: {name} is not a cross-encoder")


def read_pooling(name: str) -> str:
    """The pooling of a sentence-transformers folder, in its older form (one flag a mode) or its newer one (a name)."""
    modules = _modules(name)
    if set(modules) - KNOWN_MODULES or modules[:2] != ["Transformer", "Pooling"]:
        raise InputError(
            f"{name}: its modules are {', '.join(modules)}; only Transformer, Pooling and Normalize are supported"
        )
    config = read_model_file(name, "1_Pooling/config.json") or {}
    modes = {
        mode.removeprefix("pooling_mode_")
        for mode, on in config.items()
        if mode.startswith("pooling_mode_") and on is True
    }
    named = config.get("pooling_mode")
    modes |= set([named] if isinstance(named, str) else named or [])
    for pooling in POOLINGS:
        if modes in ({pooling}, {POOLINGS[pooling].removeprefix("pooling_mode_")}):
            return pooling
    raise InputError(f"{name}: pooling {'+'.join(sorted(modes)) or 'unknown'}; only cls and mean are supported")


# --- the models ------------------------------------------------------------------------------------------------------


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
        kind = inspect_encoder(name)
        check_bi_encoder(name, pooling)
        backbone = AutoModel.from_pretrained(name, config=_config(name, dropout), dtype=torch.float32)
        # Pooling reads the token vectors; a pooler that gets no gradient would stop data-parallel training.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)
        saved = read_model_file(name, "sentence_bert_config.json") if kind == "bi" else None
        tokenizer = AutoTokenizer.from_pretrained(name)
        length = max_length or (saved or {}).get("max_seq_length") or tokenizer.model_max_length
        return cls(backbone, tokenizer, read_pooling(name) if kind == "bi" else pooling, _fit(length, backbone))

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
        config = _config(name, dropout)
        config.num_labels = 1
        # As sentence-transformers 4 to 6 read it: scores are the sigmoid of the logit.
        config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
        # A language model that was tuned for something else may bring a head of another size: it is not used.
        backbone = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=inspect_encoder(name) != "cross"
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
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


def _config(name: str, dropout: float | None) -> Any:
    config = AutoConfig.from_pretrained(name)
    if dropout is not None:
        for key in list(config.to_dict()):
            if "dropout" in key and isinstance(getattr(config, key), float | int):
                setattr(config, key, dropout)
    return config


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

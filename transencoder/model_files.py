"""What a model's name stands for: a folder or a Hub id, told from its files before any weights are loaded.

A folder says itself what it holds: `modules.json` makes it a bi-encoder, a sequence classifier with one label in
`config.json` makes it a cross-encoder, anything else is a plain language model.
"""

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from transencoder.errors import InputError, storage_error
from transencoder.runtime.files import read_json
from transencoder.runtime.records import RUN_FILE

Kind = Literal["bi", "cross", "plm"]
POOLINGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}  # Normalize changes no cosine
HALF_TO_DOUBLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def inspect_encoder(name: str) -> Kind:
    """What `name`, a folder or a Hub id, holds, from its configuration alone: no weights are loaded.

    Raises:
        InputError: not a model, or neither a folder nor a Hub id that can be reached.
    """
    config = read_model_file(name, "config.json")
    if config is None:
        raise InputError(f"{name}: not an encoder (no config.json)")
    if isinstance(config, dict) and config.get("auto_map"):
        # Loaded as the architecture that its model_type names it would be another model, without a word.
        raise InputError(f"{name}: its config.json asks for code of its own (auto_map), which is never run here")
    if not isinstance(config, dict) or str(config.get("model_type")) not in CONFIG_MAPPING:
        raise InputError(f"{name}: not an encoder (config.json names no model_type that transformers knows)")
    read_config(name, None)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not isinstance(config.get("id2label") or {}, dict):
        raise InputError(f"{name}: config.json: architectures must be a list, and id2label an object")
    classifier = any(str(architecture).endswith("ForSequenceClassification") for architecture in architectures)
    if Path(name).is_dir():
        _check_folder(Path(name), classifier)
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


def _check_folder(folder: Path, classifier: bool) -> None:
    """Refuse a model's folder without good weights or without a tokenizer, or one that is still being written."""
    run = read_model_file(str(folder), RUN_FILE)
    if isinstance(run, dict) and run.get("status") == "running":
        raise InputError(f"{folder}: its training is not finished; run the same command again")
    weights = list(folder.glob("model*.safetensors"))
    if not weights and list(folder.glob("pytorch_model*.bin")):
        auto = "AutoModelForSequenceClassification" if classifier else "AutoModel"
        raise InputError(pickled(str(folder), auto, str(folder)))
    if not weights:
        raise InputError(f"{folder}: no weights (model.safetensors)")
    for path in weights:
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        _check_weights(path, path.stat().st_mtime_ns)
    if not any(path for pattern in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(pattern)):
        raise InputError(f"{folder}: no tokenizer")


def pickled(name: str, auto: str, folder: str) -> str:
    """What is said of a model without safetensors: why it is not read, and how it is converted into `folder`."""
    return (
        f"{name}: its weights are pickled (pytorch_model.bin), which can run code when they are read; if you trust "
        f'them, convert them: python -c "from transformers import {auto} as A, AutoTokenizer as T; '
        f"[X.from_pretrained('{name}').save_pretrained('{folder}') for X in (A, T)]\""
    )


@functools.lru_cache(maxsize=256)
def _check_weights(path: Path, changed: int) -> None:
    """Refuse a damaged file of weights, or one with a value that is no number; read once as long as it stays as it is.

    Opening it reads the header, and compares the file's length with it.
    """
    if not os.access(path, os.R_OK):  # safetensors would say that there is no such file
        raise InputError(f"{path}: cannot be read: Permission denied; give this user the right to it")
    try:
        with safe_open(path, "pt") as file:
            check_finite(path, ((tensor, file.get_tensor(tensor)) for tensor in file.keys()))  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        advice = "put the whole file there; if it came of a run, delete it, and the same command makes it anew"
        raise storage_error(error) or InputError(f"{path}: damaged: {error}; {advice}") from error


def check_finite(where: str | Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise `InputError` for the first tensor that holds NaN or an infinite value: all scores would be NaN."""
    for name, tensor in tensors:
        if tensor.dtype not in HALF_TO_DOUBLE or not tensor.numel():
            continue
        extremes = torch.stack(tensor.aminmax())  # NaN if one is; needs no copy of the tensor, as isfinite() does
        if not extremes.isfinite().all():
            raise InputError(f"{where}: {name} holds values that are not finite (NaN or inf); its training broke down")


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
        return read_json(path)
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
    pooling_of(name, pooling)
    load_tokenizer(name)


def pooling_of(name: str, pooling: str | None) -> str:
    """How a bi-encoder pools: as it says itself, or for a plain language model as `pooling` says."""
    kind = inspect_encoder(name)
    if kind == "cross":
        raise InputError(f"{name}: a cross-encoder, where a bi-encoder is needed")
    if kind == "plm" and pooling is None:
        raise InputError(
            f"{name}: a plain language model does not say how it pools; add --pooling cls or --pooling mean"
        )
    return read_pooling(name) if kind == "bi" else pooling


def check_encoders(names: list[str], pooling: str | None) -> None:
    """Refuse, before any weights are loaded, what cannot score pairs."""
    for name in names:
        if inspect_encoder(name) == "cross":
            load_tokenizer(name)
        else:
            check_bi_encoder(name, pooling)


def check_bi_encoders(names: list[str], pooling: str | None) -> None:
    """As `check_bi_encoder`, for several."""
    for name in names:
        check_bi_encoder(name, pooling)


def check_language_model(name: str) -> None:
    """Refuse, before any weights are loaded, what a cross-encoder or step 1 cannot start from."""
    if inspect_encoder(name) == "cross":
        raise InputError(f"{name}: already a cross-encoder, where a pretrained language model is needed")
    load_tokenizer(name)


def check_cross_encoder(name: str, flag: str) -> None:
    """Refuse, before any weights are loaded, what is not a cross-encoder. `flag`: what asks for one."""
    if inspect_encoder(name) != "cross":
        raise InputError(f"{flag}: {name} is not a cross-encoder")
    load_tokenizer(name)


def read_pooling(name: str) -> str:
    """The pooling of a sentence-transformers folder, in its older form (one flag a mode) or its newer one (a name)."""
    modules = _modules(name)
    if set(modules) - KNOWN_MODULES or modules[:2] != ["Transformer", "Pooling"]:
        raise InputError(
            f"{name}: its modules are {', '.join(modules)}; only Transformer, Pooling and Normalize are supported"
        )
    config = read_model_file(name, "1_Pooling/config.json") or {}
    if not isinstance(config, dict):
        raise InputError(f"{name}: 1_Pooling/config.json is not an object")
    modes = {
        mode.removeprefix("pooling_mode_")
        for mode, on in config.items()
        if mode.startswith("pooling_mode_") and on is True
    }
    named = config.get("pooling_mode")
    modes |= {str(mode) for mode in (named if isinstance(named, list) else [named] if named else [])}
    for pooling in POOLINGS:
        if modes in ({pooling}, {POOLINGS[pooling].removeprefix("pooling_mode_")}):
            return pooling
    raise InputError(f"{name}: pooling {'+'.join(sorted(modes)) or 'unknown'}; only cls and mean are supported")


def saved_length(name: str) -> int | None:
    """Most tokens of a sentence, as a sentence-transformers model says; None where it does not."""
    saved = read_model_file(name, "sentence_bert_config.json") or {}
    length = saved.get("max_seq_length") if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or not (length is None or (type(length) is int and length >= 3)):
        raise InputError(f"{name}: sentence_bert_config.json: max_seq_length must be a whole number from 3")
    return length


def read_config(name: str, dropout: float | None) -> Any:
    """The configuration of a folder or Hub id, with every kind of dropout set to `dropout` where it is given."""
    with told_in_one_line(name, "config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if dropout is not None:
        for key in list(config.to_dict()):
            if "dropout" in key and isinstance(getattr(config, key), float | int):
                setattr(config, key, dropout)
    return config


@contextmanager
def told_in_one_line(name: str, what: str) -> Iterator[None]:
    """Turn whatever the libraries raise for a broken model, a dozen types, into an `InputError`."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise InputError(f"{name}: its {what} cannot be loaded: {type(error).__name__}: {reason}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id; raises `InputError` where it is missing or broken."""
    with told_in_one_line(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)

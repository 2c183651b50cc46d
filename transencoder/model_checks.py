"""Checks of a model before its weights are loaded: which kind it is, and whether it is whole and can be used.

A folder says itself what it holds, in the layouts that sentence-transformers writes: `modules.json` makes it a
bi-encoder, or a cross-encoder if `config_sentence_transformers.json` says so; a sequence classifier is a
cross-encoder; anything else is a plain language model.
"""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from transencoder.errors import InputError, storage_error
from transencoder.model_files import (
    NO_OPTIONS,
    Kind,
    ModelOptions,
    has_bounds,
    has_one_score,
    label_of,
    prompts_of,
    read_config,
    read_model_file,
    read_modules,
    root_of,
    told_in_one_line,
)
from transencoder.runtime.records import RUN_FILE

# The vocabulary of a tokenizer, in one of the forms that it comes in; tokenizer_config.json alone is not one.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
ONE_SCALE = "beside other teachers, --teacher_scale rank or standard puts all on one scale"
HALF_TO_DOUBLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def inspect_encoder(name: str) -> Kind:
    """Return what `name`, a folder or a Hub id, holds. Only its configuration is read.

    Raises:
        InputError: not a model, one that cannot be used here, or neither a folder nor a Hub id that can be reached.
    """
    modules = read_modules(name)
    config = read_model_file(name, os.path.join(root_of(modules), "config.json"))
    if read_model_file(name, "adapter_config.json") is not None:
        raise InputError(
            f"{name}: an adapter (adapter_config.json), not a whole model; merge it into its base model "
            "(merge_and_unload of peft) and save that"
        )
    if config is None:
        raise InputError(f"{name}: not an encoder (no config.json)")
    if isinstance(config, dict) and config.get("auto_map"):
        # Loaded as the architecture that its model_type names it would be another model, without a word.
        raise InputError(f"{name}: its config.json asks for code of its own (auto_map), which is never run here")
    if not isinstance(config, dict) or str(config.get("model_type")) not in CONFIG_MAPPING:
        raise InputError(f"{name}: not an encoder (config.json names no model_type that transformers knows)")
    read_config(name)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not isinstance(config.get("id2label") or {}, dict):
        raise InputError(f"{name}: config.json: architectures must be a list, and id2label an object")
    classifier = any(str(architecture).endswith("ForSequenceClassification") for architecture in architectures)
    if Path(name).is_dir():
        _check_folder(Path(name), modules, classifier)
    if _model_type(name) == "CrossEncoder" or (classifier and len(modules) < 2):
        return "cross"
    return "bi" if modules else "plm"


def _model_type(name: str) -> str:
    """Return the class that a sentence-transformers model says it is of; "" for one that does not say it.

    Raises:
        InputError: neither a bi-encoder nor a cross-encoder.
    """
    config = read_model_file(name, "config_sentence_transformers.json") or {}
    kind = config.get("model_type", "") if isinstance(config, dict) else ""
    if kind not in ("", "SentenceTransformer", "CrossEncoder"):
        raise InputError(
            f"{name}: a {kind} of sentence-transformers, neither a SentenceTransformer nor a CrossEncoder"
        )
    return kind


def _check_folder(folder: Path, modules: list[dict[str, str]], classifier: bool) -> None:
    """Refuse a model's folder without good weights or without a tokenizer, or one that is still being written."""
    run = read_model_file(str(folder), RUN_FILE)
    if isinstance(run, dict) and run.get("status") == "running":
        raise InputError(f"{folder}: its training is not finished; run the same command again")
    root, loader = folder / root_of(modules), _model_type(str(folder)) or "SentenceTransformer"
    weights = list(root.glob("model*.safetensors"))
    if not weights and list(root.glob("pytorch_model*.bin")):
        if modules:
            raise InputError(pickled(str(folder), "sentence_transformers", loader, str(folder)))
        auto = "AutoModelForSequenceClassification" if classifier else "AutoModel"
        raise InputError(pickled(str(folder), "transformers", auto, str(folder)))
    if not weights:
        raise InputError(f"{root}: no weights (model.safetensors)")
    for module in modules[1:]:
        inside = folder / module["path"]
        found = list(inside.glob("model*.safetensors"))
        if not found and list(inside.glob("pytorch_model*.bin")):
            raise InputError(pickled(str(folder), "sentence_transformers", loader, str(folder)))
        weights += found
    for path in weights:
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        _check_weights(path, path.stat().st_mtime_ns)
    if not any(path for pattern in VOCABULARIES for path in root.glob(pattern)):
        raise InputError(f"{folder}: no tokenizer (tokenizer.json, or a vocabulary)")


def pickled(name: str, package: str, loader: str, folder: str) -> str:
    """Return what is said of a model without safetensors: why it is not read, and how to convert it into `folder`."""
    code = f"from {package} import {loader} as M; M('{name}').save_pretrained('{folder}')"
    if package == "transformers":
        code = (
            f"from transformers import {loader} as A, AutoTokenizer as T; "
            f"[X.from_pretrained('{name}').save_pretrained('{folder}') for X in (A, T)]"
        )
    return (
        f"{name}: its weights are pickled (pytorch_model.bin), which can run code when they are read; if you trust "
        f'them, convert them: python -c "{code}"'
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


def check_whole(name: str, config: Any, classifier: bool, new_head: bool = False) -> None:
    """Raise `InputError` if the weights of `name` lack a tensor of its language model; nothing is loaded.

    A tensor that is missing would be random. A new head is meant to be; so is a pooler, which a bi-encoder does not
    read and a language model may come without.

    Args:
        config: of the model, as it will be loaded.
        classifier: whether it is loaded with a classification head.
        new_head: whether that head is new.
    """
    modules = read_modules(name)
    auto = AutoModelForSequenceClassification if classifier else AutoModel
    with told_in_one_line(name, "model"):
        try:
            model, report = auto.from_pretrained(
                name,
                config=config,
                device_map="meta",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                subfolder=root_of(modules),
            )
        except OSError as error:
            if "use_safetensors" not in str(error):
                raise
            raise InputError(pickled(name, "transformers", auto.__name__, "DIR") + ", and pass DIR") from error
    inside = f"{model.base_model_prefix}." if new_head else ""
    unread = "decoder." if "t5" in config.model_type and not classifier else None  # a bi-encoder is the encoder alone
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    may_lack_pooler = new_head or not classifier
    absent = sorted(key for key in absent if key.startswith(inside) and not (may_lack_pooler and "pooler" in key))
    absent = [key for key in absent if unread is None or not key.startswith(unread)]
    if absent:
        raise InputError(f"{name}: its weights lack {absent[0]}, or have it in another size than config.json says")


def check_tokenizer(name: str, pairs: bool = False) -> None:
    """Refuse a tokenizer that is broken, cannot pad, or does not fit its language model; no weights are loaded.

    Args:
        pairs: whether it has to put two texts into one input.
    """
    root, config = root_of(read_modules(name)), read_config(name).get_text_config()
    with told_in_one_line(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, subfolder=root)
        known, special = tokenizer.get_vocab(), tokenizer.num_special_tokens_to_add(pairs)
    if tokenizer.pad_token_id is None:
        such = f", such as {tokenizer.eos_token}" if tokenizer.eos_token else ""
        raise InputError(
            f"{name}: its tokenizer has no padding token; name one in tokenizer_config.json (pad_token{such})"
        )
    size = getattr(config, "vocab_size", None) or len(known)
    beyond = [token for token, number in known.items() if number >= size]
    if beyond:
        raise InputError(
            f"{name}: its tokenizer has {len(known)} tokens, its language model embeddings for {size}, and none for "
            f"{beyond[0]!r}: call resize_token_embeddings, and save the model"
        )
    if 2 * len(known) < size:
        raise InputError(f"{name}: its tokenizer has {len(known)} of {size} tokens; download its vocabulary again")
    said = (read_model_file(name, os.path.join(root, "sentence_bert_config.json")) or {}).get("max_seq_length")
    length = tokenizer.model_max_length if said is None else said
    if type(length) not in (int, float) or not length > special or length % 1:
        raise InputError(
            f"{name}: inputs of {length!r} tokens hold no text; correct model_max_length in tokenizer_config.json, or "
            "max_seq_length in sentence_bert_config.json"
        )
    with told_in_one_line(name, "tokenizer"):
        types = tokenizer("a", "b", verbose=False).get("token_type_ids", [0])
    if pairs and max(types) >= (getattr(config, "type_vocab_size", 0) or 2):
        raise InputError(
            f"{name}: its tokenizer marks the second text of a pair (token_type_ids), and its language model has no "
            "embedding for that (type_vocab_size in config.json); it can be a bi-encoder only"
        )


def check_bi_encoder(name: str, options: ModelOptions = NO_OPTIONS) -> None:
    """Refuse, before any weights are loaded, what cannot be a bi-encoder."""
    kind = inspect_encoder(name)
    if kind == "cross":
        raise InputError(f"{name}: a cross-encoder, where a bi-encoder is needed")
    if kind == "plm" and options.pooling is None:
        raise InputError(
            f"{name}: a plain language model does not say how it pools; add --pooling cls or --pooling mean"
        )
    prompts_of(name, options)
    check_tokenizer(name)


def check_step1_teacher(name: str) -> None:
    """Refuse, before any weights are loaded, what step 1 cannot learn from; --pooling is for its student."""
    if inspect_encoder(name) == "plm":
        raise InputError(f"--teacher {name}: a plain language model, where a sentence model is needed")
    check_bi_encoder(name)


def check_encoders(names: list[str], options: ModelOptions = NO_OPTIONS, averaged: bool = False) -> None:
    """Refuse, before any weights are loaded, what cannot score pairs.

    Args:
        averaged: the scores count in a mean as they are, and so must all be on one scale.
    """
    for name in names:
        if inspect_encoder(name) == "cross":
            check_cross_encoder(name, "", options)
        else:
            check_bi_encoder(name, options)
        if averaged and not has_bounds(name):
            raise InputError(f"{name}: its scores are dot products or logits, not in [-1, 1]; {ONE_SCALE}")


def check_language_model(name: str) -> None:
    """Refuse, before any weights are loaded, what a cross-encoder or step 1 cannot start from."""
    if inspect_encoder(name) == "cross":
        raise InputError(f"{name}: already a cross-encoder, where a pretrained language model is needed")
    check_tokenizer(name)


def check_cross_encoder_start(name: str) -> None:
    """Refuse, before any weights are loaded, what step 2 cannot start from."""
    check_tokenizer(name, pairs=True)
    if not keeps_head(name):
        config = read_config(name)
        config.num_labels = 1
        check_whole(name, config, classifier=True, new_head=True)


def keeps_head(name: str) -> bool:
    """Return whether step 2 trains the head of a model on: a cross-encoder's, if it gives one score."""
    return inspect_encoder(name) == "cross" and has_one_score(name)


def check_cross_encoder(name: str, flag: str, options: ModelOptions = NO_OPTIONS) -> None:
    """Refuse, before any weights are loaded, what is not a cross-encoder. `flag`: what asks for one."""
    if inspect_encoder(name) != "cross":
        raise InputError(f"{flag}: {name} is not a cross-encoder")
    label_of(name, options.label)
    prompts_of(name, options)
    check_tokenizer(name, pairs=True)

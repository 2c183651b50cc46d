"""What a model's name stands for: a folder or a Hub id, told from its files before any weights are loaded.

A folder says itself what it holds, in the layouts that sentence-transformers writes: `modules.json` makes it a
bi-encoder, or a cross-encoder if `config_sentence_transformers.json` says so; a sequence classifier is a
cross-encoder; anything else is a plain language model.
"""

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from transencoder.errors import InputError, storage_error
from transencoder.runtime.files import read_json
from transencoder.runtime.records import RUN_FILE

Kind = Literal["bi", "cross", "plm"]
# The vocabulary of a tokenizer, in one of the forms that it comes in; tokenizer_config.json alone is not one.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
HALF_TO_DOUBLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class ModelOptions:
    """How encoders are read where their own files leave it open, or where somebody wants it otherwise.

    Args:
        pooling: of a plain language model; a key of `encoders.POOLINGS`.
        prompt_names: of the prompts in the models' own configuration; one for both sentences of a pair, or one each.
        prompts: the same as text, in place of names.
        label: of a classifier with several labels: its probability is the score.
    """

    pooling: str | None = None
    prompt_names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    label: str | None = None


NO_OPTIONS = ModelOptions()


def model_options(arguments: Any) -> ModelOptions:
    """Return what a script's arguments say about reading models; options that it does not have stay open."""
    return ModelOptions(
        getattr(arguments, "pooling", None),
        tuple(getattr(arguments, "prompt_name", None) or ()),
        tuple(getattr(arguments, "prompt", None) or ()),
        getattr(arguments, "label", None),
    )


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


def read_modules(name: str) -> list[dict[str, str]]:
    """Return the modules of a sentence-transformers model, with the keys type and path; none for a plain model.

    Raises:
        InputError: a module that is not of sentence-transformers, or one that does not read tokens.
    """
    modules = read_model_file(name, "modules.json")
    if modules is None:
        return []
    texts = ("type", "path")
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in texts) for module in modules
    ):
        raise InputError(f"{name}: modules.json is not a list of modules")
    if not modules:
        raise InputError(f"{name}: modules.json names no module")
    for module in modules:
        if not module["type"].startswith("sentence_transformers."):
            raise InputError(f"{name}: its module {module['type']} is code of its own, which is never run here")
        if Path(module["path"]).is_absolute() or ".." in Path(module["path"]).parts:
            raise InputError(f"{name}: modules.json: {module['path']!r} is not a folder of the model")
    first = module_class(modules[0])
    if first != "Transformer":
        raise InputError(f"{name}: its first module is {first}; only models that begin with a Transformer can be used")
    return modules


def root_of(modules: list[dict[str, str]]) -> str:
    """Return the folder of the language model inside the model's own: "" but for old layouts."""
    return modules[0]["path"] if modules else ""


def module_class(module: dict[str, str]) -> str:
    """Return the class name of an entry of modules.json: "Transformer", "Pooling", "Dense"."""
    return module["type"].rpartition(".")[2]


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
    root = folder / root_of(modules)
    weights = list(root.glob("model*.safetensors"))
    if not weights and list(root.glob("pytorch_model*.bin")):
        if modules:
            raise InputError(pickled(str(folder), "sentence_transformers", "SentenceTransformer", str(folder)))
        auto = "AutoModelForSequenceClassification" if classifier else "AutoModel"
        raise InputError(pickled(str(folder), "transformers", auto, str(folder)))
    if not weights:
        raise InputError(f"{root}: no weights (model.safetensors)")
    for module in modules[1:]:
        inside = folder / module["path"]
        found = list(inside.glob("model*.safetensors"))
        if not found and list(inside.glob("pytorch_model*.bin")):
            raise InputError(pickled(str(folder), "sentence_transformers", "SentenceTransformer", str(folder)))
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
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    may_lack_pooler = new_head or not classifier
    absent = sorted(key for key in absent if key.startswith(inside) and not (may_lack_pooler and "pooler" in key))
    if absent:
        raise InputError(f"{name}: its weights lack {absent[0]}, or have it in another size than config.json says")


def read_model_file(name: str, file: str) -> Any:
    """Return the content of a model's JSON file, from its folder or the Hub; None where it has no such file."""
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


@functools.cache
def _from_hub(name: str, file: str) -> Path | None:
    """Return a Hub model's file in the local cache, downloaded where needed; None where it has no such file."""
    try:
        return Path(huggingface_hub.hf_hub_download(name, file, local_files_only=not _hub_answers(name)))
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        if huggingface_hub.try_to_load_from_cache(name, "config.json"):
            return None  # the model is in the cache, and this file is not part of it
        if file != "config.json" and huggingface_hub.try_to_load_from_cache(name, "modules.json"):
            return None
        raise InputError(
            f"{name}: no such folder, and the Hub cannot be reached; download the model elsewhere "
            f"(hf download {name} --local-dir DIR) and pass its folder"
        ) from error
    except huggingface_hub.errors.EntryNotFoundError:
        return None


@functools.cache
def _hub_answers(name: str) -> bool:
    """Ask the Hub one quick question: its client's own downloads retry for half a minute where there is no network."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except huggingface_hub.errors.HFValidationError as error:
        raise InputError(f"{name}: no such folder, and not a Hub id (ORG/NAME)") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise InputError(f"{name}: no such folder, and no such model on the Hub (or it is private)") from error
    except Exception:  # offline mode, or one of the HTTP client's many ways to say "no connection"
        return False
    return True


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
    load_tokenizer(name)


def check_encoders(names: list[str], options: ModelOptions = NO_OPTIONS) -> None:
    """Refuse, before any weights are loaded, what cannot score pairs."""
    for name in names:
        if inspect_encoder(name) == "cross":
            check_cross_encoder(name, "", options)
        else:
            check_bi_encoder(name, options)


def check_language_model(name: str) -> None:
    """Refuse, before any weights are loaded, what a cross-encoder or step 1 cannot start from."""
    if inspect_encoder(name) == "cross":
        raise InputError(f"{name}: already a cross-encoder, where a pretrained language model is needed")
    load_tokenizer(name)


def check_cross_encoder(name: str, flag: str, options: ModelOptions = NO_OPTIONS) -> None:
    """Refuse, before any weights are loaded, what is not a cross-encoder. `flag`: what asks for one."""
    if inspect_encoder(name) != "cross":
        raise InputError(f"{flag}: {name} is not a cross-encoder")
    label_of(name, options.label)
    prompts_of(name, options)
    load_tokenizer(name)


def label_of(name: str, label: str | None) -> int | None:
    """Return the place of the label whose probability is a classifier's score; None for a model with one score.

    Raises:
        InputError: a classifier with several labels, and `label` is none of them.
    """
    config = read_config(name)
    names = [str(config.id2label[place]) for place in range(config.num_labels)]
    if len(names) == 1 or len(read_modules(name)) > 1:
        return None
    if label is None:
        raise InputError(
            f"{name}: a classifier with {len(names)} labels, not a cross-encoder (which has one); say whose "
            f"probability is the score: --label {' or '.join(names[:4])}"
        )
    for place, known in enumerate(names):
        if label.lower() == known.lower():
            return place
    raise InputError(f"--label {label}: {name} has the labels {', '.join(names)}")


def prompts_of(name: str, options: ModelOptions) -> tuple[str | None, str | None]:
    """Return the prompts of both sentences of a pair: as asked for, else the model's default; None for none.

    Raises:
        InputError: more than two, both names and texts, or a name that the model does not have.
    """
    for flag, values in (("prompt_name", options.prompt_names), ("prompt", options.prompts)):
        if len(values) > 2:
            raise InputError(f"--{flag}: give one, or one for each sentence of a pair")
    if options.prompts and options.prompt_names:
        raise InputError("--prompt and --prompt_name exclude one another")
    config = read_model_file(name, "config_sentence_transformers.json") or {}
    known = config.get("prompts") or {} if isinstance(config, dict) else {}
    names = options.prompt_names or ((config["default_prompt_name"],) if config.get("default_prompt_name") else ())
    for prompt in names:
        if prompt not in known:
            raise InputError(f"{name}: has no prompt {prompt!r}; it has: {', '.join(known) or 'none'}")
    prompts = options.prompts or tuple(known[prompt] for prompt in names) or (None,)
    return prompts[0] or None, prompts[-1] or None


def plain_pooling(name: str) -> str | None:
    """Return "cls" or "mean" for a bi-encoder that is no more than a Transformer and that pooling; None for others."""
    modules = read_modules(name)
    if [module_class(module) for module in modules] != ["Transformer", "Pooling"]:
        return None
    config = read_model_file(name, os.path.join(modules[1]["path"], "config.json")) or {}
    mode = config.get("pooling_mode")
    return mode if mode in ("cls", "mean") else None


def read_config(name: str, dropout: float | None = None) -> Any:
    """Return the configuration of a folder or Hub id, every kind of dropout being `dropout` where it is given."""
    modules = read_modules(name)
    with told_in_one_line(name, "config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, subfolder=root_of(modules))
    for key, value in dropouts(config, dropout).items():
        setattr(config, key, value)
    return config


def dropouts(config: Any, dropout: float | None) -> dict[str, float]:
    """Return every kind of dropout of a configuration, set to `dropout`; nothing where that is None."""
    keys = [key for key in config.to_dict() if "dropout" in key and isinstance(getattr(config, key), float | int)]
    return {} if dropout is None else dict.fromkeys(keys, dropout)


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
    """Load the tokenizer of a folder or Hub id; raises `InputError` where it is missing, broken or cannot pad."""
    modules = read_modules(name)
    with told_in_one_line(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, subfolder=root_of(modules))
    if tokenizer.pad_token_id is None:
        raise InputError(f"{name}: its tokenizer has no padding token; name one in tokenizer_config.json (pad_token)")
    return tokenizer

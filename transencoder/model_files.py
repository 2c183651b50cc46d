"""What a model's name stands for, a folder or a Hub id: the files that say how it is made and how it is read."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from transformers import AutoConfig

from transencoder.errors import InputError
from transencoder.runtime.files import read_json

Kind = Literal["bi", "cross", "plm"]


@dataclass(frozen=True)
class ModelOptions:
    """How encoders are read where their own files leave it open, or where somebody wants it otherwise.

    Args:
        pooling: of a plain language model; a key of `pooling.POOLINGS`.
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


def has_one_score(name: str) -> bool:
    """Return whether a cross-encoder gives one score, not one for each of several labels."""
    return len(read_modules(name)) > 1 or read_config(name).num_labels == 1


def label_of(name: str, label: str | None) -> int | None:
    """Return the place of the label whose probability is a classifier's score; None for a model with one score.

    Raises:
        InputError: a classifier with several labels, and `label` is none of them.
    """
    if has_one_score(name):
        return None
    config = read_config(name)
    names = [str(config.id2label[place]) for place in range(config.num_labels)]
    if label is None:
        raise InputError(
            f"{name}: a classifier with {len(names)} labels, not a cross-encoder (which has one); say whose "
            f"probability is the score: --label {' or '.join(names[:4])}"
        )
    for place, known in enumerate(names):
        if label.lower() == known.lower():
            return place
    raise InputError(f"--label {label}: {name} has the labels {', '.join(names)}")


def has_bounds(name: str) -> bool:
    """Return whether an encoder's scores are cosines or probabilities, not dot products or logits."""
    own, config = read_model_file(name, "config_sentence_transformers.json"), read_config(name)
    own = own if isinstance(own, dict) else {}
    # Where versions 6, 4 and 2 of sentence-transformers have the activation; by default it is the sigmoid.
    within = getattr(config, "sentence_transformers", None) or {}
    oldest = getattr(config, "sbert_ce_default_activation_function", None)
    activation = own.get("activation_fn") or within.get("activation_fn") or oldest or "Sigmoid"
    is_probability = not has_one_score(name) or activation.endswith("Sigmoid")
    return is_probability and own.get("similarity_fn_name") in (None, "cosine")


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
    config = read_model_file(name, "config_sentence_transformers.json")
    config = config if isinstance(config, dict) else {}
    known, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(known, dict) or not all(isinstance(prompt, str | None) for prompt in [default, *known.values()]):
        raise InputError(f"{name}: config_sentence_transformers.json: prompts and their names must be texts")
    names = options.prompt_names or ((default,) if default else ())
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

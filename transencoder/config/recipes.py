"""Recipes: YAML files with a section of options for each script."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import yaml

from transencoder.config.options import is_text, with_home
from transencoder.config.stages import STAGES
from transencoder.errors import InputError

DRIVER = "run_transencoder"
RECIPE_CHARACTERS = 256 << 10
# What the driver, or whoever calls a script, says: a recipe from elsewhere does not choose what is written, deleted or
# published.
NOT_IN_RECIPES = {
    *("recipe", "output", "output_dir", "overwrite", "histogram"),
    *("model_name_or_path", "encoders", "teachers", "scores"),
    *("push_to_hub", "hub_model_id", "hub_public"),
}


class RecipeLoader(yaml.SafeLoader):
    """Read safe YAML with the booleans of YAML 1.2: `mixed_precision: no` is the word "no".

    Aliases (`*name`) may not blow a document up: written out in full it has at most `RECIPE_CHARACTERS`.
    """

    def get_single_node(self) -> yaml.Node | None:
        """Return the document's tree, once it is known to be small."""
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > RECIPE_CHARACTERS:
            raise yaml.YAMLError("its aliases stand for too much text, or for themselves")
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """Return the text of a scalar, if it can be written as UTF-8, with the path of ~/."""
        text = super().construct_scalar(node)
        if not is_text(text):
            raise yaml.YAMLError(f"{text!r} is not UTF-8 text")
        return with_home(text)


def _written_out(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Count characters and nodes with the aliases written out; infinite for a tree that contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            inner = [child for pair in inner for child in pair]
        inside = (
            len(inner) if isinstance(node, yaml.ScalarNode) else sum(_written_out(child, sizes) for child in inner)
        )
        sizes[id(node)] = 1 + inside
    return sizes[id(node)]


RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|false|False)$"), list("tTfF"))


def read_recipe(path: str) -> dict[str, dict[str, Any]]:
    """Read a recipe and check its sections and keys.

    Args:
        path: YAML file with the sections `common`, `run_transencoder` and one for each script, all optional.
    Raises:
        InputError: no such file, not YAML, an unknown section, an unknown key, or a value that no option can have.
    """
    content = _read_yaml(path)
    if isinstance(content, dict):
        content = {section: {} if keys is None else keys for section, keys in content.items()}
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise InputError(f"--recipe {path}: must hold sections of keys, such as `common:` and `distill_bi2cross:`")
    names = {name: option_names(name) for name in STAGES}
    names["common"] = set().union(*names.values())
    for section, keys in content.items():
        if section == DRIVER:
            continue
        if section not in names:
            raise InputError(f"--recipe {path}: unknown section {section!r}; known: {', '.join([*names, DRIVER])}")
        check_options(keys, f"--recipe {path}: {section}", names[section])
    return content


def _read_yaml(path: str) -> Any:
    """Return the content of a small YAML file."""
    where = f"--recipe {path}"
    try:
        # A pipe would let the driver wait for ever, and can be read only once; a recipe is read by every stage.
        if Path(path).exists() and not Path(path).is_file():
            raise InputError(f"{where}: not a file")
        if Path(path).stat().st_size > RECIPE_CHARACTERS:
            raise InputError(f"{where}: longer than a recipe can be ({RECIPE_CHARACTERS} bytes)")
        return yaml.load(Path(path).read_text(encoding="utf-8-sig"), RecipeLoader)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{where}: not YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        # All but the first are PyYAML's own for a scalar that is not what its tag or its look promises: 2021-02-31.
        raise InputError(f"{where}: not YAML: {error}") from error


def option_names(stage: str) -> set[str]:
    """Return the options of a stage."""
    return {option.name for option in dataclasses.fields(STAGES[stage].arguments)}


def check_options(values: dict[str, Any], where: str, known: set[str]) -> None:
    """Raise `InputError` unless these are options that a recipe may set, and values that a command line can carry.

    Args:
        where: how an error names them.
        known: the options that there are.
    """
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}")
        if key in NOT_IN_RECIPES:
            raise InputError(f"{where}.{key}: cannot be set by a recipe, but by the command line or by {DRIVER}")
    for key, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, list | dict):
                raise InputError(f"{where}.{key}: must be a value or a list of values")
            if isinstance(item, str) and item.startswith("--"):
                raise InputError(f"{where}.{key}: {item!r} cannot be a value")


def as_options(values: dict[str, Any]) -> list[str]:
    """Return a recipe section as words: {"swap": False, "pairs": ["a", "b"]} -> --swap False --pairs a b."""
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words

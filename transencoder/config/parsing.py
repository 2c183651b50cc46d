"""Parsing: the command line goes before the recipe, the recipe before the default; an unknown word is an error."""

import dataclasses
import inspect
import math
import sys
from argparse import Action, Namespace, RawDescriptionHelpFormatter
from pkgutil import resolve_name
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from transencoder.config.options import Choice, is_text, with_home
from transencoder.config.recipes import as_options, read_recipe
from transencoder.config.stages import STAGES
from transencoder.errors import InputError, one_line_errors, report_and_exit


class HelpFormatter(RawDescriptionHelpFormatter):
    """Show one name for each option, short words for its values, and its default."""

    def __init__(self, prog: str, **layout: Any):
        super().__init__(prog, **{"max_help_position": 34, **layout})

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return {int: "N", float: "X", string_to_bool: "BOOL"}.get(action.type, action.dest.rpartition("_")[2].upper())

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return " ".join([action.option_strings[0], self.values_of(action)]).strip()

    def values_of(self, action: Action) -> str:
        """Return what follows an option's name: "FILE ...", "{a,b}", nothing."""
        if action.nargs == 0 or action.const is True:
            return ""
        shown = action.metavar or self._metavar_formatter(action, self._get_default_metavar_for_optional(action))(1)[0]
        return f"{shown} ..." if action.nargs == "+" else shown

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").replace("%", "%%")
        if not action.option_strings or action.dest == "help":
            return text
        if action.required or "Default:" in text:
            return text
        shown = str(action.default).lower() if action.default in (None, True, False, []) else action.default
        return f"{text} (default: {'none' if shown == '[]' else shown})"


class StageParser(HfArgumentParser):
    """Parse the options of one dataclass; an error is one line and exit code 2."""

    def __init__(self, arguments: type, description: str | None):
        super().__init__(
            arguments,
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def add_argument(self, *names: str, **settings: Any) -> Action:
        """Add an option, with the names and the help of its registry; leave out what argparse does not know."""
        for unknown in ("limits", "positive", "identity"):
            settings.pop(unknown, None)
        if isinstance(settings.get("choices"), str):
            registry: dict[str, Choice] = resolve_name(settings["choices"])
            settings["choices"] = list(registry)
            meanings = "; ".join(f"{name}: {choice.help}" for name, choice in registry.items())
            settings["help"] = f"{settings['help']} {meanings}."
        return super().add_argument(*names, **settings)

    def format_help(self) -> str:
        """Return the usage in a line, then the options: the required ones, the script's own, the shared ones."""
        formatter, groups = self._get_formatter(), self._groups()
        needed = [action for action in groups["required"] if action.option_strings]
        words = [f"{action.option_strings[0]} {formatter.values_of(action)}" for action in needed]
        words += [action.dest for action in groups["required"] if not action.option_strings]
        formatter.add_usage(" ".join(["%(prog)s", *words, "[options]"]), [], [])
        formatter.add_text(self.description)
        for title, actions in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def _groups(self) -> dict[str, list[Action]]:
        """Return the options by the `GROUP` of the class that first has them, the most derived class first."""
        classes = [cls for arguments in self.dataclass_types for cls in arguments.__mro__ if cls is not object]
        groups: dict[str, list[Action]] = {title: [] for title in ("required", *(cls.GROUP for cls in classes))}
        for action in self._actions:
            owner = next((cls for cls in reversed(classes) if action.dest in inspect.get_annotations(cls)), None)
            title = "required" if action.required else owner.GROUP if owner else "options"
            groups.setdefault(title, []).append(action)
        return groups

    def error(self, message: str) -> None:
        """Report `message` without argparse's usage lines, and exit."""
        report_and_exit(message)

    def parse_args_into_dataclasses(self, args: list[str] | None = None) -> tuple[Any, ...]:
        """Parse as HfArgumentParser does; an unknown option is an error like any other."""
        *parsed, unknown = super().parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise InputError(f"unknown arguments: {' '.join(unknown)} (see --help)")
        return tuple(parsed)

    def parse_known_args(self, args: list[str] | None = None, namespace: Namespace | None = None) -> Any:
        """Parse as argparse does, but refuse words that are not UTF-8: run.json could not hold them."""
        words = [with_home(word) for word in (sys.argv[1:] if args is None else args)]
        for word in words:
            if not is_text(word):
                self.error(f"{word}: not UTF-8 text; a file with such a name has to be renamed")
        return super().parse_known_args(words, namespace)


def parse_stage(stage: str, description: str | None = None, argv: list[str] | None = None) -> Any:
    """Return the arguments of `stage`: from the command line, then its recipe, then the defaults.

    Args:
        stage: a script's name without ".py".
        description: text above the options in --help; the script's docstring.
        argv: command-line words; the process's own by default.
    Returns:
        An instance of `STAGES[stage].arguments`.
    Raises:
        InputError: an unknown option or recipe key, or a value that makes no sense.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments_class = STAGES[stage].arguments
    parser = StageParser(arguments_class, description)
    finder = StageParser((), None)
    finder.add_argument("--recipe")
    recipe_path = finder.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].recipe
    recipe_words = []
    if recipe_path:
        recipe = read_recipe(recipe_path)
        known = {option.name for option in dataclasses.fields(arguments_class)}
        shared = {key: value for key, value in recipe.get("common", {}).items() if key in known}
        recipe_words = as_options({**shared, **recipe.get(stage, {})})
    (arguments,) = parser.parse_args_into_dataclasses(recipe_words + argv)
    check_numbers(arguments)
    return arguments


def answer_early(stage: str, description: str | None) -> None:
    """Answer --help, and refuse wrong words, at the top of a script: its other imports take seconds."""
    one_line_errors(lambda: parse_stage(stage, description))()


def check_numbers(arguments: Any) -> None:
    """Raise `InputError` for a number outside its option's limits; `arguments` is a dataclass of options."""
    for option in dataclasses.fields(arguments):
        name, value = option.name, getattr(arguments, option.name)
        lowest, highest = option.metadata["limits"]
        if not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or (option.metadata["positive"] and value <= 0):
            raise InputError(f"--{name} {value}: must be a positive number")
        if (lowest is not None and value < lowest) or (highest is not None and value > highest):
            bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise InputError(f"--{name} {value}: must be {bounds}")

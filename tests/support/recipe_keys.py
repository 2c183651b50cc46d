"""Writes the tables of docs/recipes.md from the code: python tests/support/recipe_keys.py"""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from transencoder.config.options import StageArguments
from transencoder.config.stages import STAGES
from transencoder.run.plan import OutsideTeacher, Plan, Student

PAGE, START = ROOT / "docs" / "recipes.md", "<!-- made by tests/support/recipe_keys.py -->"
BY_THE_DRIVER = {"recipe", "output_dir", "output", "overwrite"}


def described(kind: type) -> dict[str, str]:
    """The text of each field in a dataclass's docstring."""
    section = inspect.getdoc(kind).partition("Args:\n")[2].partition("\nRaises:")[0]
    found = re.findall(r"^    ((?:\w+, )*\w+): (.*(?:\n {8}.*)*)", section, re.M)
    return {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}


def shown(default) -> str:
    """A default as YAML has it."""
    if default in (dataclasses.MISSING, None, ()):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def table(rows) -> list[str]:
    """Rows of key, default and text."""
    lines = ["| key | default | |", "| :--- | :--- | :--- |"]
    return lines + [f"| `{key}` | {shown(default)} | {text.replace('|', '/')} |" for key, default, text in rows]


def tables() -> str:
    """All tables, each under its heading."""
    lines = []
    for heading, kind in (("run_transencoder", Plan), ("students", Student), ("teachers", OutsideTeacher)):
        texts = described(kind)
        rows = [(field.name, field.default, texts[field.name]) for field in dataclasses.fields(kind)]
        lines += ["", f"## `{heading}`", "", *table(rows)]
    # Options that several sections share, with one default and one text, stand in one table.
    sections: dict[tuple, list[str]] = {}
    for section, stage in STAGES.items():
        for field in dataclasses.fields(stage.arguments):
            if field.name not in BY_THE_DRIVER | {field.name for field in dataclasses.fields(StageArguments)}:
                sections.setdefault((field.name, field.default, field.metadata["help"]), []).append(section)
    options = [(field.name, field.default, field.metadata["help"]) for field in dataclasses.fields(StageArguments)]
    groups = {"common, and every section below": [row for row in options if row[0] not in BY_THE_DRIVER]}
    for row, names in sorted(sections.items(), key=lambda item: (-len(item[1]), item[0][0])):
        groups.setdefault("`, `".join(names), []).append(row)
    for heading, rows in groups.items():
        lines += ["", f"## `{heading}`", "", *table(rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(START)[0] + START + "\n" + tables(), encoding="utf-8")

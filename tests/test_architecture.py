"""The rooms of the package, and who may import whom (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# Each room may import itself and those before it; "" is the method, on top of the package.
ORDER = [("errors",), ("config",), ("runtime",), ("data",), ("",), ("search", "run"), ("hub",), ("scripts",)]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(path.relative_to(ROOT) for room in ("transencoder", "scripts") for path in (ROOT / room).rglob("*.py"))
STAGES = [
    "train_contrastive",
    "mine_pairs",
    "score_pairs",
    "distill_bi2cross",
    "distill_cross2bi",
    "evaluate_encoders",
]


def imports(path: Path) -> list[tuple[str, int]]:
    """Modules of the package that a file imports, in functions too, each with the number of names it takes."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transencoder."):
            found.append((node.module, len(node.names)))
        elif isinstance(node, ast.Import):
            found += [(name.name, 1) for name in node.names if name.name.startswith("transencoder.")]
    return found


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module, by its path or its dotted name: "" for the method."""
    if parts[0] == "scripts":
        return "scripts"
    return parts[1] if len(parts) > 2 or parts[1].startswith("errors") else ""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    own = RANK[room_of(path.with_suffix("").parts)]
    wrong = [module for module, _ in imports(path) if RANK[room_of(tuple(module.split(".")))] > own]
    assert not wrong


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_script_imports_at_most_nine_names(stage):
    assert sum(names for _, names in imports(Path("scripts") / f"{stage}.py")) <= 9

"""Every recipe: checked with all it names, and run once through on tiny models."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, random_pairs, random_sentences, write_jsonl
from support import recipe_keys

from transencoder.config.recipes import DRIVER, read_recipe
from transencoder.data.tasks import GROUPS, TASKS
from transencoder.encoders import load_bi_encoder
from transencoder.model_files import ModelOptions
from transencoder.run.plan import TRAINING_STAGES

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def gold_pairs(task: str, count: int, seed: int) -> list[dict]:
    """Random pairs with the kind of gold that the task has."""
    rows = random_pairs(count, seed)
    if TASKS[task].gold == "label":
        rows = [{"label": int(row.pop("score") > 2.5), **row} for row in rows]
    return rows


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Every task and pool, and every file that a recipe names, beside the examples: enough rows for their batches."""
    folder = tmp_path_factory.mktemp("checkout") / "data"
    folder.mkdir()
    (folder.parent / "examples").symlink_to(ROOT / "examples")
    for place, (name, source) in enumerate(TASKS.items()):
        for part, (split, _) in enumerate(source.splits):
            write_jsonl(folder / f"{name}.{split}.jsonl", gold_pairs(name, 24, seed=200 + 10 * place + part))
        write_jsonl(folder / f"pool.{name}.jsonl", random_pairs(150, seed=100 + place))
    (folder / "wiki1m.txt").write_text("\n".join(random_sentences(520)) + "\n", encoding="utf-8")
    named = {name for path in RECIPES for name in re.findall(r"data/([\w.]+)\.gz", path.read_text(encoding="utf-8"))}
    for place, name in enumerate(sorted(named)):
        task = next((task for task in TASKS if task in name), "stsb")
        rows = gold_pairs(task, 24 if "sample" in name else 1000, seed=300 + place)
        with gzip.open(folder / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture
def in_checkout(data_dir, monkeypatch) -> None:
    """The recipes' own files are named from the root of a checkout."""
    monkeypatch.chdir(data_dir.parent)


@pytest.fixture(scope="module")
def stand_ins(tiny_bert, tiny_roberta, tmp_path_factory) -> dict[str, dict[str, str]]:
    """For each student name of the recipes a language model and a bi-encoder."""
    found = {"plm": {}, "bi_encoder": {}}
    for name, plm in (("bert", tiny_bert), ("roberta", tiny_roberta)):
        ready = tmp_path_factory.mktemp("ready") / name
        ready.mkdir()
        load_bi_encoder(str(plm), ModelOptions("cls")).save_pretrained(ready)
        found["plm"][name], found["bi_encoder"][name] = str(plm), str(ready)
    return found


def overrides(path: Path, data_dir: Path, stand_ins: dict[str, dict[str, str]]) -> list[str]:
    """The driver's flags with which a recipe runs without the Hub."""
    words = ["--data_dir", str(data_dir)]
    for student in read_recipe(str(path))[DRIVER]["students"]:
        family = "roberta" if "roberta" in student["name"] else "bert"
        for key, models in stand_ins.items():
            if key in student:
                words += [f"--{key}", f"{student['name']}={models[family]}"]
    return words


def recipe_with(path: Path, stand_ins: dict[str, dict[str, str]]) -> dict:
    """The recipe, with a bi-encoder of the stand-ins for each outside teacher, which no flag replaces."""
    recipe, ready = read_recipe(str(path)), stand_ins["bi_encoder"]["bert"]
    for teacher in recipe[DRIVER].get("teachers", []):
        teacher["model"] = ready
    if "teacher" in recipe.get("train_contrastive", {}):
        recipe["train_contrastive"]["teacher"] = ready
    return recipe


@pytest.mark.usefixtures("in_checkout")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted_with_all_it_names(path, data_dir, stand_ins, tmp_path, run_script):
    here = tmp_path / "recipe.yaml"
    here.write_text(yaml.safe_dump(recipe_with(path, stand_ins)), encoding="utf-8")
    words = ["--recipe", here, "--output_dir", tmp_path / "run", "--dry_run"]
    result = run_script("plan_run.py", *words, *overrides(path, data_dir, stand_ins))
    assert result.returncode == 0, result.stderr
    assert "score_pairs.py" in result.stdout and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("in_checkout")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_through(path, data_dir, stand_ins, tmp_path, run_script):
    """One cycle, each stage for one step, in this process (the driver and the launcher are tested elsewhere)."""
    recipe = recipe_with(path, stand_ins)
    recipe[DRIVER]["cycles"] = 1
    recipe["common"] = {**recipe.get("common", {}), "mixed_precision": "no"}
    for stage in TRAINING_STAGES:
        recipe[stage] = {**recipe.get(stage, {}), "total_batch_size": 8, "max_steps": 1}
    if "pairs" not in recipe[DRIVER]:
        recipe["mine_pairs"] = {**recipe.get("mine_pairs", {}), "num_pairs": 200}
        recipe["distill_cross2bi"]["num_held_out"] = 20
    tiny, run = tmp_path / "tiny.yaml", tmp_path / "run"
    tiny.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    plan = run_script("plan_run.py", "--recipe", tiny, "--output_dir", run, *overrides(path, data_dir, stand_ins))
    assert plan.returncode == 0, plan.stderr
    result = run_script("run_stages.py", run)
    assert result.returncode == 0, result.stderr
    assert run_script("summarize_run.py", run).returncode == 0

    if "tasks" not in recipe[DRIVER]:
        assert (run / "last" / "bi-encoder" / "run.json").is_file()
        return
    results = json.loads((run / "cycle-1" / "results.json").read_text())
    tasks = recipe[DRIVER]["tasks"]
    names = GROUPS.get(tasks, [tasks]) if isinstance(tasks, str) else tasks
    expected = {name.partition("=")[0] for name in names if not name.endswith(".dev")}
    assert {entry["task"] for entry in results if entry["split"] == "test"} == expected
    assert ("paper: " in (run / "results.md").read_text()) == ("paper" in recipe[DRIVER])
    if "qnli" in path.stem:
        cross = json.loads((run / "cycle-1" / "cross-encoder" / "bert" / "run.json").read_text())
        assert cross["examples"] == 150  # not in both orders


def test_the_page_on_recipes_has_every_key():
    page = recipe_keys.PAGE.read_text(encoding="utf-8").partition(recipe_keys.START)[2]
    assert page == "\n" + recipe_keys.tables(), "run: python tests/support/recipe_keys.py"

"""The README's way from a file of sentences to models in use, command by command, with a tiny model."""

import csv
import json
import os
import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT, random_sentences, save_telling_encoders, warm_python

from transencoder.config.recipes import read_recipe
from transencoder.data.formats import write_rows

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """The four commands: the quick start's, and those of the section on using the models."""
    section = README.partition("## Use the models")[2].partition("\n## ")[0]
    blocks = [README[README.index("```bash") :], section]
    return [
        shlex.split(line)
        for block in blocks
        for line in re.search(r"```bash\n(.*?)```", block, re.S).group(1).replace("\\\n", " ").splitlines()
    ]


def short(recipe, path):
    """The quick start's recipe with a few steps of each stage."""
    content = read_recipe(str(recipe))
    content["common"] = {"mixed_precision": "no"}
    content["mine_pairs"]["num_pairs"] = 300
    for stage in ("distill_bi2cross", "distill_cross2bi"):
        content[stage] = {**content[stage], "max_steps": 4, "num_epochs": 1, "total_batch_size": 32}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def encoders(tiny_bert, tmp_path_factory):
    """The folder of a tiny bi-encoder and cross-encoder."""
    folder = tmp_path_factory.mktemp("encoders")
    save_telling_encoders(folder, tiny_bert)
    return folder


@pytest.mark.slow
def test_from_sentences_to_a_search_and_a_list_of_duplicates(encoders, tiny_bert, tmp_path):
    quickstart, activate, search, duplicates = commands()
    assert quickstart == ["bash", "scripts/quickstart.sh"] and activate == ["source", ".venv/bin/activate"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{warm_python().path}:{os.environ['PATH']}",
    }

    def run(words):
        words = [
            word.replace("runs/quickstart", str(tmp_path / "run")).replace("duplicates.csv", str(tmp_path / "d.csv"))
            for word in words
        ]
        result = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    # quickstart.sh makes an environment and starts the driver with the recipe.
    assert "recipes/quickstart.yaml" in (ROOT / "scripts" / "quickstart.sh").read_text()
    recipe = short(ROOT / "recipes" / "quickstart.yaml", tmp_path / "short.yaml")
    driver = ["bash", "scripts/run_transencoder.sh", "--recipe", str(recipe), "--output_dir", "runs/quickstart"]
    models = ["--bi_encoder", str(encoders / "bi"), "--plm", str(tiny_bert)]
    result = run([*driver, *models, "--launcher", "python"])
    assert (tmp_path / "run" / "cycle-1" / "pairs.parquet").exists()
    assert re.search(r"^VERDICT (better|same|worse): bi-encoder ", result.stdout + result.stderr, re.M)

    assert "1443 sentences, 1443 of them new" in run(search).stderr
    run([*duplicates, "--threshold", "0", "--neighbours", "5"])
    with (tmp_path / "d.csv").open(newline="") as stream:
        assert {"cluster", "size", "score", "sentence"} <= set(next(csv.DictReader(stream)))


def test_the_recipe_for_ones_own_text_is_accepted(encoders, tiny_bert, tmp_path, run_script):
    content = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.S).group(1))
    (student,) = content["run_transencoder"]["students"]
    student.update(bi_encoder=str(encoders / "bi"), plm=str(tiny_bert))
    table = tmp_path / content["run_transencoder"]["sentences"]
    (column,) = (item.removeprefix("sentence=") for item in content["common"]["columns"])
    write_rows(table, ["id", column], [(place, text) for place, text in enumerate(random_sentences(300))])
    content["run_transencoder"]["sentences"] = str(table)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(content))
    result = run_script("plan_run.py", "--recipe", tmp_path / "my.yaml", "--output_dir", tmp_path / "run", "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "distill_cross2bi.py" in result.stdout


@pytest.mark.slow
def test_one_cycle_by_hand(tiny_bert, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PATH"] = f"{warm_python().path}:{environment['PATH']}"
    words = ["bash", ROOT / "examples/steps.sh", tiny_bert, tmp_path / "run", "--max_steps", "2"]
    words += ["--mixed_precision", "no"]
    result = subprocess.run(list(map(str, words)), env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    entries = json.loads((tmp_path / "run/results/results.json").read_text())
    names = [f"{tmp_path}/run/{name}" for name in ("start", "cross-encoder", "bi-encoder")]
    assert {entry["encoders"][0] for entry in entries} == set(names)

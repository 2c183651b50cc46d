"""The benchmark of a GPU, in small, on a CPU."""

import json
import os
import subprocess

import pytest
from conftest import ROOT, warm_python

ABSENT = """
import importlib.util, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if is_absent(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def is_absent(name):
    return name.partition(".")[0] in {"faiss", "bm25s", "deepspeed"}

sys.meta_path.insert(0, Absent())
there = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if is_absent(name) else there(name, package)
"""


def benchmark(*words, **environment):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *map(str, words)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_speed_of_a_gpu_in_small_without_optional_libraries(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    done = benchmark("speed", tmp_path / "out", "--smoke", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "speed-tiny.json").read_text())
    works = report["arguments"]["works"]
    expected = {(work, side) for work in works for side in ("ours", "peer", "CUDA graphs")}
    assert len(works) == 5 and {(run["work"], run["side"]) for run in report["runs"]} == expected
    trainings = [run for run in report["runs"] if not run["work"].startswith("score")]
    assert all(run["seconds"] > 0 for run in report["runs"]) and all(run["loop"] > 0 for run in trainings)
    lines = (tmp_path / "out" / "speed-tiny.md").read_text().splitlines()
    assert len(lines) == 2 + 10 and lines[3].startswith("| train cross-encoder (step 2) | without CUDA graphs | ")


@pytest.mark.slow
def test_a_recipe_on_a_gpu_in_small(tmp_path):
    path = f"{warm_python().path}:{os.environ['PATH']}"
    done = benchmark("recipe", tmp_path, "--smoke", PATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "recipe.json").read_text())
    assert report["complete"] and len(report["stages"]) == 1 + 3 * 5
    assert report["total"] >= sum(stage["seconds"] for stage in report["stages"]) - len(report["stages"])
    assert f"| all, from the command to the results | {report['total']} |" in done.stdout
    assert (tmp_path / "run" / "best" / "bi-encoder" / "model.safetensors").is_file()


def test_a_part_that_there_is_not(tmp_path):
    done = benchmark("quality", tmp_path)
    assert done.returncode == 2 and done.stderr == "gpu.sh: speed or recipe, not quality\n"
    assert benchmark("speed", tmp_path, "--fast").returncode == 2

"""The driver, end to end, on a tiny model; resuming; and the README's commands against the scripts' own parsers."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, make_tokenizer, random_pairs, warm_python, write_jsonl

from transencoder.runtime.backends import cpu_cores

DRIVER = ["bash", str(ROOT / "scripts" / "run_transencoder.sh")]


def drive(*words):
    return subprocess.run(
        [*DRIVER, *map(str, words)], capture_output=True, text=True, env=drive_environment(), cwd=ROOT, timeout=900
    )


def drive_environment():
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return environment | {"PATH": f"{warm_python().path}:{environment['PATH']}"}


@pytest.fixture(scope="module")
def second_bert(tiny_bert, tmp_path_factory):
    """Another architecture: a tiny DistilBERT."""
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-distilbert"
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    size = dict(dim=24, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=64)
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_bert, second_bert, tiny_roberta, corpus, tmp_path_factory):
    """Mutual distillation of a BERT and a RoBERTa, whose cross-encoder is a DistilBERT."""
    stage = dict(total_batch_size=16, learning_rate=1e-3, num_epochs=1, eval_steps=100)
    folder = tmp_path_factory.mktemp("recipes")
    other = write_jsonl(folder / "other.jsonl", random_pairs(40, seed=3))
    content = {
        "common": {"mixed_precision": "no"},
        "run_transencoder": {
            "students": [
                {"name": "one", "plm": str(tiny_bert), "train_contrastive": {"temperature": 0.1}},
                {"name": "two", "plm": str(tiny_roberta), "cross_encoder_plm": str(second_bert)},
            ],
            "sentences": str(corpus / "sentences.txt"),
            "pairs": str(corpus / "pairs.jsonl"),
            "dev": f"mine.dev={corpus / 'dev.jsonl'}",
            "tasks": [f"mine={corpus / 'test.jsonl'}", f"other={other}"],
            "paper": {"one": "simcse-bert-base/mutual", "ensemble": "simcse-base/mutual"},
            "cycles": 2,
            "stop_at": 0.01,  # so that the second cycle makes its labels and goes no further
        },
        "score_pairs": {"teacher_weights": [2, 1]},
        "train_contrastive": {**stage, "pooling": "mean"},
        "distill_bi2cross": stage,
        "distill_cross2bi": stage,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_the_driver_runs_resumes_and_refuses_another_recipe(recipe, second_bert, tmp_path):
    run = tmp_path / "run"
    launcher = f"accelerate launch --config_file {ROOT / 'accelerate_configs' / 'cpu.yaml'}"
    words = ["--recipe", recipe, "--output_dir", run, "--launcher", launcher]
    result = drive(*words)
    assert result.returncode == 0, result.stderr[-3000:]

    # What it leaves behind.
    cycle = run / "cycle-1"
    for path in ("bi-scores.parquet", "cross-encoder/one", "cross-scores.parquet", "bi-encoder/two", "results.json"):
        assert (cycle / path).exists(), path
    assert json.loads((cycle / "cross-encoder/two/config.json").read_text())["model_type"] == "distilbert"
    assert json.loads((run / "contrastive/one/run.json").read_text())["arguments"]["temperature"] == 0.1
    assert (run / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert "the loop ends" in result.stderr and sorted(os.listdir(run / "cycle-2")) == ["bi-scores.parquet"]
    table = (run / "results.md").read_text()
    assert table.startswith("VERDICT ") and result.stdout.splitlines()[-1] == table.splitlines()[0]
    assert "start, bi-encoder (one)" in table and "cycle 1, cross-encoder (two)" in table
    assert "mean of tests" in table and "mine.dev" in table
    assert json.loads((cycle / "bi-encoder/two/config.json").read_text())["model_type"] == "roberta"
    assert "start, bi-encoder (ensemble)" in table and "cycle 1, bi- and cross-encoder (ensemble)" in table
    sizes = [len(entry["encoders"]) for entry in json.loads((cycle / "results.json").read_text())]
    assert {size: sizes.count(size) for size in sizes} == {1: 24, 2: 12, 4: 6}  # three sets, two metrics
    import sentence_transformers

    sentence_transformers.CrossEncoder(str(run / "best/cross-encoder"), device="cpu")
    if (run / "best/bi-encoder").exists():  # otherwise the start is the best
        sentence_transformers.SentenceTransformer(str(run / "best/bi-encoder"), device="cpu")

    # The same command again does nothing; with a stage's output gone, it does that stage.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors") if "best" not in path.parts}
    shutil.rmtree(cycle / "bi-encoder/two")
    again = drive(*words)
    assert again.returncode == 0, again.stderr[-3000:]
    redone = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert redone == {cycle / "bi-encoder/two/model.safetensors"}
    assert again.stderr.count("done before") == 8  # what was measured before is measured again

    # Another recipe must not write there; the same one with other flags is another one.
    other = drive(*words, "--seed", 3)
    assert other.returncode == 2 and "common.seed" in other.stderr and len(other.stderr.splitlines()) == 1


LAUNCHERS = {
    1: "python",
    2: f"accelerate launch --config_file {ROOT / 'accelerate_configs' / 'multi_gpu.yaml'} --num_processes 2 "
    "--num_cpu_threads_per_process 1 --main_process_port 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAUNCHERS)
def test_one_launch_makes_the_bits_that_the_printed_commands_make(recipe, tmp_path, processes):
    """Every stage there is, with dropout, a dev set and a student's own seeds; in one process group, and by hand."""
    content = yaml.safe_load(recipe.read_text())
    del content["run_transencoder"]["pairs"], content["run_transencoder"]["stop_at"]
    content["run_transencoder"].update(students=content["run_transencoder"]["students"][:1], cycles=1, paper={})
    content["mine_pairs"], content["score_pairs"] = {"num_pairs": 60, "mix": ["nearest:1-5=1", "random=1"]}, {}
    content["distill_bi2cross"] = {**content["distill_bi2cross"], "seed": 5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    words = ["--recipe", path, "--launcher", LAUNCHERS[processes], "--output_dir"]
    result = drive(*words, tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    commands = drive(*words, tmp_path / "by-hand", "--dry_run").stdout.splitlines()
    assert len(commands) == 8
    for command in commands:
        subprocess.run(["bash", "-c", command], check=True, env=drive_environment(), cwd=ROOT, capture_output=True)
    sums = [checksums(tmp_path / name) for name in ("run", "by-hand")]
    assert len(sums[0]) == 7 and sums[0] == sums[1]
    for name in ("contrastive/one", "cycle-1/cross-encoder/one", "cycle-1/bi-encoder/one", "cycle-1"):
        facts = [json.loads((tmp_path / run / name / "run.json").read_text()) for run in ("run", "by-hand")]
        assert facts[0]["world_size"] == facts[1]["world_size"] == processes
        assert facts[0].get("history") == facts[1].get("history")
    scores = pq.read_schema(tmp_path / "run/cycle-1/bi-scores.parquet").metadata
    assert any(f'"world_size": {processes}'.encode() in value for value in scores.values())


def checksums(run):
    """Of all weights, and of the rows of all tables."""
    found = {}
    for path in run.glob("c*/**/*"):
        if path.suffix in (".safetensors", ".parquet"):
            table = path.suffix == ".parquet"
            content = repr(pq.read_table(path).to_pydict()).encode() if table else path.read_bytes()
            found[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.slow
def test_under_fsdp_each_stage_has_its_own_launch(recipe, tmp_path):
    without = dict(tasks=None, dev=None, paper={}, stop_at=None, cycles=1)
    content = yaml.safe_load(changed(recipe, tmp_path / "tiny.yaml", **without).read_text())
    content["run_transencoder"]["students"] = content["run_transencoder"]["students"][:1]
    content["score_pairs"] = {}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    launcher = LAUNCHERS[2].replace("multi_gpu", "fsdp")
    run = tmp_path / "run"
    result = drive("--recipe", tmp_path / "tiny.yaml", "--output_dir", run, "--launcher", launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("has a launch of its own: FSDP and DeepSpeed are set up once in a process") == 4
    assert "[5/5] cycle 1: bi-encoder of one: " in result.stderr
    facts = json.loads((run / "cycle-1/bi-encoder/one/run.json").read_text())
    assert (facts["backend"], facts["world_size"]) == ("fsdp", 2)
    assert not list(run.glob(".outcome*"))


@pytest.mark.slow
def test_without_any_labels_nothing_is_measured_and_the_last_models_are_kept(recipe, tmp_path):
    without = dict(tasks=None, dev=None, paper={}, stop_at=None, cycles=1)
    path, run = changed(recipe, tmp_path / "unlabelled.yaml", **without), tmp_path / "run"
    words = ["--recipe", path, "--output_dir", run, "--launcher", "python"]
    result = drive(*words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "measure" not in result.stderr and "[8/8] cycle 1: bi-encoder of two" in result.stderr
    for kind in ("bi", "cross"):
        best, last = (
            run / folder / "model.safetensors" for folder in (f"last/{kind}-encoder", f"cycle-1/{kind}-encoder/one")
        )
        assert best.read_bytes() == last.read_bytes()
    assert result.stdout.splitlines()[-1].startswith("VERDICT unknown: there are no labels; start and end rank 64")
    assert not (run / "best").exists() and (run / "to_label.tsv").exists()
    nothing = "Nothing was measured"
    assert nothing in (run / "results.md").read_text() and not (run / "progress.png").exists()
    assert "give each run once" in summarize(run, run)
    shutil.copytree(run, tmp_path / "other")
    summarize(run, tmp_path / "other", "--output", tmp_path / "several.md")
    assert nothing in (tmp_path / "several.md").read_text()
    (run / "cycle-1/bi-encoder/two/run.json").unlink()
    assert "has not finished there" in summarize(run)


def summarize(*words):
    """What the script says when it fails, or warns."""
    command = [warm_python().path / "python", ROOT / "scripts/summarize_run.py", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True).stderr


def test_dry_run_prints_commands_that_the_scripts_accept(recipe, tmp_path):
    result = drive("--recipe", recipe, "--output_dir", tmp_path / "run", "--dry_run", "--seed", 7, "--patience", "08")
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(commands) == 17 and not (tmp_path / "run").exists()
    assert result.stderr.startswith("Sentences: ") and result.stderr.endswith("Measured: mine.dev, mine, other\n")
    for command in commands:
        arguments = parsed(command[2:])
        assert arguments.seed == 7 and arguments.mixed_precision == "no"


@pytest.mark.parametrize(
    ("launcher", "asked", "given"),
    [([], None, str(cpu_cores())), ([], "3", "3"), (["--launcher", "accelerate launch --cpu"], None, "")],
)
def test_without_a_gpu_accelerate_is_asked_for_all_cores(recipe, tmp_path, launcher, asked, given):
    accelerate = tmp_path / "bin" / "accelerate"
    accelerate.parent.mkdir()
    accelerate.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" >{tmp_path}/threads\nexit 1\n')
    accelerate.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"ACCELERATE_USE_CPU": "true", **({"OMP_NUM_THREADS": asked} if asked else {})}
    environment["PATH"] = f"{accelerate.parent}:{warm_python().path}:{environment['PATH']}"
    command = [*DRIVER, "--recipe", str(recipe), "--output_dir", str(tmp_path / "run"), *launcher]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 1 and "failed (see above)" in result.stderr, result.stderr
    assert (tmp_path / "threads").read_text().strip() == given


def changed(recipe, path, **changes):
    """The recipe with other keys of the driver's section, as a file."""
    content = yaml.safe_load(recipe.read_text())
    content["run_transencoder"].update(changes)
    path.write_text(yaml.safe_dump(content))
    return path


def dry_run(path, run):
    """The commands of a recipe: a list of the script's name and a dictionary of its options."""
    result = drive("--recipe", path, "--output_dir", run, "--dry_run")
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line)[2:] for line in result.stdout.splitlines()]
    return [(os.path.basename(words[0]), vars(parsed(words))) for words in commands]


def test_students_that_carry_over_begin_with_their_own_weights_from_the_second_cycle_on(recipe, tmp_path):
    run = tmp_path / "run"
    fresh = dry_run(changed(recipe, tmp_path / "fresh.yaml", cycles=2), run)
    carried = dry_run(changed(recipe, tmp_path / "carried.yaml", cycles=2, student_start="carry_over"), run)
    assert len(fresh) == len(carried) == 17
    different = {}
    for (script, one), (other_script, other) in zip(fresh, carried, strict=True):
        assert script == other_script
        keys = {key for key in one if one[key] != other[key]} - {"recipe"}
        if keys:
            different[os.path.relpath(other["output_dir"], run)] = {key: other[key] for key in keys}
    assert different == {
        **{
            f"cycle-2/cross-encoder/{name}": {
                "model_name_or_path": str(run / "cycle-1" / "cross-encoder" / name),
            }
            for name in ("one", "two")
        },
        **{
            f"cycle-2/bi-encoder/{name}": {"model_name_or_path": str(run / "cycle-1" / "bi-encoder" / name)}
            for name in ("one", "two")
        },
    }


def test_the_mean_of_both_kinds_can_be_what_step_3_learns(recipe, tmp_path):
    run = tmp_path / "run"
    mean = changed(recipe, tmp_path / "mean.yaml", cycles=2, step3_labels="both")
    result = drive("--recipe", mean, "--output_dir", run, "--dry_run")
    assert result.returncode == 2 and "step3_labels: both is a mean without teacher_weights" in result.stderr
    content = yaml.safe_load(mean.read_text())
    del content["score_pairs"]["teacher_weights"]
    mean.write_text(yaml.safe_dump(content))
    commands = dry_run(mean, run)
    teachers = {Path(a["output"]).relative_to(run): a["encoders"] for s, a in commands if s == "score_pairs.py"}
    for cycle, before in ((1, "contrastive"), (2, "cycle-1/bi-encoder")):
        bi = [str(run / before / name) for name in ("one", "two")]
        cross = [str(run / f"cycle-{cycle}/cross-encoder" / name) for name in ("one", "two")]
        assert teachers[Path(f"cycle-{cycle}/bi-scores.parquet")] == bi
        assert teachers[Path(f"cycle-{cycle}/cross-scores.parquet")] == [*cross, *bi]
    commands = dry_run(changed(mean, tmp_path / "bi.yaml", step3_labels="bi"), run)
    scores = {a["output_dir"]: a["scores"] for s, a in commands if s.startswith("distill_")}
    for kind in ("cross", "bi"):
        learned = scores[str(run / "cycle-2" / f"{kind}-encoder" / "one")]
        assert learned == [str(run / "cycle-2" / "bi-scores.parquet")]


def test_plain_self_distillation_leaves_the_cross_encoder_out(recipe, tmp_path):
    run = tmp_path / "run"
    commands = dry_run(changed(recipe, tmp_path / "plain.yaml", cycles=2, alternate=False), run)
    scripts = [script.removesuffix(".py") for script, _ in commands]
    cycle = ["score_pairs", "distill_cross2bi", "distill_cross2bi", "evaluate_encoders"]
    assert scripts == ["train_contrastive", "train_contrastive", "evaluate_encoders", *cycle, *cycle]
    students = [arguments for script, arguments in commands if script == "distill_cross2bi.py"]
    assert [student["scores"] for student in students] == [
        [str(run / f"cycle-{i}" / "bi-scores.parquet")] for i in (1, 1, 2, 2)
    ]
    assert {student["model_name_or_path"] for student in students} == {
        str(run / "contrastive" / name) for name in ("one", "two")
    }


@pytest.mark.parametrize("remine", [False, True])
def test_without_pairs_they_are_mined_with_the_bi_encoders_of_the_cycle_before(recipe, corpus, tmp_path, remine):
    content = yaml.safe_load(recipe.read_text())
    del content["run_transencoder"]["pairs"], content["run_transencoder"]["stop_at"]
    content["run_transencoder"].update(remine=remine, sentences_b=str(corpus / "pairs.jsonl"))
    content["mine_pairs"] = {"num_pairs": 50, "mix": ["lexical=1", "random=1"]}
    path, run = tmp_path / "mine.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(content))
    commands = dry_run(path, run)
    mining = [arguments for script, arguments in commands if script == "mine_pairs.py"]
    labelling = [arguments["pairs"] for script, arguments in commands if script == "score_pairs.py"]
    found = [str(run / f"cycle-{cycle}/pairs.parquet") for cycle in (1, 2 if remine else 1)]
    assert [arguments["output"] for arguments in mining] == list(dict.fromkeys(found))
    assert labelling == [[found[0]], [found[0]], [found[1]], [found[1]]]
    assert mining[0]["encoders"] == [str(run / "contrastive" / name) for name in ("one", "two")]
    assert (mining[0]["num_pairs"], mining[0]["mix"]) == (50, ["lexical=1", "random=1"])
    assert mining[0]["sentences"] == [str(corpus / "sentences.txt")]
    assert mining[0]["sentences_b"] == [str(corpus / "pairs.jsonl")]
    step1 = [arguments["sentences"] for script, arguments in commands if script == "train_contrastive.py"]
    assert step1 == [[str(corpus / "sentences.txt"), str(corpus / "pairs.jsonl")]] * 2
    if remine:
        assert mining[1]["encoders"] == [str(run / "cycle-1/bi-encoder" / name) for name in ("one", "two")]


def test_several_seeds_are_several_runs(recipe, tmp_path):
    words = ["--recipe", recipe, "--output_dir", tmp_path / "run", "--dry_run"]
    result = drive(*words, "--seeds", 3, 5, "--launcher", "accelerate launch --cpu")
    assert result.returncode == 0, result.stderr
    commands = result.stdout.splitlines()
    for seed, half in ((3, commands[: len(commands) // 2]), (5, commands[len(commands) // 2 :])):
        alone = drive(*words[:3], tmp_path / "run" / f"seed-{seed}", "--dry_run", "--seed", seed)
        assert half == [line.replace("launch", "launch --cpu", 1) for line in alone.stdout.splitlines()]
    for bad in (["--seeds", 1], ["--seeds", 1, 1], ["--seeds", 1, 2, "--seed", 3], ["--seeds", 1, "x"]):
        refusal = drive(*words, *bad)
        assert refusal.returncode == 2 and len(refusal.stderr.splitlines()) == 1, refusal.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": "nowhere.tsv"}, ["nowhere.tsv", "no such file"]),
        ({"cycles": 0}, ["cycles"]),
        ({"cylces": 2}, ["cylces"]),
        ({"dev": "gold.jsonl"}, ["gold.jsonl", "neither a file nor a task"]),
        ({"tasks": "sts99"}, ["sts99"]),
        ({"pairs": None, "sentences": None}, ["'pairs'", "'sentences'"]),
        ({"remine": True}, ["remine", "pairs"]),
        ({"pairs": None, "remine": True}, ["stop_at", "remine"]),
        ({"pairs": None, "num_training_pairs": 9}, ["num_training_pairs", "num_pairs"]),
        ({"pairs": None, "remine": "yes"}, ["remine must be true or false"]),
        ({"students": [{"name": "a", "plm": "no/model"}]}, ["no/model", "Hub"]),
    ],
)
def test_a_bad_recipe_is_refused_before_any_work(recipe, tmp_path, change, words, run_script):
    content = yaml.safe_load(recipe.read_text())
    del content["run_transencoder"]["paper"], content["score_pairs"]
    content["run_transencoder"].update(change)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    result = run_script("plan_run.py", "--recipe", path, "--output_dir", tmp_path / "run")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert all(word in result.stderr for word in words), result.stderr


def test_the_driver_refuses_what_it_does_not_know():
    result = drive("--recipie", "x")
    assert result.returncode == 2 and "--recipie" in result.stderr and len(result.stderr.splitlines()) == 1


def parsed(words):
    """A script's arguments from the words after the launcher, by the script's own parser."""
    from transencoder.config.parsing import parse_stage

    while not words[0].endswith(".py"):
        words = words[1:]
    script = ROOT / "scripts" / words[0].rpartition("/")[2]
    assert script.is_file(), script
    return parse_stage(script.stem, argv=words[1:])


def documented_commands():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield page.name, line.split("  #")[0].strip()


@pytest.mark.parametrize(("page", "line"), list(documented_commands()))
def test_commands_in_the_documentation_are_accepted(page, line, tmp_path):
    words = shlex.split(line)
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "sbatch":
        words = words[words.index("scripts/transencoder.slurm") + 1 :]
        words = ["accelerate", "launch", *words] if words[0].endswith(".py") else ["bash", DRIVER[1], *words]
    if words[0] == "accelerate":
        parsed(words[2:])
    elif words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file(), line
        usage = script.read_text()
        for flag in (word.split("=")[0] for word in words[2:] if word.startswith("--")):
            assert flag in usage or script.name == "test.sh", f"{flag} in {line}"
        for path in (word for word in words if word.startswith("recipes/")):
            assert (ROOT / path).is_file(), path
    elif words[0] in ("python", "python3"):
        script = ROOT / words[1]
        assert script.is_file(), line
        assert all(flag in script.read_text() for flag in words[2:] if flag.startswith("--")), line
    else:
        assert words[0] in {"cp", "sed", "source", "pip", "hf"}, line
        for path in (word for word in words if word.startswith("recipes/")):
            assert (ROOT / path).is_file(), path


def test_the_file_tree_of_the_architecture_page_is_the_files_that_are_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named, folder = set(), ""
    for line in re.search(r"```\n(scripts/.*?)```", page, re.S).group(1).splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        path = name if name == folder else folder + name
        assert (ROOT / path).exists(), line
        named.add(path)
    for folder in ("scripts", "transencoder"):
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"}
        assert {path for path in there if not path.endswith(("__init__.py", ".md"))} <= named


def test_the_example_pairs_are_what_their_script_makes(tmp_path):
    for name in ("build_pairs.py", "support_questions.tsv"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    subprocess.run([sys.executable, tmp_path / "build_pairs.py"], check=True, capture_output=True)
    for name in ("sentences.txt", "pairs.dev.tsv", "pairs.test.tsv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "examples" / name).read_bytes(), name


def test_every_recipe_is_understood():
    from transencoder.config.parsing import parse_stage
    from transencoder.config.recipes import as_options, read_recipe
    from transencoder.config.stages import STAGES
    from transencoder.run.plan import load_plan

    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        recipe = read_recipe(str(path))
        load_plan(recipe, str(path))
        required = {
            "train_contrastive": "--model_name_or_path m --sentences s --output_dir o",
            "mine_pairs": "--encoders e --sentences s --output o",
            "score_pairs": "--encoders e --pairs p --output o",
            "distill_bi2cross": "--model_name_or_path m --scores s --output_dir o",
            "distill_cross2bi": "--model_name_or_path m --scores s --output_dir o",
            "evaluate_encoders": "--encoders e --tasks stsb --output_dir o",
        }
        for stage in STAGES:
            arguments = parse_stage(stage, argv=["--recipe", str(path), *required[stage].split()])
            for name, value in recipe.get(stage, {}).items():
                assert getattr(arguments, name) == value, f"{path}: {stage}.{name}"
        assert as_options({"a": None}) == []

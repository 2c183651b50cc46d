"""Command line, recipes, and the driver's plan."""

import dataclasses
import subprocess
from pathlib import Path
from typing import get_type_hints

import pytest
import torch.nn.functional as F
import yaml
from conftest import random_pairs, write_jsonl

from transencoder import losses
from transencoder.config.arguments import ContrastiveArguments
from transencoder.config.options import Choice
from transencoder.config.parsing import parse_stage
from transencoder.config.recipes import DRIVER, as_options, read_recipe
from transencoder.config.stages import STAGES
from transencoder.config.tools import DuplicatesArguments, SearchArguments
from transencoder.encoders import load_bi_encoder
from transencoder.errors import InputError, one_line_errors
from transencoder.model_files import ModelOptions
from transencoder.run.checks import check_inputs
from transencoder.run.plan import keep_recipe, load_plan, resolve_recipe
from transencoder.run.stages import make_stages

CROSS = ["--model_name_or_path", "bert", "--scores", "s.parquet", "--output_dir", "out"]
STEP1 = ["--model_name_or_path", "bert", "--sentences", "s.txt", "--output_dir", "out"]


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe from text."""

    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "recipe.yaml")

    return write


# --- precedence ------------------------------------------------------------------------------------------------------


def test_command_line_goes_before_the_script_section_before_common_before_the_default(recipe):
    path = recipe(
        "common: {seed: 1, num_epochs: 2, eval_steps: 3}\ndistill_bi2cross: {num_epochs: 4, eval_steps: 5}\n"
    )
    arguments = parse_stage("distill_bi2cross", argv=[*CROSS, "--recipe", path, "--eval_steps", "6"])
    assert (arguments.seed, arguments.num_epochs, arguments.eval_steps) == (1, 4, 6)
    assert (arguments.learning_rate, arguments.total_batch_size) == (2e-5, 32)  # of the script itself
    # The place of --recipe does not matter, nor its form.
    assert parse_stage("distill_bi2cross", argv=[f"--recipe={path}", "--eval_steps=6", *CROSS]) == arguments


def test_a_path_in_the_home_folder_may_be_written_with_a_tilde(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = recipe('evaluate_encoders: {tasks: ["g=~/g.tsv"]}\n')
    words = ["--encoders", "~/bi", "a~/b", "--output_dir=~/out"]
    arguments = parse_stage("evaluate_encoders", argv=["--recipe", path, *words])
    assert arguments.encoders == ["/home/me/bi", "a~/b"] and arguments.tasks == ["g=/home/me/g.tsv"]
    assert arguments.output_dir == "/home/me/out"
    words = ["--sentences", "~/s.txt", "~x", "--model_name_or_path", "bert", "--output_dir", "o"]
    assert parse_stage("train_contrastive", argv=words).sentences == ["/home/me/s.txt", "~x"]


def test_a_list_on_the_command_line_replaces_the_recipes(recipe):
    path = recipe("score_pairs: {extra_pairs: [a, b], pairs: [p, q]}\n")
    words = ["--encoders", "e", "--output", "o", "--extra_pairs", "c"]
    arguments = parse_stage("score_pairs", argv=["--recipe", path, *words])
    assert (arguments.extra_pairs, arguments.pairs) == (["c"], ["p", "q"])


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *(("train_contrastive", key) for key in ("output_dir", "overwrite", "model_name_or_path", "recipe")),
        *(("score_pairs", key) for key in ("output", "encoders")),
        *(("distill_cross2bi", key) for key in ("scores", "teachers")),
        *(("mine_pairs", "histogram"), ("common", "overwrite"), ("evaluate_encoders", "output_dir")),
        *(("common", key) for key in ("push_to_hub", "hub_model_id", "hub_public")),
    ],
)
def test_a_recipe_does_not_choose_what_is_written_deleted_or_published(recipe, section, key):
    with pytest.raises(InputError, match=rf"{section}\.{key}: cannot be set by a recipe"):
        read_recipe(recipe(f"{section}: {{{key}: x}}\n"))
    for stage in ("train_contrastive", "distill_bi2cross", "distill_cross2bi"):
        student = {"name": "a", "plm": "b", stage: {"output_dir": "/any", "overwrite": True}}
        with pytest.raises(InputError, match=rf"student a: {stage}\.output_dir: cannot be set by a recipe"):
            load_plan(plan_with(students=[student]), "r.yaml")
        student[stage] = {"output_dir=/any": []}  # a word that carries its value along
        with pytest.raises(InputError, match="unknown key 'output_dir=/any'"):
            load_plan(plan_with(students=[student]), "r.yaml")


def test_common_keys_of_other_scripts_and_the_drivers_section_are_left_out(recipe):
    path = recipe("common: {temperature: 0.1, swap: false}\nrun_transencoder: {whatever: 1}\nscore_pairs: {seed: 3}\n")
    assert parse_stage("distill_bi2cross", argv=[*CROSS, "--recipe", path]).swap is False
    assert parse_stage("train_contrastive", argv=[*STEP1, "--recipe", path]).temperature == 0.1
    assert parse_stage("distill_bi2cross", argv=[*CROSS, "--recipe", path]).seed == 2021


def test_recipe_values_arrive_in_their_types(recipe):
    path = recipe(
        "distill_bi2cross:\n"
        "  learning_rate: 2e-4  # a string in YAML 1.1\n"
        "  weight_decay: 1.0e-2\n"
        "  swap: false\n"
        "  dropout: null\n"
        "  max_steps: 10\n"
        "  columns: [sentence1=a, 'sentence2=b c']\n"
        "  dev: {}\n".format("'mine=a file.tsv'")
    )
    arguments = parse_stage("distill_bi2cross", argv=[*CROSS, "--recipe", path])
    assert arguments.learning_rate == 2e-4
    assert arguments.weight_decay == 0.01
    assert arguments.swap is False
    assert arguments.dropout is None
    assert arguments.max_steps == 10
    assert arguments.columns == ["sentence1=a", "sentence2=b c"]
    assert arguments.dev == "mine=a file.tsv"


def test_the_booleans_of_a_recipe_are_those_of_yaml_1_2(recipe, capsys):
    text = (
        "common: {mixed_precision: no}\ndistill_bi2cross: {dev: on, swap: False}\nrun_transencoder: {a: [yes, True]}\n"
    )
    path = recipe(text)
    content = read_recipe(path)
    assert content["common"] == {"mixed_precision": "no"}
    assert content["distill_bi2cross"] == {"dev": "on", "swap": False}
    assert content[DRIVER] == {"a": ["yes", True]}
    arguments = parse_stage("distill_bi2cross", argv=[*CROSS, "--recipe", path])
    assert (arguments.mixed_precision, arguments.dev, arguments.swap) == ("no", "on", False)
    assert "--swap" in refusal(
        capsys, "distill_bi2cross", *CROSS, "--recipe", recipe("distill_bi2cross: {swap: off}\n")
    )


def test_a_resolved_recipe_keeps_its_words(recipe, tmp_path):
    content = resolve_recipe(recipe("common: {mixed_precision: no, dev: off, swap: true}\n"))
    keep_recipe(content, tmp_path / "run")
    assert read_recipe(str(tmp_path / "run" / "recipe.yaml")) == content
    assert content["common"] == {"mixed_precision": "no", "dev": "off", "swap": True}


@pytest.mark.parametrize("text", ["common:\n", "common:\ndistill_bi2cross:\n", "common: {}\n"])
def test_an_empty_section_is_the_same_as_no_keys(recipe, text):
    arguments = parse_stage("distill_bi2cross", argv=[*CROSS, "--recipe", recipe(text)])
    assert {**vars(arguments), "recipe": None} == vars(parse_stage("distill_bi2cross", argv=CROSS))


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], (None, False)), (["--swap", "false"], (False, False)), (["--swap", "True", "--overwrite"], (True, True))],
)
def test_booleans(words, expected):
    arguments = parse_stage("distill_bi2cross", argv=[*CROSS, *words])
    assert (arguments.swap, arguments.overwrite) == expected


def test_the_methods_have_their_own_defaults():
    def values(*words: str) -> tuple:
        a = parse_stage("train_contrastive", argv=[*STEP1, *words])
        return a.learning_rate, a.total_batch_size, a.max_length, a.temperature, a.mlp_head, a.num_sentences

    assert values() == values("--method", "simcse") == (3e-5, 64, 32, 0.05, True, None)
    assert values("--method", "mirror") == (2e-5, 200, 50, 0.04, False, 10_000)
    given = ["--temperature", "0.1", "--mlp_head", "true", "--total_batch_size", "8"]
    assert values("--method", "mirror", *given) == (2e-5, 8, 50, 0.1, True, 10_000)
    assert values("--mlp_head", "false")[4] is False


def test_a_recipe_value_goes_before_the_methods_default(recipe):
    path = recipe("train_contrastive: {method: mirror, max_length: 20, mlp_head: false}\n")
    arguments = parse_stage("train_contrastive", argv=[*STEP1, "--recipe", path])
    assert (arguments.method, arguments.max_length, arguments.temperature) == ("mirror", 20, 0.04)
    arguments = parse_stage("train_contrastive", argv=[*STEP1, "--recipe", path, "--method", "simcse"])
    assert (arguments.method, arguments.max_length, arguments.mlp_head) == ("simcse", 20, False)


def test_every_method_has_defaults_for_the_same_options():
    required = {"learning_rate", "total_batch_size", "max_length", "temperature", "mlp_head"}
    assert all(required <= set(defaults) for defaults in ContrastiveArguments.METHOD_DEFAULTS.values())


def test_as_options_is_what_the_parser_reads():
    values = {"swap": False, "dropout": None, "seed": 3, "columns": ["a=b", "c=d e"], "learning_rate": "2e-5"}
    words = as_options(values)
    assert words == ["--swap", "False", "--seed", "3", "--columns", "a=b", "c=d e", "--learning_rate", "2e-5"]
    arguments = parse_stage("distill_bi2cross", argv=[*CROSS, *words])
    assert (arguments.swap, arguments.seed, arguments.columns) == (False, 3, ["a=b", "c=d e"])


# --- errors ----------------------------------------------------------------------------------------------------------


def refusal(capsys, stage: str, *argv: str) -> str:
    """The one line that a script says of these words, which it leaves with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        one_line_errors(lambda: parse_stage(stage, argv=list(argv)))()
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert ": error: " in line
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sede", "1"], "unknown arguments: --sede 1"),
        (["--see", "1"], "--see"),  # no abbreviations
        (["stray"], "stray"),
        (["--seed", "x"], "--seed"),
        (["--seed"], "--seed"),
        (["--swap", "perhaps"], "--swap"),
        (["--mixed_precision", "fp64"], "fp64"),
        (["--recipe"], "--recipe"),
    ],
)
def test_bad_words_are_told_in_one_line(capsys, words, expected):
    assert expected in refusal(capsys, "distill_bi2cross", *CROSS, *words)


def test_missing_required_options_are_told_in_one_line(capsys):
    line = refusal(capsys, "distill_bi2cross", "--scores", "s.parquet")
    assert "--model_name_or_path" in line
    assert "--output_dir" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distill_bi2cross: {sede: 1}\n", "unknown key 'sede'"),
        ("distill_bi2cross: {temperature: 1}\n", "unknown key 'temperature'"),
        ("common: {sede: 1}\n", "unknown key 'sede'"),
        ("score_pairs: {sede: 1}\n", "unknown key 'sede'"),  # of another script
        ("distil_bi2cross: {seed: 1}\n", "unknown section 'distil_bi2cross'; known: "),
        ("seed: 1\n", "must hold sections of keys"),
        ("- seed\n", "must hold sections of keys"),
        ("", "must hold sections of keys"),
        ("common: 1\n", "must hold sections of keys"),
        ("common: []\n", "must hold sections of keys"),
        ("common: {seed: 1\n", "not YAML: "),
        ("common: {num_epochs: many}\n", "--num_epochs"),
        ("distill_bi2cross: {mixed_precision: fp64}\n", "fp64"),
    ],
)
def test_bad_recipes_are_told_in_one_line(capsys, recipe, text, expected):
    assert expected in refusal(capsys, "distill_bi2cross", *CROSS, "--recipe", recipe(text))


def test_a_recipe_that_is_not_there_or_no_text_is_told_in_one_line(capsys, tmp_path):
    missing = str(tmp_path / "no.yaml")
    assert f"--recipe {missing}: No such file" in refusal(capsys, "distill_bi2cross", *CROSS, "--recipe", missing)
    (tmp_path / "latin.yaml").write_bytes(b"common: {dev: \xff}\n")
    path = str(tmp_path / "latin.yaml")
    assert f"--recipe {path}: not YAML" in refusal(capsys, "distill_bi2cross", *CROSS, "--recipe", path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give either --scores FILE or --teachers ENCODER --pairs FILE"),
        (["--scores", "s", "t"], "--scores: several files are teachers of --pairs, beside --teachers"),
        (["--scores", "s", "--teacher_scale", "rank"], "--teacher_scale goes with --teachers, or with score_pairs.py"),
        (["--teachers", "t", "--pairs", "p", "--scores", "s", "--teacher_weights", "1"], "for each of 2 teacher(s)"),
        (["--teachers", "t", "t", "--pairs", "p", "--teacher_weights", "1e308", "1e308"], "for each of 2 teacher(s)"),
        (["--teachers", "t"], "--teachers and --pairs go together"),
        (["--scores", "s", "--pairs", "p"], "--teachers and --pairs go together"),
    ],
)
@pytest.mark.parametrize("stage", ["distill_bi2cross", "distill_cross2bi"])
def test_labels_come_from_a_file_or_from_teachers(capsys, stage, words, expected):
    line = refusal(capsys, stage, "--model_name_or_path", "bert", "--output_dir", "out", *words)
    assert expected in line


BAD_NUMBERS = [
    ("distill_bi2cross", "total_batch_size", "0", "at least 1"),
    ("distill_bi2cross", "micro_batch_size", "0", "at least 1"),
    ("distill_bi2cross", "num_epochs", "0", "at least 1"),
    ("distill_cross2bi", "max_steps", "-1", "at least 1"),
    ("distill_cross2bi", "max_steps", "0", "at least 1"),
    ("distill_bi2cross", "eval_steps", "0", "at least 1"),
    ("score_pairs", "eval_batch_tokens", "0", "at least 1"),
    ("train_contrastive", "length_window", "0", "at least 1"),
    ("train_contrastive", "mask_characters", "0", "at least 1"),
    ("train_contrastive", "num_sentences", "1", "at least 2"),
    ("train_contrastive", "max_length", "2", "at least 3"),
    ("evaluate_encoders", "seed", "-1", "from 0 to 4294967295"),
    ("score_pairs", "seed", str(2**32), "from 0 to 4294967295"),
    ("distill_bi2cross", "warmup_ratio", "1.01", "from 0 to 1"),
    ("distill_bi2cross", "warmup_ratio", "-0.1", "from 0 to 1"),
    ("distill_bi2cross", "dropout", "2", "from 0 to 1"),
    ("train_contrastive", "drophead", "-0.5", "from 0 to 1"),
    ("distill_bi2cross", "weight_decay", "-1", "at least 0"),
    ("distill_bi2cross", "learning_rate", "nan", "a positive number"),
    ("distill_bi2cross", "learning_rate", "inf", "a positive number"),
    ("distill_bi2cross", "learning_rate", "0", "a positive number"),
    ("distill_bi2cross", "learning_rate", "-1", "a positive number"),
    ("train_contrastive", "temperature", "0", "a positive number"),
    ("distill_cross2bi", "max_grad_norm", "0", "a positive number"),
    ("distill_cross2bi", "dropout", "nan", "must be"),
    ("distill_cross2bi", "weight_decay", "inf", "must be"),
]
REQUIRED = {
    "train_contrastive": STEP1,
    "mine_pairs": ["--encoders", "e", "--sentences", "s.txt", "--output", "p.parquet"],
    "score_pairs": ["--encoders", "e", "--pairs", "p", "--output", "o.parquet"],
    "distill_bi2cross": CROSS,
    "distill_cross2bi": CROSS,
    "evaluate_encoders": ["--encoders", "e", "--tasks", "t", "--output_dir", "out"],
}


@pytest.mark.parametrize(("stage", "name", "value", "expected"), BAD_NUMBERS)
def test_a_number_that_makes_no_sense_is_told_in_one_line(capsys, stage, name, value, expected):
    line = refusal(capsys, stage, *REQUIRED[stage], f"--{name}", value)
    assert f"--{name} " in line
    assert expected in line


def test_a_number_of_a_recipe_is_checked_too(capsys, recipe):
    path = recipe("common: {total_batch_size: 0}\n")
    assert "--total_batch_size 0: must be at least 1" in refusal(capsys, "distill_bi2cross", *CROSS, "--recipe", path)


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("distill_bi2cross", "total_batch_size", 1),
        ("distill_bi2cross", "max_steps", 1),
        ("distill_bi2cross", "warmup_ratio", 0),
        ("distill_bi2cross", "warmup_ratio", 1),
        ("distill_bi2cross", "dropout", 0),
        ("distill_bi2cross", "weight_decay", 0),
        ("distill_bi2cross", "seed", 0),
        ("distill_bi2cross", "seed", 2**32 - 1),
        ("distill_bi2cross", "learning_rate", 1e-9),
        ("train_contrastive", "max_length", 3),
        ("train_contrastive", "num_sentences", 2),
        ("train_contrastive", "drophead", 1),
    ],
)
def test_numbers_at_their_limits_are_taken(stage, name, value):
    assert getattr(parse_stage(stage, argv=[*REQUIRED[stage], f"--{name}", str(value)]), name) == value


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_within_the_limits(stage):
    parse_stage(stage, argv=REQUIRED[stage])


CLASSES = [*(stage.arguments for stage in STAGES.values()), SearchArguments, DuplicatesArguments]


@pytest.mark.parametrize("arguments", CLASSES)
def test_every_number_has_limits(arguments):
    types = get_type_hints(arguments)
    for option in dataclasses.fields(arguments):
        if types[option.name] in (int, float, int | None, float | None):
            assert option.metadata["limits"] != (None, None) or option.metadata["positive"], option.name


def test_what_does_not_decide_the_result_is_left_out():
    """Guards old runs: another set would refuse, or take up, what a former version made."""
    options = {option.name: option for stage in STAGES.values() for option in dataclasses.fields(stage.arguments)}
    assert {name for name, option in options.items() if not option.metadata["identity"]} == {
        "recipe", "overwrite", "report_to", "output_dir", "output", "eval_batch_tokens", "micro_batch_size",
        "checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_model_id", "hub_public", "hub_license",
        "hub_language", "histogram", "shard_rows", "cuda_graphs",
    }  # fmt: skip
    for stage in STAGES.values():  # a class that changes an option keeps its other properties
        for option in dataclasses.fields(stage.arguments):
            assert option.metadata["identity"] == options[option.name].metadata["identity"], option.name


def test_an_option_reads_its_choices_and_their_help_from_a_registry(capsys, monkeypatch):
    monkeypatch.setitem(losses.CROSS_LOSSES, "huber", Choice(F.huber_loss, "less weight on outliers"))
    assert parse_stage("distill_bi2cross", argv=[*CROSS, "--loss", "huber"]).loss == "huber"
    with pytest.raises(SystemExit):
        parse_stage("distill_bi2cross", argv=["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ",huber}" in shown and "huber: less weight on outliers. (default: bce)" in shown
    assert "choose from" in refusal(capsys, "distill_cross2bi", *CROSS, "--loss", "huber")


@pytest.mark.parametrize("rank", ["0", None])
def test_the_first_of_all_processes_tells_an_error(capsys, monkeypatch, rank):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    assert "--sede" in refusal(capsys, "distill_bi2cross", *CROSS, "--sede", "1")


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_only_the_first_of_all_processes_tells_an_error(capsys, monkeypatch, local_rank):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", local_rank)  # the first one of the second machine is silent too
    with pytest.raises(SystemExit) as caught:
        one_line_errors(lambda: parse_stage("distill_bi2cross", argv=[*CROSS, "--sede", "1"]))()
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback():
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        one_line_errors(fail)()


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_every_option_with_its_default(capsys, stage):
    with pytest.raises(SystemExit) as caught:
        parse_stage(stage, "What it does.", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert "--seed" in shown
    assert "(default: 2021)" in shown


# --- the driver's plan -----------------------------------------------------------------------------------------------

RECIPE = {
    DRIVER: {
        "students": [{"name": "bert", "plm": "bert-base-uncased"}],
        "sentences": "s.txt",
        "pairs": ["p.tsv"],
        "tasks": "stsb",
    }
}


def plan_with(**changes: object) -> dict:
    """`RECIPE` with other driver keys; None leaves a key out."""
    section = {**RECIPE[DRIVER], **changes}
    return {DRIVER: {key: value for key, value in section.items() if value is not None}}


def test_a_plan_takes_single_names_for_lists_and_the_papers_cycles():
    plan = load_plan(RECIPE, "r.yaml")
    assert (plan.sentences, plan.pairs, plan.tasks, plan.cycles, plan.dev) == (["s.txt"], ["p.tsv"], ["stsb"], 3, None)
    assert [student.name for student in plan.students] == ["bert"]
    assert RECIPE[DRIVER]["tasks"] == "stsb"  # the recipe itself stays as it is


def test_a_plan_names_the_members_of_a_group():
    assert load_plan(plan_with(tasks=["sts", "stsb", "qqp"]), "r.yaml").tasks == [
        "sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "qqp",
    ]  # fmt: skip


def test_a_ready_bi_encoder_needs_neither_step_1_nor_its_sentences():
    student = {"name": "a", "bi_encoder": "org/simcse", "cross_encoder_plm": "bert"}
    (student,) = load_plan(plan_with(students=[student], sentences=None), "r.yaml").students
    assert (student.plm, student.bi_encoder) == (None, "org/simcse")


@pytest.mark.parametrize(
    ("recipe_", "expected"),
    [
        ({"common": {"seed": 1}}, "no section 'run_transencoder'"),
        (plan_with(students=None), "students must be a list of models"),
        (plan_with(students=[]), "students must be a list of models"),
        (plan_with(students="bert"), "students must be a list of models"),
        (plan_with(students=["bert"]), "students must be a list of models"),
        (plan_with(students=[{"plm": "bert"}]), "needs 'name'"),
        (plan_with(students=[{"name": "a", "model": "bert"}]), "unknown key 'model'"),
        (plan_with(students=[{"name": "a"}]), "student a: no plm"),
        (plan_with(students=[{"name": "a", "bi_encoder": "b"}]), "student a: no plm"),
        (plan_with(students=[{"name": "a", "cross_encoder_plm": "b"}]), "student a: needs a bi_encoder, or a plm"),
        (plan_with(sentences=None), "student bert: needs a bi_encoder, or a plm and run_transencoder.sentences"),
        (plan_with(students=[{"name": "a", "plm": "b"}, {"name": "a", "plm": "c"}]), "names must differ"),
        (plan_with(students=[{"name": "a/b", "plm": "b"}]), "plain folder names: a/b"),
        (plan_with(students=[{"name": "..", "plm": "b"}]), "plain folder names: .."),
        (plan_with(students=[{"name": "ensemble", "plm": "b"}]), "cannot be called 'ensemble'"),
        (plan_with(paper="simcse-bert-base/self"), "paper must name a setting of the paper for each student"),
        (plan_with(paper={"roberta": "simcse-bert-base/self"}), "paper: no student 'roberta'"),
        (plan_with(paper={"bert": "simcse-bert/self"}), "paper: the paper has no 'simcse-bert/self'; it has: "),
        (plan_with(student_start="fresh"), "student_start must be refresh or carry_over, not 'fresh'"),
        (plan_with(alternate="no"), "alternate must be true or false"),
        (plan_with(step3_labels="mean"), "step3_labels must be cross, both or bi, not 'mean'"),
        (plan_with(pairs=None, sentences=None), "needs 'pairs', or 'sentences'"),
        (plan_with(cycle=3), "unknown key 'cycle'"),
        (plan_with(cycles=0), "cycles must be a whole number from 1"),
        (plan_with(cycles="three"), "cycles must be a whole number from 1"),
        (plan_with(cycles=True), "cycles must be a whole number from 1"),
        (
            plan_with(students=[{"name": "a", "plm": "b", "distill_bi2cross": "swap"}]),
            "student a: distill_bi2cross must hold options",
        ),
        (
            plan_with(students=[{"name": "a", "plm": "b", "train_contrastive": ["x"]}]),
            "student a: train_contrastive must hold options",
        ),
    ],
)
def test_a_bad_plan_is_refused(recipe_, expected):
    with pytest.raises(InputError) as caught:
        load_plan(recipe_, "--recipe r.yaml")
    assert str(caught.value).startswith("--recipe r.yaml: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", [3, {"a": "b"}, ["a", 1]])
@pytest.mark.parametrize("key", ["pairs", "tasks", "sentences"])
def test_a_plan_with_something_else_than_names_is_refused(key, value):
    with pytest.raises(InputError, match=key):
        load_plan(plan_with(**{key: value}), "r.yaml")


@pytest.mark.parametrize("key", ["dev", "data_dir"])
def test_a_plan_with_a_list_for_one_name_is_refused(key):
    with pytest.raises(InputError, match=key):
        load_plan(plan_with(**{key: ["a", "b"]}), "r.yaml")


@pytest.mark.parametrize("key", ["name", "plm", "bi_encoder", "cross_encoder_plm"])
def test_a_student_with_a_number_for_a_name_is_refused(key):
    with pytest.raises(InputError, match=key):
        load_plan(plan_with(students=[{"name": "a", "plm": "b", key: 7}]), "r.yaml")


def test_a_students_options_are_not_read_before_the_inputs():
    student = {"name": "a", "plm": "b", "distill_bi2cross": {"seed": "x"}}
    (student,) = load_plan(plan_with(students=[student]), "r.yaml").students
    assert student.distill_bi2cross == {"seed": "x"}


@pytest.fixture
def check_student(tiny_bert, corpus, tmp_path):
    """Check a recipe with one student, some of its options, and other sections."""

    def check(options: dict | None = None, sections: dict | None = None, **changes: object) -> None:
        student = {"name": "bert", "plm": str(tiny_bert), **(options or {})}
        driver = {
            "students": [student],
            "sentences": str(corpus / "sentences.txt"),
            "pairs": str(corpus / "pairs.jsonl"),
            "tasks": f"mine={corpus / 'test.jsonl'}",
            "dev": f"mine.dev={corpus / 'dev.jsonl'}",
            **changes,
        }
        path = write_yaml(
            tmp_path / "checked.yaml", {"common": {"total_batch_size": 32}, **(sections or {}), DRIVER: driver}
        )
        check_inputs(load_plan(read_recipe(path), path), path)

    return check


def test_tasks_are_checked_as_they_will_be_measured(check_student, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"q1": f"a {i}", "q2": f"b {i}", "label": i / 2} for i in range(5)])
    columns = ["sentence1=q1", "sentence2=q2", "score=label"]
    check_student(sections={"evaluate_encoders": {"columns": columns}}, tasks=f"graded={path}")
    with pytest.raises(InputError, match="no column 'sentence1'"):
        check_student(sections={"score_pairs": {"columns": columns}}, tasks=f"graded={path}")


def test_a_students_good_options_pass(check_student):
    check_student()
    check_student(
        {
            "train_contrastive": {"method": "mirror", "num_sentences": 50, "total_batch_size": 50, "max_steps": 3},
            "distill_bi2cross": {"swap": False, "total_batch_size": 64, "select_by": "last"},
            "distill_cross2bi": {"num_epochs": 2, "learning_rate": "1e-5", "micro_batch_size": 8},
        },
        {"common": {"mixed_precision": "no", "total_batch_size": 16}, "evaluate_encoders": {"seed": 3}},
    )


@pytest.mark.parametrize(
    ("options", "sections", "expected"),
    [
        ({"distill_bi2cross": {"sede": 1}}, {}, "unknown key 'sede'"),
        ({"train_contrastive": {"swap": True}}, {}, "unknown key 'swap'"),
        ({"distill_cross2bi": {"num_epochs": "lots"}}, {}, "--num_epochs"),
        ({"train_contrastive": {"method": "bogus"}}, {}, "bogus"),
        ({"distill_bi2cross": {"learning_rate": "nan"}}, {}, "--learning_rate nan: must be a positive number"),
        ({"distill_bi2cross": {"total_batch_size": 0}}, {}, "--total_batch_size 0: must be at least 1"),
        # The corpus has 96 sentences and 64 pairs, which are 128 examples of the cross-encoder.
        ({"train_contrastive": {"total_batch_size": 97}}, {}, "96 examples are fewer than one batch"),
        ({"train_contrastive": {"total_batch_size": 64, "num_sentences": 63}}, {}, "63 examples are fewer"),
        ({"distill_cross2bi": {"total_batch_size": 65}}, {}, "64 examples are fewer"),
        ({"distill_bi2cross": {"total_batch_size": 129}}, {}, "128 examples are fewer"),
        ({"distill_bi2cross": {"total_batch_size": 65, "swap": False}}, {}, "64 examples are fewer"),
        ({}, {"common": {"total_batch_size": 10_000}}, "(now 10000)"),
        ({}, {"common": {"num_epochs": "lots"}}, "--num_epochs"),
        ({}, {"common": {"report_to": "bogus"}}, "bogus"),
        ({}, {"distill_bi2cross": {"dropout": 2}}, "--dropout 2"),
        ({}, {"score_pairs": {"eval_batch_tokens": 0}}, "--eval_batch_tokens 0"),
        ({}, {"evaluate_encoders": {"seed": "x"}}, "--seed"),
    ],
)
def test_bad_options_of_stages_are_known_before_any_work(check_student, capsys, options, sections, expected):
    with pytest.raises(SystemExit) as caught:
        one_line_errors(lambda: check_student(options, sections))()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_as_many_examples_as_a_batch_are_enough(check_student):
    sizes = {"train_contrastive": 96, "distill_bi2cross": 128, "distill_cross2bi": 64}
    check_student({stage: {"total_batch_size": size} for stage, size in sizes.items()})


def test_pairs_are_counted_without_repeats(check_student, tmp_path):
    rows = random_pairs(10)
    write_jsonl(tmp_path / "twice.jsonl", rows * 2)
    sections = {"common": {"total_batch_size": 4}, "distill_cross2bi": {"total_batch_size": 11}}
    with pytest.raises(InputError, match=r"^10 examples are fewer than one batch; .*now 11"):
        check_student({}, sections, pairs=str(tmp_path / "twice.jsonl"))


def test_a_ready_bi_encoder_needs_no_batch_of_sentences(check_student, tiny_bert, tmp_path):
    ready = tmp_path / "ready"
    ready.mkdir()
    load_bi_encoder(str(tiny_bert), ModelOptions("mean")).save_pretrained(ready)
    options = {"bi_encoder": str(ready), "train_contrastive": {"total_batch_size": 10_000}}
    check_student(options, sentences=None)
    with pytest.raises(InputError, match="unknown key 'sede'"):
        check_student({**options, "train_contrastive": {"sede": 1}}, sentences=None)


def test_the_drivers_flags_are_worked_into_the_recipe(recipe):
    path = recipe(yaml.safe_dump({"common": {"seed": 1, "num_epochs": 2}, **RECIPE}))
    resolved = resolve_recipe(path, {"plm": ["org/roberta"], "bi_encoder": ["bert=org/simcse"]}, 7, "my data")
    assert resolved["common"] == {"seed": 7, "num_epochs": 2}
    assert resolved[DRIVER]["students"] == [{"name": "bert", "plm": "org/roberta", "bi_encoder": "org/simcse"}]
    assert resolved[DRIVER]["data_dir"] == "my data"
    assert resolve_recipe(path) == read_recipe(path)
    assert resolve_recipe(recipe(yaml.safe_dump(RECIPE)), seed=7)["common"] == {"seed": 7}


def test_each_student_can_get_another_model(recipe):
    path = recipe(yaml.safe_dump(plan_with(students=[{"name": "a", "plm": "x"}, {"name": "b", "plm": "y"}])))
    resolved = resolve_recipe(path, {"plm": ["b=/models/b", "a=c"]})
    assert resolved[DRIVER]["students"] == [{"name": "a", "plm": "c"}, {"name": "b", "plm": "/models/b"}]


@pytest.mark.parametrize("value", ["org/roberta", "c=org/roberta"])
@pytest.mark.parametrize("students", [[{"name": "a"}, {"name": "b"}], None])
def test_a_model_for_no_student_or_for_several_is_refused(recipe, students, value):
    path = recipe(yaml.safe_dump(plan_with(students=students)))
    with pytest.raises(InputError, match=f"--plm {value}: .*{'students a, b' if students else 'students'}"):
        resolve_recipe(path, {"plm": [value]})


def test_the_resolved_recipe_is_kept_with_the_run(tmp_path):
    keep_recipe(RECIPE, tmp_path / "runs" / "a")
    assert read_recipe(str(tmp_path / "runs" / "a" / "recipe.yaml")) == RECIPE
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["recipe.yaml"]


def test_a_run_goes_on_with_the_same_recipe_or_with_more_cycles(tmp_path):
    keep_recipe(plan_with(cycles=2), tmp_path)
    (tmp_path / "cycle-1").mkdir()
    keep_recipe(plan_with(cycles=2), tmp_path)
    keep_recipe(plan_with(cycles=5), tmp_path)
    assert read_recipe(str(tmp_path / "recipe.yaml"))[DRIVER]["cycles"] == 5


def test_a_run_of_another_recipe_is_refused_with_the_difference(tmp_path):
    keep_recipe({"common": {"seed": 1}, **RECIPE}, tmp_path)
    with pytest.raises(InputError, match=r"holds another run's results \(common\.seed is 1 there and 2 here\)"):
        keep_recipe({"common": {"seed": 2}, **RECIPE}, tmp_path)
    with pytest.raises(InputError, match=r"run_transencoder\.dev is None there and 'stsb\.dev' here"):
        keep_recipe({"common": {"seed": 1}, **plan_with(dev="stsb.dev")}, tmp_path)
    assert read_recipe(str(tmp_path / "recipe.yaml")) == {"common": {"seed": 1}, **RECIPE}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds files that are not this tool's"):
        keep_recipe(RECIPE, tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        keep_recipe(RECIPE, tmp_path / "thesis.tex" / "run")


AWKWARD = 'it\'s "a" $HOME `id` \\ * {x} é\t\nb'


def words_of(content: dict) -> dict[str, list[str]]:
    """Each stage's title and what its words come to, after a shell has read the line that --dry_run prints."""
    stages = make_stages(load_plan(content, "r.yaml"), Path("run"), Path("r.yaml"))
    lines = "\n".join(stage.command("launch", Path("scripts")) for stage in stages)
    shell = f"launch() {{ printf '%s\\0' \"$@\" END; }}\n{lines}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, check=True, cwd="/")
    found = [line.split("\0")[:-1] for line in result.stdout.decode().split("END\0")[:-1]]
    assert [[f"scripts/{stage.script}", *stage.words] for stage in stages] == found
    return {stage.title: words for stage, words in zip(stages, found, strict=True)}


def test_a_plan_arrives_in_a_shell_as_it_is():
    students = [
        {
            "name": "bert",
            "plm": AWKWARD,
            "distill_bi2cross": {"swap": False, "columns": ["sentence1=" + AWKWARD, "b"]},
        },
        {"name": "simcse", "bi_encoder": "org/simcse", "cross_encoder_plm": "org/bert"},
    ]
    content = plan_with(
        students=students,
        pairs=["a b.tsv", AWKWARD],
        tasks=["stsb", f"x={AWKWARD}"],
        dev="stsb.dev",
        data_dir="my data",
    )
    words = words_of(content)
    start, begin = "run/contrastive/bert", ["--recipe", "r.yaml"]
    data, dev = ["--data_dir=my data"], ["--dev=stsb.dev", "--data_dir=my data"]
    step1 = ["--model_name_or_path", AWKWARD, "--sentences", "s.txt", *dev, "--output_dir", start]
    assert words["contrastive start of bert"] == ["scripts/train_contrastive.py", *begin, *step1]
    assert "contrastive start of simcse" not in words
    tasks = [
        "--tasks",
        "stsb.dev",
        "stsb",
        f"x={AWKWARD}",
        *data,
        "--with_ensembles=True",
        "--output_dir",
        "run/start",
    ]
    assert words["measure the start"][3:] == ["--encoders", start, "org/simcse", *tasks]
    pairs = ["--pairs", "a b.tsv", AWKWARD, "--data_dir", "my data", "--drop_duplicates"]
    labels = "run/cycle-1/bi-scores.parquet"
    assert words["cycle 1: label with the bi-encoder"][3:] == [
        *("--encoders", start, "org/simcse"),
        *pairs,
        *("--output", labels),
    ]
    # A student's own options come last.
    cross = words["cycle 1: cross-encoder of bert"][3:]
    assert cross[:6] == [*dev, "--model_name_or_path", AWKWARD, "--scores", labels]
    assert cross[8:] == ["--swap", "False", "--columns", "sentence1=" + AWKWARD, "b"]
    other = words["cycle 1: cross-encoder of simcse"][3:]
    assert other[2:4] == ["--model_name_or_path", "org/bert"] and len(other) == 8


def test_a_plan_without_dev_or_data_folder_passes_neither_on():
    words = words_of(RECIPE)
    assert not any("--dev" in word or "--data_dir" in word for line in words.values() for word in line)
    assert words["measure the start"][-4:] == ["--tasks", "stsb", "--output_dir", "run/start"]


def test_several_students_are_measured_together_too():
    students = [{"name": "a", "plm": "b"}, {"name": "c", "plm": "d"}]
    for content, expected in ((RECIPE, False), (plan_with(students=students), True)):
        assert ("--with_ensembles=True" in words_of(content)["measure the start"]) == expected


def test_the_plan_of_a_run_is_read_from_its_kept_recipe(tmp_path: Path):
    keep_recipe(resolve_recipe(write_yaml(tmp_path / "r.yaml", RECIPE), {"plm": ["org/roberta"]}, 7), tmp_path / "run")
    path = str(tmp_path / "run" / "recipe.yaml")
    assert load_plan(read_recipe(path), path).students[0].plm == "org/roberta"
    assert parse_stage("distill_bi2cross", argv=[*CROSS, "--recipe", path]).seed == 7


def write_yaml(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)

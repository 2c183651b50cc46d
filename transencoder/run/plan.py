"""What the driver reads from a recipe: which models, which data, how many cycles."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transencoder.config.options import StageArguments
from transencoder.config.parsing import check_numbers
from transencoder.config.recipes import DRIVER, as_options, check_options, option_names, read_recipe
from transencoder.data.paper import check_setting
from transencoder.data.tasks import PLAIN_NAME, check_titles, expand_groups, parse_spec, split_name
from transencoder.errors import InputError, storage_error
from transencoder.run.layout import Layout
from transencoder.runtime.files import write_text
from transencoder.runtime.records import difference

ENSEMBLE = "ensemble"  # what tables call the mean of the students
LISTS = ("pairs", "tasks", "sentences", "sentences_b", "extra_pairs")  # a single name will do, too
MOST_CYCLES = 1000
TRAINING_STAGES = ("train_contrastive", "distill_bi2cross", "distill_cross2bi")


@dataclass
class Student:
    """One of the language models that are trained side by side.

    Args:
        name: used for its folders in the run.
        plm: the raw language model that the cross-encoder, and step 1, start from.
        bi_encoder: a ready bi-encoder in place of step 1.
        cross_encoder_plm: what the cross-encoder starts from, if not from `plm`.
        train_contrastive, distill_bi2cross, distill_cross2bi: options for this student only.
    """

    name: str
    plm: str | None = None
    bi_encoder: str | None = None
    cross_encoder_plm: str | None = None
    train_contrastive: dict[str, Any] = dataclasses.field(default_factory=dict)
    distill_bi2cross: dict[str, Any] = dataclasses.field(default_factory=dict)
    distill_cross2bi: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass
class OutsideTeacher:
    """Whoever scores the pairs beside the students' own encoders, in each cycle and before both distillations.

    Args:
        model: a bi- or cross-encoder: folder or Hub id.
        scores: instead of a model, a file of another tool's scores, matched to the pairs by text.
        weight: in the mean, where each student's encoder has weight 1.
        label: for a classifier with several labels, the one that counts, such as entailment.
    """

    model: str | None = None
    scores: str | None = None
    weight: float = 1.0
    label: str | None = None


@dataclass
class Plan:
    """The recipe's `run_transencoder` section.

    Args:
        students: one for self-distillation, several for mutual distillation.
        pairs: unlabelled pairs: pools (sts_sickr), files, Hub ids. Without them, pairs are mined from the sentences.
        extra_pairs, num_extra_pairs, num_training_pairs: as in score_pairs.py.
        tasks: what is measured before and after, as in evaluate_encoders.py. Without tasks and dev, nothing is.
        sentences: files or Hub ids of sentences, for step 1 and for mining.
        sentences_b: a second side, such as answers: mined pairs have a sentence of each side.
        remine: mine again in each cycle, with the bi-encoders of the cycle before.
        dev: labelled pairs that choose checkpoints and the best cycle; without them the last ones are kept.
        data_dir: folder with the paper's tasks and pools; without it they come from the Hub.
        cycles: how often cross- and bi-encoder are trained (paper: 3 for STS, 5 for binary tasks).
        student_start: where a cycle's students begin: "refresh", the raw language model and the step-1 checkpoint, or
            "carry_over", their own weights of the cycle before (ablation).
        alternate: False leaves the cross-encoder out: bi-encoders learn from bi-encoders (ablation).
        step3_labels: whose scores step 3 learns: those of the cycle's "cross" encoders, the mean of "both" kinds, or
            those that step 2 learned ("bi"). The others are for a start that is stronger than the cross-encoder.
        paper: for a student, or "ensemble", the setting of the paper's tables whose figures to show beside ours.
        teachers: further models, or files of scores, that score the pairs, too.
        stop_at: stop once a cycle's labels agree this much with those of the cycle before (Spearman, 0 to 1).
    """

    students: list[Student]
    tasks: list[str] = dataclasses.field(default_factory=list)
    pairs: list[str] | None = None
    sentences: list[str] | None = None
    sentences_b: list[str] | None = None
    remine: bool = False
    dev: str | None = None
    data_dir: str | None = None
    extra_pairs: list[str] | None = None
    num_extra_pairs: int | None = None
    num_training_pairs: int | None = None
    cycles: int = 3
    student_start: str = "refresh"
    alternate: bool = True
    step3_labels: str = "cross"
    paper: dict[str, str] = dataclasses.field(default_factory=dict)
    stop_at: float | None = None
    teachers: list[OutsideTeacher] = dataclasses.field(default_factory=list)

    @property
    def measures(self) -> bool:
        """Return whether there is anything to measure encoders on."""
        return bool(self.tasks or self.dev)

    @property
    def step1_sentences(self) -> list[str]:
        """Return the sentences of both sides."""
        return (self.sentences or []) + (self.sentences_b or [])

    @property
    def pool_words(self) -> list[str]:
        """Return the pairs and the options that go with them, as command-line words; none where pairs are mined."""
        names = ("data_dir", "num_training_pairs", "extra_pairs", "num_extra_pairs")
        return self.pairs + as_options({name: getattr(self, name) for name in names}) if self.pairs else []


def load_plan(recipe: dict[str, Any], where: str) -> Plan:
    """Build the plan of a recipe that `read_recipe` read.

    Args:
        where: how errors name the recipe.
    Raises:
        InputError: no such section, an unknown or missing key, a value of the wrong kind.
    """
    section = dict(recipe.get(DRIVER) or {})
    if not section:
        raise InputError(f"{where}: no section {DRIVER!r}")
    students = section.pop("students", None)
    if not isinstance(students, list) or not students or not all(isinstance(item, dict) for item in students):
        raise InputError(f"{where}: {DRIVER}.students must be a list of models (name, plm)")
    teachers = section.pop("teachers", None) or []
    if not isinstance(teachers, list) or not all(isinstance(item, dict) for item in teachers):
        raise InputError(f"{where}: {DRIVER}.teachers must be a list, each with a model or with scores")
    parts = {
        "students": [_build(Student, item, where) for item in students],
        "teachers": [_build(OutsideTeacher, item, where) for item in teachers],
    }
    plan = _build(Plan, {**section, **parts}, where)
    for name in LISTS:
        if isinstance(getattr(plan, name), str):
            setattr(plan, name, [getattr(plan, name)])
    _check_kinds(plan, where)
    _check_pairs(plan, where)
    plan.tasks = expand_groups(plan.tasks or [])
    if plan.dev:
        plan.dev = _named_as_dev(plan.dev)
    check_titles([*plan.tasks, *([plan.dev] if plan.dev else [])], where)
    _check_students(plan, where)
    return plan


def _check_kinds(plan: Plan, where: str) -> None:
    """Refuse a value of the wrong kind."""
    for name in LISTS:
        value = getattr(plan, name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise InputError(f"{where}: {DRIVER}.{name} must be a name or a list of names")
    words = [(name, getattr(plan, name)) for name in ("dev", "data_dir")]
    for student in plan.students:
        words += [(name, getattr(student, name)) for name in ("name", "plm", "bi_encoder", "cross_encoder_plm")]
    for teacher in plan.teachers:
        words += [(f"teachers.{name}", getattr(teacher, name)) for name in ("model", "scores", "label")]
        if bool(teacher.model) == bool(teacher.scores) or (teacher.label and not teacher.model):
            raise InputError(f"{where}: {DRIVER}.teachers: each has a model, perhaps with a label, or scores")
        if type(teacher.weight) not in (int, float) or not 0 < teacher.weight < math.inf:
            raise InputError(f"{where}: {DRIVER}.teachers.weight must be a positive number, not {teacher.weight!r}")
    for name, value in words:
        if not isinstance(value, str | None):
            raise InputError(f"{where}: {name} must be a name, not {value!r}")
    if plan.student_start not in ("refresh", "carry_over"):
        raise InputError(f"{where}: {DRIVER}.student_start must be refresh or carry_over, not {plan.student_start!r}")
    if plan.step3_labels not in ("cross", "both", "bi"):
        raise InputError(f"{where}: {DRIVER}.step3_labels must be cross, both or bi, not {plan.step3_labels!r}")
    for name in ("alternate", "remine"):
        if not isinstance(getattr(plan, name), bool):
            raise InputError(f"{where}: {DRIVER}.{name} must be true or false")
    if not isinstance(plan.paper, dict):
        raise InputError(f"{where}: {DRIVER}.paper must name a setting of the paper for each student")
    if type(plan.cycles) is not int or not 1 <= plan.cycles <= MOST_CYCLES:
        raise InputError(f"{where}: {DRIVER}.cycles must be a whole number from 1 to {MOST_CYCLES}")
    if plan.stop_at is not None and not (type(plan.stop_at) in (int, float) and 0 < plan.stop_at <= 1):
        raise InputError(f"{where}: {DRIVER}.stop_at must be a number above 0, at most 1")


def _check_pairs(plan: Plan, where: str) -> None:
    """Refuse a recipe that neither gives pairs nor lets them be mined, or half of each."""
    if not plan.pairs and not plan.sentences:
        raise InputError(f"{where}: {DRIVER} needs 'pairs', or 'sentences' to mine them from")
    of_mining = [name for name in ("sentences_b", "remine") if getattr(plan, name)]
    if plan.pairs and of_mining:
        raise InputError(f"{where}: {DRIVER}.{of_mining[0]} is for mining, which {DRIVER}.pairs leaves out")
    of_pools = [name for name in ("extra_pairs", "num_extra_pairs", "num_training_pairs") if getattr(plan, name)]
    if not plan.pairs and of_pools:
        raise InputError(f"{where}: {DRIVER}.{of_pools[0]} goes with {DRIVER}.pairs; mine_pairs has num_pairs")
    if plan.remine and plan.stop_at:
        raise InputError(f"{where}: {DRIVER}.stop_at compares the labels of the same pairs, which remine replaces")


def _check_students(plan: Plan, where: str) -> None:
    """Refuse students without what they need, or whose folders would collide."""
    names = [student.name for student in plan.students]
    if len(set(names)) < len(names) or not all(PLAIN_NAME.fullmatch(name) for name in names):
        raise InputError(f"{where}: the students' names must differ and be plain folder names: {', '.join(names)}")
    if ENSEMBLE in names:
        raise InputError(f"{where}: a student cannot be called {ENSEMBLE!r}, which is the mean of all")
    for name, setting in plan.paper.items():
        if name not in (*names, ENSEMBLE):
            raise InputError(f"{where}: {DRIVER}.paper: no student {name!r}")
        check_setting(setting, f"{where}: {DRIVER}.paper")
    for student in plan.students:
        if not (student.cross_encoder_plm or student.plm):
            raise InputError(f"{where}: student {student.name}: no plm")
        if not student.bi_encoder and not (student.plm and plan.sentences):
            raise InputError(f"{where}: student {student.name}: needs a bi_encoder, or a plm and {DRIVER}.sentences")
        for stage in TRAINING_STAGES:
            if not isinstance(getattr(student, stage), dict):
                raise InputError(f"{where}: student {student.name}: {stage} must hold options")
            check_options(getattr(student, stage), f"{where}: student {student.name}: {stage}", option_names(stage))


def _named_as_dev(spec: str) -> str:
    """Return the dev set's spec with ".dev" in its name, by which tables and the choice of the best model know it."""
    name, split, path = parse_spec(spec)
    return spec if split == "dev" or path is None else f"{name}.dev={path}"


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r} in {DRIVER}; known: {', '.join(known)}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and not values.get(name):
            raise InputError(f"{where}: {DRIVER} needs {name!r}")
    return kind(**values)


def resolve_recipe(
    path: str, models: dict[str, list[str]] | None = None, seed: int | None = None, data_dir: str | None = None
) -> dict[str, Any]:
    """Return a recipe with the driver's own flags worked in.

    Args:
        models: "plm" and "bi_encoder" -> models in place of the recipe's, each [NAME=]MODEL.
        seed: of every stage.
        data_dir: folder of the registered tasks and pools.
    """
    recipe = read_recipe(path)
    if seed is not None:
        check_numbers(StageArguments(seed=seed))
        recipe["common"] = {**recipe.get("common", {}), "seed": seed}
    if data_dir is not None:
        recipe[DRIVER] = {**recipe.get(DRIVER, {}), "data_dir": data_dir}
    for key, values in (models or {}).items():
        for value in values:
            _set_model(recipe, path, key, value)
    return recipe


def _set_model(recipe: dict[str, Any], path: str, key: str, value: str) -> None:
    """Work `--plm [NAME=]MODEL` or `--bi_encoder [NAME=]MODEL` in."""
    students = recipe.get(DRIVER, {}).get("students")
    students = [item for item in students if isinstance(item, dict)] if isinstance(students, list) else []
    name, model = split_name(value)
    chosen = [student for student in students if student.get("name") == name] if name else students
    if len(chosen) != 1:
        names = ", ".join(str(student.get("name")) for student in students)
        raise InputError(f"--{key} {value}: {path} has the students {names}; give NAME=MODEL for one of them")
    chosen[0][key] = model


def keep_recipe(recipe: dict[str, Any], folder: Path) -> None:
    """Write the resolved recipe into the run's folder, which makes the folder this recipe's.

    Raises:
        InputError: the folder is another recipe's (but for the number of cycles and where to stop, which may change).
    """
    path = Layout(folder).recipe
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: not a folder")
    if path.exists():
        before, now = (_flat(content) for content in (read_recipe(str(path)), recipe))
        changed = difference(before, now)
        if changed:
            raise InputError(f"--output_dir {folder}: holds another run's results ({changed}); choose another folder")
    elif folder.exists() and any(file != path and not file.name.startswith(".") for file in folder.iterdir()):
        raise InputError(f"--output_dir {folder}: holds files that are not this tool's; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"--output_dir {folder}"
        raise storage_error(error, where) or InputError(f"{where}: cannot be written: {error.strerror}") from error
    write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    values = {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}
    for name in ("cycles", "stop_at"):
        values.pop(f"{DRIVER}.{name}", None)
    return values

"""Everything a recipe names, read before any work begins."""

import dataclasses
from typing import Any

import datasets

from transencoder.config.arguments import LabelArguments, ScoringArguments
from transencoder.config.parsing import parse_stage
from transencoder.config.recipes import DRIVER, as_options
from transencoder.config.stages import STAGES
from transencoder.data.pools import check_both_orders, is_ordered, read_pool, sentence_pool_parts, swap_of
from transencoder.data.tables import PAIRS, join_sentences, read_pairs, without_repeats
from transencoder.data.tasks import Task, load_task
from transencoder.errors import InputError
from transencoder.model_checks import (
    ONE_SCALE,
    check_bi_encoder,
    check_cross_encoder_start,
    check_encoders,
    check_language_model,
    check_step1_teacher,
)
from transencoder.model_files import ModelOptions, model_options
from transencoder.run.estimate import Inputs
from transencoder.run.plan import TRAINING_STAGES, Plan, Student
from transencoder.runtime.accelerator import quiet_libraries, trackers
from transencoder.search.mix import Sides, parse_mix, wanted_pairs
from transencoder.selection import select_by, training_rows


def check_inputs(plan: Plan, recipe_path: str) -> Inputs:
    """Read everything the run will need, so that bad input is known before any work; it stays in the cache."""
    quiet_libraries()
    labelling = _labelling(plan, recipe_path)
    options = model_options(labelling)
    for student in plan.students:
        check_cross_encoder_start(student.cross_encoder_plm or student.plm)
        if student.bi_encoder:
            check_bi_encoder(student.bi_encoder, options)
        else:
            check_language_model(student.plm)
    _check_teachers(plan, options, labelling)
    given, parts = None, []
    if plan.pairs:
        given = read_pool(labelling, drop_duplicates=False)
        pool = without_repeats(given, list(PAIRS))
        if labelling.scores:
            from transencoder.labels import teachers_of  # its import takes seconds

            teachers_of(labelling, [], pool, _ordered(plan))  # are the files of scores about these pairs?
        pairs = len(pool)
    else:
        pairs, parts = _pairs_to_mine(plan, recipe_path)
    sentences = 0
    if any(not student.bi_encoder for student in plan.students):
        parts = sentence_pool_parts(plan.step1_sentences, plan.data_dir, labelling)
        sentences = len(join_sentences(parts, plan.step1_sentences))
    measuring = parse_stage("evaluate_encoders", argv=_stand_ins("evaluate_encoders", recipe_path, 1))
    tasks = [load_task(spec, plan.data_dir, measuring) for spec in plan.tasks]
    dev = load_task(plan.dev, plan.data_dir, labelling) if plan.dev else None
    _check_apart(dev, tasks, recipe_path)
    titles = [task.title for task in ([dev] if dev else []) + tasks]
    trained = [_check_options(student, plan, recipe_path, sentences, pairs, labelling) for student in plan.students]
    return Inputs(parts, given, pairs, titles, trained)


def _check_teachers(plan: Plan, options: ModelOptions, labelling: ScoringArguments) -> None:
    """Refuse teachers that cannot score pairs, or not on the scale of the others."""
    starts = [student.bi_encoder for student in plan.students if student.bi_encoder]
    models = [teacher.model for teacher in plan.teachers if teacher.model]
    averaged = labelling.averages([*labelling.encoders, *models])
    check_encoders(starts, options, averaged)
    for teacher in plan.teachers:
        if teacher.model:
            label = teacher.label or options.label
            check_encoders([teacher.model], dataclasses.replace(options, label=label), averaged)
    if labelling.scores:
        from transencoder.labels import check_range  # its import takes seconds

        for path in labelling.scores:
            scored = read_pairs([path], "score", labelling)
            if averaged:
                check_range(path, scored, ONE_SCALE)


def _check_apart(dev: Task | None, tasks: list[Task], recipe_path: str) -> None:
    """Refuse a dev set that is a test set under another name: checkpoints chosen on it cannot be measured on it."""
    same = [task.title for task in tasks if dev is not None and task.sha256 == dev.sha256]
    if same:
        raise InputError(
            f"--recipe {recipe_path}: the dev set {dev.title} and the task {same[0]} are the same labelled pairs; "
            "choose checkpoints on others, or leave dev out"
        )


def _check_options(
    student: Student, plan: Plan, recipe_path: str, sentences: int, pairs: int, labelling: ScoringArguments
) -> dict[str, tuple[Any, int]]:
    """Parse every stage's options as the stage will, and see that there is enough data for a batch.

    Returns:
        For each training there is: its options, and the number of its inputs.
    """
    trained = {}
    for stage in STAGES:
        words = _stand_ins(stage, recipe_path, len(plan.students)) + as_options(getattr(student, stage, {}))
        arguments = parse_stage(
            stage, argv=words + (["--dev", plan.dev] if plan.dev and stage in TRAINING_STAGES else [])
        )
        trackers(getattr(arguments, "report_to", "none"))
        if stage in TRAINING_STAGES and not (stage == "train_contrastive" and student.bi_encoder):
            select_by(arguments)
            if teacher := getattr(arguments, "teacher", None):
                check_step1_teacher(teacher)
            if isinstance(arguments, LabelArguments):
                several = [teacher.model for teacher in plan.teachers] + [labelling.lexical_weight]
                crosses = plan.alternate and plan.step3_labels != "bi" and stage == "distill_cross2bi"
                several += [crosses and labelling.both_orders, crosses and plan.step3_labels == "both"]
                arguments.check_disagreement(len(plan.students) + len(labelling.scores) + sum(map(bool, several)))
            rows = sentences if stage == "train_contrastive" else training_rows(pairs, arguments)
            rows = min(rows, getattr(arguments, "num_sentences", None) or rows)
            if stage == "distill_bi2cross":
                rows *= 2 if swap_of(arguments.swap, _ordered(plan)) else 1
            arguments.count_micro_batches(rows, 1)
            if plan.alternate or stage != "distill_bi2cross":
                trained[stage] = arguments, rows
    return trained


def _pairs_to_mine(plan: Plan, recipe_path: str) -> tuple[int, list[datasets.Dataset]]:
    """Return how many pairs are to be mined, and the sentences with their repeats; check both, and the options."""
    mining = parse_stage("mine_pairs", argv=_stand_ins("mine_pairs", recipe_path, len(plan.students)))
    check_encoders([mining.spread_by] if mining.spread_by else [], model_options(mining))
    sources = [side for side in (plan.sentences, plan.sentences_b) if side]
    parts = [sentence_pool_parts(side, plan.data_dir, mining) for side in sources]
    distinct = [join_sentences(*side) for side in zip(parts, sources, strict=True)]
    number = sum(wanted_pairs(parse_mix(mining.mix), mining.num_pairs, Sides(distinct[0], distinct[-1])))
    return number, [part for side in parts for part in side]


def _labelling(plan: Plan, recipe_path: str) -> ScoringArguments:
    """Return the options of score_pairs.py as the driver will pass them on, checked."""
    words = _stand_ins("score_pairs", recipe_path, len(plan.students))
    labelling = parse_stage("score_pairs", argv=[*words, *(["--pairs", *plan.pool_words] if plan.pairs else [])])
    check_both_orders(labelling.both_orders, _ordered(plan))
    if plan.teachers and (labelling.teacher_weights or labelling.scores):
        raise InputError(f"--recipe {recipe_path}: {DRIVER}.teachers has the weights and the files of scores itself")
    if plan.step3_labels == "both" and labelling.teacher_weights:
        raise InputError(f"--recipe {recipe_path}: {DRIVER}.step3_labels: both is a mean without teacher_weights")
    labelling.scores = labelling.scores or [teacher.scores for teacher in plan.teachers if teacher.scores]
    return labelling


def _ordered(plan: Plan) -> bool:
    """Return whether the given pairs must not be swapped."""
    return is_ordered(plan.pairs or [], plan.extra_pairs)


def _stand_ins(stage: str, recipe_path: str, students: int) -> list[str]:
    """Return words for a stage's parser with its required options in place; an encoder for each student."""
    encoders = "--encoders" + " x" * students
    required = {
        "mine_pairs": f"{encoders} --sentences x --output x",
        "score_pairs": f"{encoders} --pairs x --output x",
        "evaluate_encoders": f"{encoders} --tasks x --output_dir x",
        "train_contrastive": "--model_name_or_path x --sentences x --output_dir x",
    }
    words = required.get(stage, "--model_name_or_path x --scores x --output_dir x")
    return ["--recipe", recipe_path, *words.split()]

"""A run as a list of stages, which is all that is left to do once a recipe is checked."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transencoder.config.recipes import as_options
from transencoder.errors import InputError
from transencoder.run.layout import Layout
from transencoder.run.plan import Plan, Student
from transencoder.runtime.files import write_text


@dataclass
class Stage:
    """A script with its words.

    Args:
        title: for people.
        script: name of the script, such as "score_pairs.py".
        words: for its command line.
        output: the folder or Parquet file that it leaves.
        owner: name of the student whose stage it is; what all share is the first one's.
        cycle: 0 for the start.
    """

    title: str
    script: str
    words: list[str]
    output: str
    owner: str
    cycle: int

    def command(self, launcher: str, scripts: Path) -> str:
        """Return the line for a shell that does the same by hand. `scripts`: the folder of the scripts."""
        return f"{launcher} {shlex.join([str(scripts / self.script), *self.words])}"


def make_stages(plan: Plan, run: Path, recipe: Path, seed: int | None = None) -> list[Stage]:
    """Return the stages of a plan in the order of their doing.

    Args:
        run: folder of the run.
        recipe: the file that the stages read their options from.
        seed: in place of the recipe's.
    """
    return list(_Planner(plan, Layout(run), str(recipe), seed).stages())


class _Planner:
    """What the stages of a run have in common. Arguments as in `make_stages`."""

    def __init__(self, plan: Plan, layout: Layout, recipe: str, seed: int | None):
        self.plan, self.layout = plan, layout
        self.first = plan.students[0].name
        self.before, self.after = ["--recipe", recipe], as_options({"seed": seed})
        self.data = [f"--data_dir={plan.data_dir}"] if plan.data_dir else []
        self.dev = ([f"--dev={plan.dev}"] if plan.dev else []) + self.data
        self.pairs: list[str] = plan.pool_words
        # The newest encoders of all students.
        self.bi = [student.bi_encoder or self.encoder(0, "bi", student) for student in plan.students]
        self.cross: list[str] = []
        # Of the teachers from outside, which score the same pairs once.
        self.given: list[str] = []
        # What the students of the next cycle begin with.
        self.bi_starts = self.bi
        self.cross_starts = [student.cross_encoder_plm or student.plm or "" for student in plan.students]

    def encoder(self, cycle: int, kind: str, student: Student) -> str:
        """Return an encoder's folder."""
        return str(self.layout.encoder(cycle, kind, student.name))

    def stage(self, cycle: int, title: str, script: str, output: Path | str, words: list[str], owner: str) -> Stage:
        """Return a stage whose title says its cycle."""
        title = f"cycle {cycle}: {title}" if cycle else title
        return Stage(title, script, [*self.before, *words, *self.after], str(output), owner, cycle)

    def stages(self) -> Iterator[Stage]:
        """Yield step 1, then the cycles."""
        for student in self.plan.students:
            if not student.bi_encoder:
                yield self.step1(student)
        yield from self.measure(0, "measure the start", self.bi)
        for cycle in range(1, self.plan.cycles + 1):
            yield from self.cycle(cycle)

    def step1(self, student: Student) -> Stage:
        """Return the contrastive start of a student."""
        output = self.encoder(0, "bi", student)
        words = ["--model_name_or_path", student.plm or "", "--sentences", *self.plan.step1_sentences, *self.dev]
        words += ["--output_dir", output, *as_options(student.train_contrastive)]
        return self.stage(
            0, f"contrastive start of {student.name}", "train_contrastive.py", output, words, student.name
        )

    def cycle(self, cycle: int) -> Iterator[Stage]:
        """Yield a cycle's stages. What was trained in it is what the next one labels with."""
        plan, layout = self.plan, self.layout
        # Without pairs of its own the recipe's sentences are mined: once, or again with each better bi-encoder.
        if not plan.pairs and (cycle == 1 or plan.remine):
            output = str(layout.pairs(cycle))
            sides = as_options({"sentences": plan.sentences, "sentences_b": plan.sentences_b})
            words = ["--encoders", *self.bi, *sides, *self.data, "--output", output]
            yield self.stage(cycle, "mine pairs", "mine_pairs.py", output, words, self.first)
            self.pairs = [output]
        if cycle == 1 or plan.remine:
            yield from self.ask_teachers(cycle)
        yield self.label(cycle, "bi", self.bi)
        labels = layout.scores(cycle, "bi")
        if plan.alternate:
            yield from self.train(cycle, "cross", labels)
        if plan.alternate and plan.step3_labels != "bi":
            yield self.label(cycle, "cross", [*self.cross, *(self.bi if plan.step3_labels == "both" else [])])
            labels = layout.scores(cycle, "cross")
        yield from self.train(cycle, "bi", labels)
        if plan.student_start == "carry_over":
            self.bi_starts, self.cross_starts = self.bi, self.cross
        yield from self.measure(cycle, "measure", [*self.cross, *self.bi])

    def ask_teachers(self, cycle: int) -> Iterator[Stage]:
        """Yield the scoring of the pairs with each encoder that is no student's."""
        self.given = []
        for number, teacher in enumerate(self.plan.teachers, start=1):
            if teacher.model is None:
                self.given.append(teacher.scores)
                continue
            output = str(self.layout.teacher_scores(cycle, number, teacher.model))
            words = ["--encoders", teacher.model, "--pairs", *self.pairs, "--drop_duplicates", "--output", output]
            alone = {"label": teacher.label, "teacher_weights": 1, "teacher_scale": "none", "lexical_weight": 0.0}
            title = f"label with {Path(teacher.model).name}"
            yield self.stage(cycle, title, "score_pairs.py", output, [*words, *as_options(alone)], self.first)
            self.given.append(output)

    def label(self, cycle: int, kind: str, encoders: list[str]) -> Stage:
        """Return the scoring of the pairs with the mean of the encoders and of the teachers from outside."""
        output = str(self.layout.scores(cycle, kind))
        words = ["--encoders", *encoders, "--pairs", *self.pairs, "--drop_duplicates", "--output", output]
        if self.given:
            weights = [1.0] * len(encoders) + [float(teacher.weight) for teacher in self.plan.teachers]
            words += as_options({"scores": self.given, "teacher_weights": weights})
        return self.stage(cycle, f"label with the {kind}-encoder", "score_pairs.py", output, words, self.first)

    def train(self, cycle: int, kind: str, labels: Path) -> Iterator[Stage]:
        """Yield step 2 or 3 of every student."""
        made = [self.encoder(cycle, kind, student) for student in self.plan.students]
        starts = self.bi_starts if kind == "bi" else self.cross_starts
        script = "distill_bi2cross.py" if kind == "cross" else "distill_cross2bi.py"
        for student, start, output in zip(self.plan.students, starts, made, strict=True):
            options = student.distill_bi2cross if kind == "cross" else student.distill_cross2bi
            words = [*self.dev, "--model_name_or_path", start, "--scores", str(labels)]
            words += ["--output_dir", output, *as_options(options)]
            yield self.stage(cycle, f"{kind}-encoder of {student.name}", script, output, words, student.name)
        if kind == "bi":
            self.bi = made
        else:
            self.cross = made

    def measure(self, cycle: int, title: str, encoders: list[str]) -> Iterator[Stage]:
        """Yield the encoders' tables, where the recipe names anything to measure them on."""
        if not self.plan.measures:
            return
        output = self.layout.cycle(cycle)
        tasks = ([self.plan.dev] if self.plan.dev else []) + self.plan.tasks
        ensembles = ["--with_ensembles=True"] if len(self.plan.students) > 1 else []
        words = ["--encoders", *encoders, "--tasks", *tasks, *self.data, *ensembles, "--output_dir", str(output)]
        yield self.stage(cycle, title, "evaluate_encoders.py", output, words, self.first)


def write_stages(stages: list[Stage], path: Path) -> None:
    """Write one JSON line a stage."""
    lines = (json.dumps(dataclasses.asdict(stage), ensure_ascii=False) + "\n" for stage in stages)
    write_text(path, "".join(lines))


def read_stages(path: Path) -> list[Stage]:
    """Read what `write_stages` wrote.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    try:
        return [Stage(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a plan of run_transencoder.sh ({error}); start it again") from error

"""Every path inside a run's folder, spelled here and nowhere else.

recipe.yaml plan.jsonl                               what is run
contrastive/STUDENT/                                 step 1
start/{results.json,pair-scores.parquet}             what the start measures
cycle-N/pairs.parquet                                mined pairs
cycle-N/teacher-scores/NUMBER-NAME.parquet           scores of a model that is no student's
cycle-N/{bi,cross}-scores.parquet                    labels
cycle-N/{cross,bi}-encoder/STUDENT/                  steps 2 and 3
cycle-N/{results.json,pair-scores.parquet}           what the cycle measures
best/{bi,cross}-encoder/ best/search.json            the models that it ends with; last/ where no dev set chose them
results.md results.json progress.png to_label.tsv    the summary
"""

from dataclasses import dataclass
from pathlib import Path

from transencoder.runtime.records import PAIR_SCORES_FILE, RESULTS_FILE

RECIPE_FILE = "recipe.yaml"
SEARCH_FILE = "search.json"  # beside the encoders that a run ends with: what search.py should rank by


def encoder_place(cycle: int, kind: str, student: str) -> str:
    """Return an encoder's folder relative to the run's; cycle 0 is the start. `kind` is "bi" or "cross"."""
    return f"cycle-{cycle}/{kind}-encoder/{student}" if cycle else f"contrastive/{student}"


@dataclass(frozen=True)
class Layout:
    """The paths inside the folder `run`."""

    run: Path

    @property
    def recipe(self) -> Path:
        """Return the resolved recipe; with it a folder is a run."""
        return self.run / RECIPE_FILE

    @property
    def plan(self) -> Path:
        """Return the list of stages, one JSON line each."""
        return self.run / "plan.jsonl"

    @property
    def table(self) -> Path:
        """Return the summary's table."""
        return self.run / "results.md"

    @property
    def summary(self) -> Path:
        """Return the summary as JSON, the verdict first."""
        return self.run / RESULTS_FILE

    @property
    def to_label(self) -> Path:
        """Return the pairs whose labels would say whether the end is better than the start."""
        return self.run / "to_label.tsv"

    @property
    def plot(self) -> Path:
        """Return the summary's plot."""
        return self.run / "progress.png"

    def cycle(self, cycle: int) -> Path:
        """Return a cycle's folder; 0 is the start."""
        return self.run / (f"cycle-{cycle}" if cycle else "start")

    def encoder(self, cycle: int, kind: str, student: str) -> Path:
        """Return the folder of an encoder that a cycle, or step 1 (cycle 0), makes."""
        return self.run / encoder_place(cycle, kind, student)

    def pairs(self, cycle: int) -> Path:
        """Return the pairs that a cycle mines."""
        return self.cycle(cycle) / "pairs.parquet"

    def scores(self, cycle: int, kind: str) -> Path:
        """Return the labels that the encoders of a kind make in a cycle."""
        return self.cycle(cycle) / f"{kind}-scores.parquet"

    def teacher_scores(self, cycle: int, number: int, model: str) -> Path:
        """Return the scores of a teacher from outside, of the pairs that a cycle begins to train on."""
        return self.cycle(cycle) / "teacher-scores" / f"{number}-{Path(model).name}.parquet"

    def results(self, cycle: int) -> Path:
        """Return what a cycle's encoders measure."""
        return self.cycle(cycle) / RESULTS_FILE

    def pair_scores(self, cycle: int) -> Path:
        """Return the scores of the pairs that a cycle's results come from."""
        return self.cycle(cycle) / PAIR_SCORES_FILE

    def final(self, chosen: bool) -> Path:
        """Return the folder of the encoders that a run ends with: the best on dev, or the last where there is none."""
        return self.run / ("best" if chosen else "last")

    def outcome(self, student: str | None) -> Path:
        """Return where run_stages.py tells the driver what to do next, and students one another that they failed."""
        return self.run / (f".outcome-{student}" if student else ".outcome")

    def checksums(self, student: str | None) -> Path:
        """Return where run_stages.py notes what is in the files that the stages made."""
        return self.run / (f".checksums-{student}" if student else ".checksums")

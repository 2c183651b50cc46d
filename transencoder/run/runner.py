"""The stages of a run, one after another in one process group, on every process of it."""

import gc
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list

from transencoder.errors import BrokenRun, FullDisk, InputError
from transencoder.run.completion import Checksums, is_complete, label_agreement, tidy
from transencoder.run.layout import Layout
from transencoder.run.plan import Plan
from transencoder.run.stages import Stage
from transencoder.runtime.accelerator import log
from transencoder.runtime.files import write_text
from transencoder.runtime.locks import lock
from transencoder.runtime.records import HUB_COMMITS
from transencoder.runtime.signals import EXIT_CODE, StopSignal

POLL = 2.0  # seconds between two looks at what another student makes


@dataclass
class Step:
    """What all processes do next, as the main one decides.

    Args:
        kind: run a stage; look again, where another student's output is waited for; end; end with an error.
        stage: which.
        overwrite: whether it replaces what an earlier run left.
        outcome: of the end.
        error: what went wrong.
    """

    kind: Literal["stage", "wait", "end", "error"]
    stage: Stage | None = None
    overwrite: bool = False
    outcome: str = ""
    error: str = ""


class Runner:
    """Does what is not done yet of the run in a folder.

    Args:
        run: the folder.
        stages, plan: what is to be done, and what the recipe says.
        call: runs a stage's script with such words, in this process.
        state: of the connected processes.
        student: name of the one student whose stages are done here; None for all.
        patience: seconds to wait for another student's output.
        push: the command that pushes what is finished, to be run beside the work; None where nothing is pushed.
        remade: so many stages at the beginning are behind, and the rest is made anew, since the last of them was.
        once: end after one stage, where a process cannot do more.
    """

    def __init__(
        self,
        run: Path,
        stages: list[Stage],
        plan: Plan,
        call: Callable[[Stage, list[str]], None],
        state: PartialState,
        student: str | None = None,
        patience: float = 86400,
        push: list[str] | None = None,
        remade: int = 0,
        once: bool = False,
    ):
        self.layout, self.stages, self.plan, self.call, self.state = Layout(run), stages, plan, call, state
        self.student, self.patience, self.push = student, patience, push
        self.is_first_student = student in (None, plan.students[0].name)
        self.total, self.place, self.remade = len(stages), remade, remade > 0
        self.once, self.did_one = once, False
        self.checksums, self.made = Checksums(run, self.layout.checksums(student)), None
        self.waits_since: float | None = None
        self.pusher: subprocess.Popen | None = None

    def run(self) -> None:
        """Do all stages, and tell the driver by the file `Layout.outcome` how to go on.

        Raises:
            SystemExit: a stage failed, or a signal ended the work.
            BrokenRun: another student failed, or was waited for too long.
        """
        try:
            outcome = self.do_stages()
        except (SystemExit, BrokenRun) as end:
            with suppress(FullDisk):  # the disk may be why it ended; the driver takes no word for "failed"
                self.tell("stopped" if getattr(end, "code", None) == EXIT_CODE else "failed")
            raise
        self.tell(outcome)

    def tell(self, outcome: str) -> None:
        """Write the outcome, from the main process."""
        if self.state.is_main_process:
            write_text(self.layout.outcome(self.student), outcome + "\n")

    def do_stages(self) -> str:
        """Do all stages, or one; return the outcome: "summarize", "nothing" or "again" and a number.

        Every process makes the steps that the main one decides, since only that one looks at the folder.
        """
        with StopSignal() as stop:
            while True:
                if stop.on_any_process(self.state):
                    raise SystemExit(EXIT_CODE)
                step = self.decide() if self.state.is_main_process else None
                (step,) = broadcast_object_list([step])
                if step.kind == "error":
                    raise BrokenRun(step.error)
                if step.kind == "end":
                    return step.outcome
                if step.kind == "stage":
                    self.do(step)

    def decide(self) -> Step:
        """Return the next step; on the main process only."""
        try:
            lock(self.layout.run / (self.student or ""))  # a launch whose driver was killed goes on by itself
            if self.made:
                self.checksums.add(self.made)
                self.made = None
            while self.place < len(self.stages):
                stage, output = self.stages[self.place], Path(self.stages[self.place].output)
                if self.student not in (None, stage.owner):
                    if not self.is_there(stage):
                        return Step("wait")
                elif self.once and self.did_one:
                    log("The next stage has a launch of its own: FSDP and DeepSpeed are set up once in a process.")
                    return Step("end", outcome=f"again {self.place}")
                elif self.remade or not is_complete(output):
                    self.checksums.forget(output)
                    return Step("stage", stage, overwrite=self.remade and output.exists())
                elif self.checksums.check(output):
                    self.say(f"{stage.title}: again, as what it was made from was made anew")
                    self.checksums.forget(output)
                    return Step("stage", stage, overwrite=True)
                else:
                    self.say(f"{stage.title}: done before")
                    tidy(output)
                self.advance()
        except (InputError, BrokenRun) as error:
            return Step("error", error=str(error))
        return Step("end", outcome="summarize" if self.is_first_student else "nothing")

    def is_there(self, stage: Stage) -> bool:
        """Look for another student's output, for `POLL` seconds where it is not there yet.

        Raises:
            BrokenRun: that student failed, or has had `patience` seconds.
        """
        if stage.script == "evaluate_encoders.py" or is_complete(Path(stage.output)):  # nothing is made from a table
            return True
        if self.waits_since is None:
            self.waits_since = time.monotonic()
            self.say(f"{stage.title}: waiting for {stage.owner}")
        mark = self.layout.outcome(stage.owner)
        if mark.is_file() and mark.read_text().strip() == "failed":
            raise BrokenRun(f"'{stage.title}' failed at {stage.owner}; start both again")
        if time.monotonic() - self.waits_since >= self.patience:
            raise BrokenRun(f"no '{stage.title}' from {stage.owner} in {self.patience:.0f} s (--patience)")
        time.sleep(POLL)
        return False

    def advance(self) -> None:
        """Pass a stage that is done: push a cycle that is through, and end the loop where a cycle adds nothing."""
        stage = self.stages[self.place]
        self.place, self.waits_since = self.place + 1, None
        if self.adds_nothing(stage):
            del self.stages[self.place :]
        elif self.place < len(self.stages) and self.stages[self.place].cycle > stage.cycle:
            self.start_push()

    def adds_nothing(self, stage: Stage) -> bool:
        """Return whether a stage's output are a cycle's labels and, but for `stop_at`, those of the cycle before."""
        stop_at, cycle = self.plan.stop_at, stage.cycle
        if stop_at is None or stage.output != str(self.layout.scores(cycle, "bi")):
            return False
        agreement = label_agreement(self.layout.run, cycle)
        ends = agreement >= stop_at
        if ends:
            what = f"The labels of cycle {cycle} agree with those of cycle {cycle - 1} by {agreement}"
            log(f"{what} (stop_at {stop_at}): the loop ends.")
        return ends

    def start_push(self) -> None:
        """Push what is finished in a process of its own, so that no network costs the run anything.

        What one push leaves out the next makes up for.
        """
        if self.push and self.is_first_student and (self.pusher is None or self.pusher.poll() is not None):
            self.pusher = subprocess.Popen(self.push, stdin=subprocess.DEVNULL)

    def do(self, step: Step) -> None:
        """Run a stage on this process, and free what it took.

        Raises:
            SystemExit: it failed, or a signal stopped it.
        """
        stage, began = step.stage, time.monotonic()
        self.say(stage.title)
        try:
            self.call(stage, [*stage.words, *(["--overwrite"] if step.overwrite else [])])
        except SystemExit as end:
            if end.code:
                self.complain(stage, end.code)
                raise
        except Exception as error:
            traceback.print_exc()
            self.complain(stage, 1)
            raise SystemExit(1) from error
        free_stage()
        if self.state.is_main_process:
            self.say(f"{stage.title}: {time.monotonic() - began:.0f} s")
            self.did_one = self.remade = True  # what comes after was made from what is now made anew
            self.made = Path(stage.output)
            self.advance()

    def complain(self, stage: Stage, code: object) -> None:
        """Say that a stage failed, unless a signal stopped it."""
        if code != EXIT_CODE:
            log(f"run_stages.py: '{stage.title}' failed (see above). The same command again goes on from here.")

    def say(self, message: str) -> None:
        """Log a line with the number of the stage."""
        log(f"[{self.place + 1}/{self.total}] {message}")


def free_stage() -> None:
    """Free what a stage leaves in this process: its model, Accelerate's state, the commits of the data it read."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    HUB_COMMITS.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

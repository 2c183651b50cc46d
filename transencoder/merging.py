"""Merge a trained bi-encoder with its start, weight by weight, which undoes much of what training lost.

(1 - a) x start + a x student, where a comes from labelled pairs, from agreement with the teachers, or is given.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from transencoder.config.arguments import Cross2BiArguments
from transencoder.data.tasks import Task
from transencoder.encoders import load_bi_encoder
from transencoder.evaluation import DevSet, shown_value
from transencoder.inference import Inference
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log
from transencoder.runtime.files import replacing
from transencoder.runtime.records import place

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the student; a tie goes to the one that is nearer to the start


def merge_with_start(arguments: Cross2BiArguments, trained: Path, task: Task | None, inference: Inference) -> dict:
    """Replace the student in `arguments.output_dir` by its mixture with the model that it started from.

    The student is read where the training keeps it, so that doing this again after a kill gives the same.

    Args:
        arguments: with merge_with_start, "dev" or "agreement" or the student's share.
        trained: folder of the student, among the checkpoints.
        task: the pairs that choose; None where the share is given.
    Returns:
        For run.json: the student's share, what chose it, and the metric x 100 of every share that was tried.
    """
    names, folder = (arguments.model_name_or_path, str(trained)), trained.with_name("merged")
    start, student = (load_bi_encoder(name, model_options(arguments)) for name in names)
    weights = start.state_dict(), {name: value.clone() for name, value in student.state_dict().items()}
    student.to(inference.accelerator.device)
    how: dict[str, Any] = {"share": arguments.merge_with_start}
    if task is not None:
        measured = DevSet(task, student, inference.accelerator, inference.batch_tokens)
        tried = {}
        for share in SHARES:
            student.load_state_dict(mixed(*weights, share))
            tried[share] = measured.score(student)
        share = max(tried, key=lambda share: -math.inf if tried[share] is None else tried[share])
        how = {"share": share, "by": arguments.merge_with_start, "metric": measured.metric, "tried": tried}
    shown = [f"{measured.metric} {shown_value(value)} at {share:g}" for share, value in how.get("tried", {}).items()]
    log(f"Merged with the start: student's share {how['share']:g}" + (f" ({', '.join(shown)})" if shown else ""))
    if inference.accelerator.is_main_process:
        with replacing(folder) as temporary:
            student.save_pretrained(temporary, mixed(*weights, how["share"]))
        place(folder, Path(arguments.output_dir))
        shutil.rmtree(folder)
    inference.accelerator.wait_for_everyone()
    return {"merged_with_start": how}


def mixed(start: dict[str, torch.Tensor], student: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Return (1 - share) x start + share x student in float32; exactly one of them at 0 and at 1."""
    return {
        name: torch.lerp(start[name].float(), value.float(), share) if value.is_floating_point() else value
        for name, value in student.items()
    }

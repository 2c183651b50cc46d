"""What a run has to work with and roughly what it will take, said before it begins."""

import math
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from transencoder.data.tables import PAIRS, sample, sides, without_repeats
from transencoder.model_files import model_options, prompts_of, read_config, read_modules, root_of
from transencoder.run.plan import Plan
from transencoder.runtime.backends import cpu_computes_bf16, cpu_cores

SAMPLED = 2000  # sentences, or pairs, that are tokenized
CORE, BF16_CORE, GPU = 2e10, 6e10, 5e13  # operations a second that are taken for granted
STEP = 0.01  # seconds that a training step takes however small the model
FORWARD, TRAINED = 2, 6  # operations for each parameter and token
UNITS = ((1440, "day"), (60, "hour"), (1, "minute"))
BYTES, STATES = 4, 3  # of a weight; a checkpoint has it and two numbers of AdamW


@dataclass
class Inputs:
    """What a recipe names, as `check_inputs` read it.

    Args:
        sentences: with their exact repeats; none where they are not read.
        pairs: the same; None where they are to be mined.
        num_pairs: distinct ones, or those to be mined.
        tasks: titles of what is measured.
        trained: for each student, training stage -> its options and the number of its inputs.
    """

    sentences: list[datasets.Dataset]
    pairs: datasets.Dataset | None
    num_pairs: int
    tasks: list[str]
    trained: list[dict[str, tuple[Any, int]]]


def describe(plan: Plan, inputs: Inputs, seeds: int) -> list[str]:
    """Return lines about the data and what is cut of them, and about time, disk and measurement of so many runs."""
    both = datasets.concatenate_datasets(inputs.sentences or sides(inputs.pairs))
    texts, pairs, number = without_repeats(both), inputs.pairs, inputs.num_pairs
    lines = [_count("Sentences", len(texts), len(both))] if inputs.sentences else []
    lines.append(f"Pairs: {number}, to be mined" if pairs is None else _count("Pairs", number, len(pairs)))
    some = sample(texts, SAMPLED, seed=0)["sentence"][:]
    sampled = sample(pairs, SAMPLED, seed=0) if pairs else dict(zip(PAIRS, (some, some[::-1]), strict=True))
    what = "pairs" if pairs else "random pairs"
    work, steps, models, disk, largest = 0.0, 0.0, 0, 0, 0
    for student, trained in zip(plan.students, inputs.trained, strict=True):
        for stage, (arguments, rows) in trained.items():
            step1, cross = stage == "train_contrastive", stage == "distill_bi2cross"
            times, labelled = (1, 0) if step1 else (plan.cycles, number)
            name = (student.cross_encoder_plm if cross else student.bi_encoder) or student.plm
            prompt = "" if cross else prompts_of(name, model_options(arguments))[0] or ""
            columns = [sampled[side][:] for side in PAIRS] if cross else [[prompt + text for text in some]]
            lengths, longest = _lengths(name, columns), arguments.max_length
            share = f"{(lengths > longest).sum()} of {len(lengths)} {what if cross else 'sentences'}"
            lines.append(f"Cut at {longest} tokens: {share} ({stage}, student {student.name})")
            size, weights = _parameters(name)
            batch = arguments.total_batch_size
            seen = min(rows * arguments.num_epochs, batch * (arguments.max_steps or math.inf))
            tokens = np.minimum(lengths, longest).mean() * (1 if cross else 2)  # two views, or two sentences
            work += times * weights * tokens * (TRAINED * seen + FORWARD * labelled)
            steps, models, disk = steps + times * seen / batch, models + times, disk + times * BYTES * size
            largest = max(largest, arguments.checkpoints_total_limit * STATES * BYTES * size)
    cores, core = cpu_cores(), BF16_CORE if cpu_computes_bf16() else CORE
    cpu, gpu = (_duration(seeds * (work / speed + steps * STEP)) for speed in (cores * core, GPU))
    rates = f"at {core / 1e9:.0f} GFLOP/s a core, and {GPU / 1e12:.0f} TFLOP/s"
    lines.append(f"Time, very rough: {cpu} on {cores} CPU core{'s' * (cores > 1)}, {gpu} on a GPU ({rates})")
    size = _one_digit((seeds * disk + largest) / 1e9)
    lines.append(f"Disk, rough: {size} GB, for {seeds * models} models, and checkpoints while one is trained")
    nothing = "Nothing will be measured: the recipe names neither tasks nor dev"
    return [*lines, f"Measured: {', '.join(inputs.tasks)}" if inputs.tasks else nothing]


def _count(what: str, distinct: int, rows: int) -> str:
    return f"{what}: {distinct} (exact repeats left out: {rows - distinct})"


def _lengths(name: str, columns: list[list[str]]) -> np.ndarray:
    """Return the tokens of each text, or pair, before any is cut: int64 [rows]."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, subfolder=root_of(read_modules(name)))
    return np.array([len(tokens) for tokens in tokenizer(*columns, verbose=False)["input_ids"]])


def _parameters(name: str) -> tuple[int, int]:
    """Return the parameters of a language model, and how many of them every token is multiplied with."""
    with torch.device("meta"):
        model = AutoModel.from_config(read_config(name))
    size = sum(parameter.numel() for parameter in model.parameters())
    return size, size - model.get_input_embeddings().weight.numel()


def _duration(seconds: float) -> str:
    """Return 100 as "2 minutes"; less than a minute as one."""
    minutes = max(seconds / 60, 1)
    unit, name = next((unit, name) for unit, name in UNITS if minutes >= unit)
    count = _one_digit(minutes / unit)
    return f"{count} {name}{'s' * (count != '1')}"


def _one_digit(number: float) -> str:
    """Return 104 as "100": more digits than one are not known."""
    return f"{float(f'{number:.1g}'):g}"

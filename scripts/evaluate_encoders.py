#!/usr/bin/env python3
r"""Measure encoders, or an ensemble of them, on labelled pairs: Spearman and Pearson, or AUC, all x 100.

accelerate launch scripts/evaluate_encoders.py --encoders runs/bert/contrastive runs/bert/best/bi-encoder \
    --tasks stsb sts16 mine=pairs.test.tsv --data_dir data --output_dir runs/bert/evaluation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "evaluate_encoders"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

import numpy as np

from transencoder.config.parsing import parse_stage
from transencoder.data.paper import check_setting
from transencoder.data.pools import input_files
from transencoder.data.tasks import expand_groups, load_task
from transencoder.errors import one_line_errors
from transencoder.evaluation import encoder_groups, log_table, markdown_table, origin, result_entries, result_rows
from transencoder.inference import Inference
from transencoder.model_checks import check_encoders, inspect_encoder
from transencoder.model_files import model_options
from transencoder.run.layout import RESULTS_FILE
from transencoder.runtime.accelerator import end, log, start, start_trackers
from transencoder.runtime.files import write_json, write_text
from transencoder.runtime.records import claim, write_run
from transencoder.scoring import Teachers


@one_line_errors
def main(words: list[str] | None = None) -> None:
    arguments = parse_stage(STAGE, __doc__, words)
    output = Path(arguments.output_dir)
    if claim(arguments, STAGE, input_files(arguments), result=RESULTS_FILE):
        return log(f"{output / RESULTS_FILE} is complete already")
    accelerator = start(arguments)

    options = model_options(arguments)
    check_encoders(arguments.encoders, options)
    if arguments.paper:
        check_setting(arguments.paper, "--paper")
    tasks = [load_task(spec, arguments.data_dir, arguments.columns) for spec in expand_groups(arguments.tasks)]
    write_run(arguments, STAGE, "running", input_files(arguments))

    sets = [task.pairs for task in tasks]
    inference = Inference(accelerator, arguments.eval_batch_tokens)
    scores = [Teachers([name], options=options).score(sets, inference) for name in arguments.encoders]
    kinds = [inspect_encoder(name) for name in arguments.encoders]
    results = []
    for group in encoder_groups(kinds, arguments.ensemble, arguments.with_ensembles):
        for place, task in enumerate(tasks):
            mean = np.mean([scores[encoder][place] for encoder in group], axis=0)
            results += result_entries([arguments.encoders[encoder] for encoder in group], task, mean)
    header, rows = result_rows(results, arguments.paper)
    start_trackers(accelerator, arguments)
    log_table(accelerator, "results", header, rows)
    for entry in results:
        name = f"{'+'.join(entry['encoders'])}/{entry['task']}.{entry['split']}/{entry['metric']}"
        accelerator.log({name: entry["value"]})
    if accelerator.is_main_process:
        write_json(output / RESULTS_FILE, results)
        text = f"{markdown_table(header, rows)}\n{origin(results)}"
        write_text(output / "results.md", text)
        write_run(arguments, STAGE, "complete", input_files(arguments), world_size=accelerator.num_processes)
        print(text)
        log(f"{output}: {RESULTS_FILE}, results.md")
    end(accelerator)


if __name__ == "__main__":
    main()

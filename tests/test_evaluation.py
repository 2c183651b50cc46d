"""Metrics, tasks, tables, and the summary of a run."""

import gzip
import json
import math
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from conftest import random_pairs, write_jsonl
from scipy import stats

from transencoder.config.options import Reading
from transencoder.data import paper
from transencoder.data.tasks import TASKS, Task, load_task, load_tasks
from transencoder.encoders import load_cross_encoder
from transencoder.errors import InputError
from transencoder.evaluation import (
    AUC,
    METRICS,
    Metric,
    Pearson,
    ScipyMetric,
    Spearman,
    encoder_groups,
    markdown_table,
    measure,
    result_entries,
    results_table,
    shown_value,
)
from transencoder.hub.card import eval_result
from transencoder.run import summary
from transencoder.run.summary import Round, best_round, collect_rounds, dev_of, keep_best, plot_progress, summary_table
from transencoder.run.verdict import Gain
from transencoder.runtime.records import code_version

# --- metrics ---------------------------------------------------------------------------------------------------------


def compute(metric: type, scores: list[float], gold: list[float]) -> float:
    (value,) = metric(keep_in_memory=True).compute(predictions=scores, references=gold).values()
    return value


@pytest.mark.parametrize(
    ("scores", "gold", "expected"),
    [
        ([0.1, 0.2, 0.9], [1, 4, 5], 100),  # the order is all that counts
        ([0.9, 0.2, 0.1], [1, 4, 5], -100),
        # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 (1 + 1 + 1 + 1) / (4 * 15) = 0.6
        ([0.1, 0.2, 0.3, 0.4], [2, 1, 4, 3], 60),
        # Ties share the mean rank: 1.5 1.5 3 against 1 2 3. Deviations -0.5 -0.5 1 and -1 0 1:
        # (0.5 + 1) / sqrt(1.5 * 2) = 0.866025
        ([0.5, 0.5, 0.7], [1, 2, 3], 86.6025),
    ],
)
def test_spearman(scores, gold, expected):
    assert compute(Spearman, scores, gold) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("scores", "gold", "expected"),
    [
        ([0.1, 0.2, 0.3], [1, 2, 3], 100),
        # Deviations -1 0 1 and -2 1 1: (2 + 1) / sqrt(2 * 6) = 0.866025
        ([1, 2, 3], [1, 4, 4], 86.6025),
        # Deviations -1 0 1 and 1 -2 1: 0
        ([1, 2, 3], [4, 1, 4], 0),
    ],
)
def test_pearson(scores, gold, expected):
    assert compute(Pearson, scores, gold) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("metric", [Spearman, Pearson])
@pytest.mark.parametrize(("scores", "gold"), [([0.5, 0.5, 0.5], [1, 2, 3]), ([1, 2, 3], [4, 4, 4])])
def test_a_correlation_with_a_constant_is_not_a_number(metric, scores, gold, recwarn):
    assert math.isnan(compute(metric, scores, gold))
    assert not [warning for warning in recwarn if "constant" in str(warning.message).lower()]


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 100),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 0),
        # Positives 0.2 and 0.9, negatives 0.1, 0.3, 0.4: 0.2 is above one of three, 0.9 above three: 4 of 6
        ([0.2, 0.1, 0.3, 0.9, 0.4], [1, 0, 0, 1, 0], 66.6667),
        # Positives 0.5 and 0.9, negatives 0.5 and 0.1: a tie counts half: (0.5 + 1 + 1 + 1) / 4
        ([0.5, 0.9, 0.5, 0.1], [1, 1, 0, 0], 87.5),
        ([0.3, 0.3, 0.3], [0, 1, 1], 50),
    ],
)
def test_auc(scores, labels, expected):
    assert compute(AUC, scores, labels) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("label", [0, 1])
def test_auc_of_one_label_only_is_not_a_number(label):
    assert math.isnan(compute(AUC, [0.1, 0.2], [label, label]))


def test_float32_scores_are_measured_without_new_ties():
    scores = np.nextafter(np.float32(1), np.float32(0), dtype=np.float32) - np.arange(4, dtype=np.float32) * 2**-24
    assert len(set(scores.tolist())) == 4
    assert measure(make_task(4, "score"), scores)["spearman"] == pytest.approx(-100)


def make_task(count: int, gold: str, name: str = "mine", split: str = "test") -> Task:
    values = [float(i % 2) if gold == "label" else float(i) for i in range(count)]
    columns = {
        "sentence1": [f"a{i}" for i in range(count)],
        "sentence2": [f"b{i}" for i in range(count)],
        gold: values,
    }
    return Task(name, split, datasets.Dataset.from_dict(columns), gold)


def test_graded_pairs_are_measured_by_correlations_and_labelled_ones_by_auc():
    assert measure(make_task(3, "score"), np.array([1.0, 2.0, 3.0])) == pytest.approx(
        {"spearman": 100, "pearson": 100}
    )
    assert measure(make_task(3, "label"), np.array([1.0, 2.0, 3.0])) == pytest.approx({"auc": 50})


def test_what_is_not_defined_is_none():
    constant = np.full(3, 0.5, dtype=np.float32)
    assert measure(make_task(3, "score"), constant) == {"spearman": None, "pearson": None}
    assert measure(make_task(1, "label"), constant[:1]) == {"auc": None}
    assert measure(make_task(3, "label"), constant) == pytest.approx({"auc": 50})
    assert (shown_value(None), shown_value(0.0), shown_value(80.126)) == ("-", "0.00", "80.13")


def test_metrics_need_no_network(monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert compute(Spearman, [1, 2, 3], [1, 2, 3]) == pytest.approx(100)
    assert compute(AUC, [1, 2, 3], [0, 1, 1]) == pytest.approx(100)


# --- tables ----------------------------------------------------------------------------------------------------------


class Kendall(ScipyMetric):
    """Kendall's tau x 100."""

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"kendall": 100 * float(stats.kendalltau(predictions, references).statistic)}


def test_a_new_metric_is_an_entry_in_its_registry_and_nothing_else(monkeypatch):
    """It is measured, and a card names it; the primary metric stays."""
    monkeypatch.setitem(METRICS, "kendall", Metric(Kendall, "score", "kendalltau", "Kendall's tau x 100"))
    task = make_task(3, "score")
    # Of three pairs of values two are in order: (2 - 1) / 3
    values = measure(task, np.array([1.0, 3.0, 2.0]))
    assert values["kendall"] == pytest.approx(100 / 3)
    assert next(iter(values)) == "spearman"
    entry = dict(task="mine", split="test", metric="kendall", value=values["kendall"])
    result = eval_result(entry)
    assert (result.metric_type, result.metric_name) == ("kendalltau", "Kendall's tau x 100")
    assert result.task_type == "semantic-similarity"


def entry(
    encoders: list[str], task: str, metric: str, value: float | None, split: str = "test", kind: str = "bi"
) -> dict:
    return dict(encoders=encoders, kind=kind, task=task, split=split, n=10, metric=metric, value=value)


def test_result_entries_say_what_was_measured_on_what(tiny_bert, tmp_path):
    cross = tmp_path / "cross"
    cross.mkdir()
    load_cross_encoder(str(tiny_bert)).save_pretrained(cross)
    scores = np.array([3.0, 2.0, 1.0])
    names = [str(tiny_bert), str(cross)]
    entries = result_entries(names, make_task(3, "score", "stsb", "dev"), scores)
    shared = dict(encoders=names, kind="bi+cross", task="stsb", split="dev", n=3)
    assert [(e["metric"], e["value"]) for e in entries] == [
        ("spearman", pytest.approx(-100)),
        ("pearson", pytest.approx(-100)),
    ]
    assert all({key: e[key] for key in shared} == shared for e in entries)
    assert json.loads(json.dumps(entries)) == entries
    collapsed = result_entries(names[:1], make_task(3, "score"), np.ones(3))
    assert [e["value"] for e in collapsed] == [None, None]
    assert "NaN" not in json.dumps(collapsed)
    (auc,) = result_entries(names[:1], make_task(4, "label"), np.array([0.0, 1.0, 0.0, 1.0]))
    expected = dict(encoders=names[:1], kind="bi", task="mine", split="test", n=4, metric="auc", value=100.0)
    assert auc == expected | {"code": code_version(), "data_sha256": make_task(4, "label").sha256}


def test_the_results_table_shows_primary_metrics_and_their_mean():
    results = [
        entry(["a"], "stsb", "spearman", 80.126),
        entry(["a"], "stsb", "pearson", 1.0),
        entry(["a"], "stsb", "spearman", 70.0, split="dev"),
        entry(["a"], "sickr", "spearman", 60.0),
        entry(["b", "c"], "stsb", "spearman", 50.0),
        entry(["b", "c"], "sickr", "spearman", 40.0),
    ]
    assert results_table(results).splitlines() == [
        "| encoder | stsb | stsb.dev | sickr | mean of tests |",
        "| :--- | ---: | ---: | ---: | ---: |",
        "| a | 80.13 | 70.00 | 60.00 | 70.06 |",
        "| b + c | 50.00 | - | 40.00 | 45.00 |",
    ]


def test_a_name_with_a_bar_or_a_line_end_is_one_cell(tmp_path):
    (tmp_path / "a|\x1bb\nc.txt").write_text("a||b||3\nc||d||1\n")
    name = load_task(str(tmp_path / "a|\x1bb\nc.txt")).name
    lines = results_table([entry(["x|y"], name, "spearman", 80.0)]).splitlines()
    assert lines == [r"| encoder | a\|\x1bb c |", "| :--- | ---: |", "| x\\|y | 80.00 |"]


def test_two_metrics_have_no_mean(tmp_path):
    results = [entry(["a"], "stsb", "spearman", 80.0), entry(["a"], "stsb", "pearson", 1.0)]
    results.append(entry(["a"], "qqp", "auc", 60.0))
    lines = results_table(results, "simcse-bert-base/self").splitlines()
    assert lines[0] == "| encoder | stsb | qqp |" and lines[2] == "| a | 80.00 | 60.00 |"
    rounds = collect_rounds(make_run(tmp_path, ["bert"], ONE))
    for round_ in rounds:
        round_.entries = [e | {"metric": "auc"} if e["task"] == "sickr" else e for e in round_.entries]
    assert summary_table([rounds]).splitlines()[0] == "| encoder | stsb.dev | stsb | sickr |"


def test_a_value_that_is_not_defined_is_a_dash_and_no_part_of_the_mean():
    results = [
        entry(["a"], "stsb", "spearman", None),
        entry(["a"], "sickr", "spearman", 70.0),
        entry(["b"], "stsb", "spearman", None),
        entry(["b"], "sickr", "spearman", None),
    ]
    assert results_table(results).splitlines()[2:] == ["| a | - | 70.00 | 70.00 |", "| b | - | - | - |"]


def test_the_papers_figures_stand_below_ours():
    results = [
        entry(["a"], task, "spearman", 50.0, kind=kind) for kind in ("bi",) for task in paper.GROUPS["sts_sickr"]
    ]
    results += [entry(["b"], "stsb", "spearman", 60.0, kind="cross"), entry(["a", "b"], "stsb", "spearman", 70.0)]
    lines = results_table(results, "simcse-bert-base/self").splitlines()
    # Values and average as printed in the paper, Table 2.
    assert lines[3].startswith("| paper: simcse-bert-base/self/bi | 72.17 | 84.40 | 76.69 ")
    assert lines[3].endswith("| 81.26 | 71.84 | 78.65 |")
    assert lines[5].startswith("| paper: simcse-bert-base/self/cross | 71.94 |")
    assert lines[6].startswith("| a + b |") and len(lines) == 7  # the paper's row is one encoder's
    assert "paper" not in results_table([entry(["a"], "mine", "auc", 1.0)], "simcse-bert-base/self")


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("sts12", "simcse-bert-base/start/bi", 68.64),
        ("sickr", "simcse-roberta-base/mutual/cross", 72.62),
        ("sts_sickr", "simcse-roberta-base/mutual/cross", 81.15),
        ("sts_sickr", "mirror-roberta-base-drophead/self/cross", 80.87),
        ("sts12", "mirror-roberta-base-drophead/self/cross", None),
        ("qnli", "simcse-bert-base/self/cross", 75.61),
        ("qnli", "simcse-bert-base/self-transfer/cross", 78.81),
        ("binary", "simcse-bert-base/mutual/bi", 79.18),
        ("sts12", "simcse-bert-base/self-transfer/bi", None),
        ("mine", "simcse-bert-base/self/bi", None),
        ("sts12", "bert/self/bi", None),
    ],
)
def test_published_figures(task, row, expected):
    assert paper.published(task, row) == expected


def test_the_papers_averages_are_those_of_its_columns():
    """Guards the figures against slips of the pen: the paper rounds each to two decimals."""
    counted, groups = 0, ("sts_sickr", "binary")
    known = {name for group in groups for name in (group, *paper.GROUPS[group])}
    for row, figures in paper.figures().items():
        assert set(figures) <= known, row
        for group in groups:
            if set(paper.GROUPS[group]) <= set(figures):
                values = [figures[task] for task in paper.GROUPS[group]]
                assert abs(np.mean(values) - figures[group]) < 0.011, row
                counted += 1
    assert counted == 19


def test_the_papers_mean_is_of_the_same_sets_as_ours():
    row = "simcse-bert-base/self/bi"
    assert paper.published_values(row, ["stsb", "sts12"]) == [81.26, 72.17, pytest.approx(76.715)]
    assert paper.published_values(row, ["stsb", "mine"]) == [81.26, None, None]
    assert paper.published_values("declutr/self/bi", list(paper.GROUPS["sts_sickr"])) == [None] * 7 + [74.57]
    assert paper.published_values("declutr/self/bi", ["stsb"]) == [None, None]


@pytest.mark.parametrize(
    ("kinds", "flags", "expected"),
    [
        (["bi", "cross"], (False, False), [[0], [1]]),
        (["cross", "bi"], (True, False), [[0, 1]]),
        (["cross", "bi"], (False, True), [[0], [1], [1, 0]]),
        (["bi", "plm"], (False, True), [[0], [1], [0, 1]]),
        (["cross", "cross", "bi", "bi"], (False, True), [[0], [1], [2], [3], [2, 3], [0, 1], [2, 3, 0, 1]]),
        (["bi"], (False, True), [[0]]),
    ],
)
def test_ensembles(kinds, flags, expected):
    assert encoder_groups(kinds, *flags) == expected


def test_one_task_needs_no_mean():
    results = [entry(["a"], "stsb", "spearman", 80.0), entry(["b"], "stsb", "spearman", None)]
    assert results_table(results).splitlines() == [
        "| encoder | stsb |",
        "| :--- | ---: |",
        "| a | 80.00 |",
        "| b | - |",
    ]


def test_a_markdown_table_has_one_line_for_each_row():
    assert markdown_table(["a", "b"], [["x", "1"], ["y", "2"]]) == "| a | b |\n| :--- | ---: |\n| x | 1 |\n| y | 2 |\n"


# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """stsb.jsonl, stsb.dev.jsonl, sickr.test.jsonl.gz and mrpc.jsonl, of 10, 11, 12 and 13 pairs."""
    write_jsonl(tmp_path / "stsb.jsonl", random_pairs(10))
    write_jsonl(tmp_path / "stsb.dev.jsonl", random_pairs(11))
    lines = "".join(json.dumps(row) + "\n" for row in random_pairs(12))
    (tmp_path / "sickr.test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = [{"label": int(row.pop("score") > 2.5), **row} for row in random_pairs(13)]
    write_jsonl(tmp_path / "mrpc.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "title", "size", "gold"),
    [
        ("stsb", "stsb", 10, "score"),
        ("stsb.test", "stsb", 10, "score"),
        ("stsb.dev", "stsb.dev", 11, "score"),
        ("sickr", "sickr", 12, "score"),
        ("mrpc", "mrpc", 13, "label"),
    ],
)
def test_registered_tasks_are_found_in_the_data_folder(data_dir, spec, title, size, gold):
    task = load_task(spec, str(data_dir))
    assert (task.title, len(task.pairs), task.gold) == (title, size, gold)
    assert task.pairs.column_names == ["sentence1", "sentence2", gold]


def test_a_task_of_another_size_than_the_published_one_is_noted(data_dir, capsys):
    load_task("stsb", str(data_dir))
    assert capsys.readouterr().err == "stsb: 10 rows, 1379 expected\n"
    write_jsonl(data_dir / "mrpc.dev.jsonl", [{**row, "label": i % 2} for i, row in enumerate(random_pairs(408))])
    load_task("mrpc.dev", str(data_dir))
    assert capsys.readouterr().err == "mrpc.dev: 408 rows, as expected\n"


def test_scores_on_another_scale_than_the_published_ones_are_noted(data_dir, capsys):
    write_jsonl(data_dir / "sickr.dev.jsonl", [{**row, "score": row["score"] / 5} for row in random_pairs(12)])
    load_task("sickr.dev", str(data_dir))
    assert capsys.readouterr().err.endswith("; scores from 0.181818 to 1, 1 to 5 expected\n")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sts16", "no sts16.jsonl(.gz) or sts16.test.jsonl(.gz) for task sts16"),
        ("sickr.dev", "no sickr.dev.jsonl(.gz)"),
    ],
)
def test_a_task_that_the_data_folder_lacks_is_refused(data_dir, spec, words):
    with pytest.raises(InputError) as caught:
        load_task(spec, str(data_dir))
    assert f"--data_dir {data_dir}: {words}" in str(caught.value)


def test_a_task_file_with_another_gold_column_is_refused(data_dir):
    write_jsonl(data_dir / "qqp.jsonl", random_pairs(5))
    with pytest.raises(InputError, match=r"qqp\.jsonl: no column 'label'"):
        load_task("qqp", str(data_dir))


def test_a_file_is_a_task_by_its_own_or_a_given_name(data_dir):
    path = data_dir / "stsb.dev.jsonl"
    assert load_task(f"mine={path}").title == "mine"
    assert load_task(f"mine.dev={path}").title == "mine.dev"
    assert load_task(f"stsb.dev={path}").title == "stsb.dev"  # no need to be the registered one
    assert load_task(str(data_dir / "mrpc.jsonl")).title == "mrpc"
    assert len(load_task(str(path)).pairs) == 11


@pytest.mark.parametrize(
    ("name", "content", "gold", "values"),
    [
        ("a.tsv", "sentence1\tsentence2\tscore\na\tb\t3\nc\td\t1.5\n", "score", [3.0, 1.5]),
        ("a.csv", "sentence1,sentence2,label\na,b,1\nc,d,0\n", "label", [1.0, 0.0]),
        ("a.txt", "a||b||3\nc||d||1\n", "score", [3.0, 1.0]),
    ],
)
def test_a_label_column_makes_a_binary_task_and_a_score_column_a_graded_one(tmp_path, name, content, gold, values):
    (tmp_path / name).write_text(content)
    task = load_task(str(tmp_path / name))
    assert task.gold == gold
    assert task.pairs[gold][:] == values


def test_a_renamed_label_column_makes_a_binary_task(tmp_path):
    (tmp_path / "qqp.csv").write_text("question1,question2,is_duplicate\na,b,1\nc,d,0\n")
    columns = ["sentence1=question1", "sentence2=question2", "label=is_duplicate"]
    task = load_task(f"qqp={tmp_path / 'qqp.csv'}", reading=Reading(columns=columns))
    assert task.gold == "label"
    assert task.pairs["label"][:] == [1.0, 0.0]


def test_a_renaming_of_labels_leaves_a_file_with_scores_a_graded_task(tmp_path):
    (tmp_path / "mine.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t3\nc\td\t1.5\n")
    columns = ["sentence1=question1", "label=is_duplicate"]  # for another file
    task = load_task(str(tmp_path / "mine.tsv"), reading=Reading(columns=columns))
    assert task.gold == "score"
    assert task.pairs["score"][:] == [3.0, 1.5]


def test_of_a_score_and_a_label_one_must_be_chosen(tmp_path):
    (tmp_path / "both.csv").write_text("label,sentence1,sentence2,score\n1,a,b,7\n0,c,d,8\n")
    path = str(tmp_path / "both.csv")
    with pytest.raises(
        InputError, match=r"both\.csv: has a score and a label; choose with --columns score=score or --col"
    ):
        load_task(path)
    for gold, values in (("score", [7.0, 8.0]), ("label", [1.0, 0.0])):
        task = load_task(path, reading=Reading(columns=[f"{gold}={gold}"]))
        assert (task.gold, task.pairs[gold][:]) == (gold, values)


def test_graded_values_that_a_file_calls_label_are_measured_by_their_renaming(tmp_path):
    (tmp_path / "stsb.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0.2\n1\tc\td\t5.2\n")
    task = load_task(f"g={tmp_path / 'stsb.tsv'}", reading=Reading(columns=["score=label"]))
    assert (task.gold, task.pairs["score"][:]) == ("score", [0.2, 5.2])


def test_labels_may_be_true_and_false(tmp_path):
    (tmp_path / "a.csv").write_text("sentence1,sentence2,label\na,b,True\nc,d,False\ne,f, TRUE\n")
    write_jsonl(tmp_path / "a.jsonl", [dict(sentence1=a, sentence2=a, label=a != "c") for a in "ace"])
    datasets.Dataset.from_json(str(tmp_path / "a.jsonl")).to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        assert load_task(str(tmp_path / name)).pairs["label"][:] == [1.0, 0.0, 1.0]
    (tmp_path / "a.csv").write_text("sentence1,sentence2,score\na,b,True\nc,d,False\n")
    with pytest.raises(InputError, match=r"row 1: score 'True' is not a number"):
        load_task(str(tmp_path / "a.csv"))


def test_two_tasks_of_one_name_are_refused(tmp_path):
    paths = []
    for folder in ("en", "de"):
        (tmp_path / folder).mkdir()
        paths.append(str(tmp_path / folder / "test.tsv"))
        Path(paths[-1]).write_text("sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t0\n")
    with pytest.raises(InputError, match=r"^--tasks: the tasks' names must differ .*: test, test$"):
        load_tasks(paths, None, Reading())
    assert [task.title for task in load_tasks([f"en={paths[0]}", paths[1]], None, Reading())] == ["en", "test"]


def test_an_equals_sign_in_a_path_is_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "date=2024-05-01").mkdir()
    path = tmp_path / "date=2024-05-01" / "p.tsv"
    path.write_text("sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t0\n")
    assert load_task(str(path)).title == "p"
    assert load_task(f"mine={path}").title == "mine"
    monkeypatch.chdir(tmp_path)
    assert load_task("mine=date=2024-05-01/p.tsv").title == "mine"
    assert load_task("date=2024-05-01/p.tsv").title == "p"


def test_what_is_neither_a_task_nor_a_file_is_refused_with_the_tasks(tmp_path):
    for spec in ("stsc", f"mine={tmp_path}/no.tsv"):
        with pytest.raises(InputError) as caught:
            load_task(spec)
        assert str(caught.value).startswith(f"{spec}: neither a file nor a task; tasks: ")
        assert all(name in str(caught.value) for name in TASKS if name != "snli")
    for spec in ("sts12.trian", "stsb.jsonl"):
        with pytest.raises(
            InputError, match=rf"^{spec}: no such file, and no split of {spec[:4]}\w*, which has: test"
        ):
            load_task(spec)


def test_a_file_without_gold_values_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence1\tsentence2\na\tb\n")
    with pytest.raises(InputError, match=r"a\.tsv: no column 'score'; it has: sentence1, sentence2"):
        load_task(str(tmp_path / "a.tsv"))


def test_a_task_that_the_hub_does_not_give_is_refused_with_the_way_out():
    assert datasets.config.HF_HUB_OFFLINE  # else this would ask the network
    with pytest.raises(InputError, match=r"^mteb/stsbenchmark-sts, revision b0f.*cannot be loaded .* as --data_dir"):
        load_task("stsb")


# --- the summary of a run --------------------------------------------------------------------------------------------


def make_run(
    folder: Path,
    students: list[str],
    values: dict[str, list[list[float | None]]],
    ready: str | None = None,
    cycles: int | None = None,
) -> Path:
    """A run's folder with models and results.

    Args:
        values: for each folder (start, cycle-1, ...), [stsb.dev, stsb, sickr] of each encoder: first the
            cross-encoders in the students' order, and then the bi-encoders.
        ready: the start's bi-encoder, where it is not of this run.
        cycles: of the recipe, where there are more or fewer than those of `values`.
    """
    driver = {
        "students": [{"name": name, "plm": "p", **({"bi_encoder": ready} if ready else {})} for name in students],
        "sentences": "s.txt",
        "pairs": ["p"],
        "dev": "stsb.dev",
        "tasks": ["stsb", "sickr"],
        "cycles": cycles or max(1, len(values) - 1),
    }
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"run_transencoder": driver}))
    for part, rows in values.items():
        kinds = ["bi"] if part == "start" else ["cross", "bi"]
        paths = [(kind, inside(part, kind, name)) for kind in kinds for name in students]
        entries = []
        for (kind, path), row in zip(paths, rows, strict=True):
            name = ready if ready and part == "start" else str(folder / path)
            if name != ready:
                (folder / path).mkdir(parents=True)
                (folder / path / "config.json").write_text(f"{part} {path.name}")
            for task, split, value in [("stsb", "dev", row[0]), ("stsb", "test", row[1]), ("sickr", "test", row[2])]:
                entries.append(entry([name], task, "spearman", value, split, kind))
                entries.append(entry([name], task, "pearson", 1.0, split, kind))
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "results.json").write_text(json.dumps(entries))
    return folder


def inside(part: str, kind: str, name: str) -> Path:
    """Where the driver puts an encoder in the run."""
    return Path("contrastive", name) if part == "start" else Path(part, f"{kind}-encoder", name)


THREE = {
    "start": [[60, 61, 70]],
    "cycle-1": [[71, 72, 80], [65, 66, 75]],
    "cycle-2": [[70, 79, 89], [68, 67, 77]],
    "cycle-3": [[69, 80, 90], [67, 68, 78]],
}
ONE = {"start": THREE["start"], "cycle-1": THREE["cycle-1"]}


def test_rounds_come_in_the_order_in_which_they_were_made(tmp_path):
    rounds = collect_rounds(make_run(tmp_path, ["bert"], THREE))
    assert [r.step for r in rounds] == [
        "start, bi-encoder",
        *(f"cycle {cycle}, {kind}-encoder" for cycle in (1, 2, 3) for kind in ("cross", "bi")),
    ]
    assert [r.values["stsb"] for r in rounds] == [61, 72, 66, 79, 67, 80, 68]
    assert rounds[1].values == {"stsb.dev": 71, "stsb": 72, "sickr": 80}  # Spearman, not Pearson
    assert (dev_of(rounds), summary.tests_of(rounds)) == ("stsb.dev", ["stsb", "sickr"])
    assert {r.student for r in rounds} == {"bert"}
    assert rounds[5].path == str(tmp_path / "cycle-3" / "cross-encoder" / "bert")


def test_rounds_of_several_students_carry_their_names(tmp_path):
    values = {"start": [[1, 1, 1], [2, 2, 2]], "cycle-1": [[3, 3, 3], [4, 4, 4], [5, 5, 5], [6, 6, 6]]}
    rounds = collect_rounds(make_run(tmp_path, ["bert", "roberta"], values))
    assert [(r.cycle, r.kind, r.student, r.values["stsb"]) for r in rounds] == [
        (0, "bi", "bert", 1),
        (0, "bi", "roberta", 2),
        (1, "cross", "bert", 3),
        (1, "cross", "roberta", 4),
        (1, "bi", "bert", 5),
        (1, "bi", "roberta", 6),
    ]


def test_students_whose_names_end_alike_are_told_apart(tmp_path):
    values = {"start": [[1, 1, 1], [2, 2, 2]], "cycle-1": [[3, 3, 3], [4, 4, 4], [5, 5, 5], [6, 6, 6]]}
    rounds = collect_rounds(make_run(tmp_path, ["roberta", "xlm-roberta"], values))
    assert [r.values["stsb"] for r in rounds] == [1, 2, 3, 4, 5, 6]


def test_ten_cycles_come_in_their_order(tmp_path):
    values = {"start": [[0, 0, 0]], **{f"cycle-{i}": [[i, i, i], [-i, -i, -i]] for i in range(1, 11)}}
    rounds = collect_rounds(make_run(tmp_path, ["bert"], values))
    assert [r.values["sickr"] for r in rounds] == [0, *(sign * i for i in range(1, 11) for sign in (1, -1))]


def test_a_value_that_is_not_defined_is_not_a_number(tmp_path):
    rounds = collect_rounds(make_run(tmp_path, ["bert"], {**ONE, "start": [[None, None, 70]]}))
    assert math.isnan(rounds[0].values["stsb.dev"])
    assert rounds[0].values["sickr"] == 70
    assert best_round(rounds, "bi").cycle == 1


@pytest.mark.parametrize(
    ("values", "cycles", "missing"),
    [
        ({}, 1, "start"),
        ({"start": THREE["start"]}, 1, "cycle-1"),
        (ONE, 3, "cycle-2"),
        ({part: THREE[part] for part in ("start", "cycle-2")}, 2, "cycle-1"),
        ({"cycle-1": THREE["cycle-1"]}, 1, "start"),
    ],
)
def test_an_unfinished_run_is_refused_with_the_folder(tmp_path, values, cycles, missing):
    run = make_run(tmp_path, ["bert"], values, cycles=cycles)
    (run / missing).mkdir(exist_ok=True)
    with pytest.raises(InputError, match=rf"^{run / missing}: no results\.json"):
        collect_rounds(run)


def test_cycles_beyond_the_recipes_are_left_out(tmp_path):
    run = make_run(tmp_path, ["bert"], THREE, cycles=2)
    assert [r.cycle for r in collect_rounds(run)] == [0, 1, 1, 2, 2]


def test_a_folder_without_a_good_recipe_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"recipe\.yaml: No such file"):
        collect_rounds(tmp_path)
    (tmp_path / "recipe.yaml").write_text("run_transencoder: {cycles: 3}\n")
    with pytest.raises(InputError, match=r"recipe\.yaml: run_transencoder\.students"):
        collect_rounds(tmp_path)


def test_a_moved_run_is_read_where_it_is_now(tmp_path):
    run = make_run(tmp_path / "old" / "run", ["bert", "roberta"], {part: rows * 2 for part, rows in ONE.items()})
    before = collect_rounds(run)
    moved = run.rename(tmp_path / "moved")
    rounds = collect_rounds(moved)
    assert [r.values for r in rounds] == [r.values for r in before]
    assert [Path(r.path).relative_to(moved) for r in rounds] == [Path(r.path).relative_to(run) for r in before]
    assert all(Path(r.path).is_dir() for r in rounds)
    keep_best(moved, rounds)
    for kind in ("bi", "cross"):
        assert (moved / "best" / f"{kind}-encoder" / "config.json").read_text().startswith("cycle-1 ")
    assert not run.exists()


def test_the_summary_table_has_a_row_for_each_encoder_and_the_mean_of_the_tests(tmp_path):
    rounds = collect_rounds(make_run(tmp_path, ["bert"], ONE))
    assert summary_table([rounds]).splitlines() == [
        "| encoder | stsb.dev | stsb | sickr | mean of tests |",
        "| :--- | ---: | ---: | ---: | ---: |",
        "| start, bi-encoder | 60.00 | 61.00 | 70.00 | 65.50 |",
        "| cycle 1, cross-encoder | 71.00 | 72.00 | 80.00 | 76.00 |",
        "| cycle 1, bi-encoder | 65.00 | 66.00 | 75.00 | 70.50 |",
    ]


def test_the_summary_table_names_the_students_where_there_are_several(tmp_path):
    values = {"start": [[1, 2, 3], [4, 5, 6]], "cycle-1": [[7, 8, 9]] * 2 + [[0, 1, 2]] * 2}
    rounds = collect_rounds(make_run(tmp_path, ["bert", "roberta"], values))
    assert summary_table([rounds]).splitlines()[2:] == [
        "| start, bi-encoder (bert) | 1.00 | 2.00 | 3.00 | 2.50 |",
        "| start, bi-encoder (roberta) | 4.00 | 5.00 | 6.00 | 5.50 |",
        "| cycle 1, cross-encoder (bert) | 7.00 | 8.00 | 9.00 | 8.50 |",
        "| cycle 1, cross-encoder (roberta) | 7.00 | 8.00 | 9.00 | 8.50 |",
        "| cycle 1, bi-encoder (bert) | 0.00 | 1.00 | 2.00 | 1.50 |",
        "| cycle 1, bi-encoder (roberta) | 0.00 | 1.00 | 2.00 | 1.50 |",
    ]


def test_the_summary_table_has_ensembles_and_the_papers_figures(tmp_path):
    values = {"start": [[1, 2, 3], [4, 5, 6]], "cycle-1": [[7, 8, 9]] * 2 + [[0, 1, 2]] * 2}
    run = make_run(tmp_path, ["bert", "roberta"], values)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["run_transencoder"]["paper"] = {"bert": "simcse-bert-base/mutual", "ensemble": "simcse-base/mutual"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = json.loads((run / "cycle-1" / "results.json").read_text())
    for kind, value in (("bi", 50), ("bi+cross", 60)):
        for task, split in (("stsb", "dev"), ("stsb", "test"), ("sickr", "test")):
            results.append(entry(["x", "y"], task, "spearman", value, split, kind))
    (run / "cycle-1" / "results.json").write_text(json.dumps(results))
    rounds = collect_rounds(run)
    assert summary_table([rounds]).splitlines()[2:] == [
        "| start, bi-encoder (bert) | 1.00 | 2.00 | 3.00 | 2.50 |",
        "| paper: simcse-bert-base/start/bi | - | 76.54 | 72.22 | 74.38 |",
        "| start, bi-encoder (roberta) | 4.00 | 5.00 | 6.00 | 5.50 |",
        "| cycle 1, cross-encoder (bert) | 7.00 | 8.00 | 9.00 | 8.50 |",
        "| paper: simcse-bert-base/mutual/cross | - | 83.61 | 69.52 | 76.56 |",
        "| cycle 1, cross-encoder (roberta) | 7.00 | 8.00 | 9.00 | 8.50 |",
        "| cycle 1, bi-encoder (bert) | 0.00 | 1.00 | 2.00 | 1.50 |",
        "| paper: simcse-bert-base/mutual/bi | - | 83.90 | 72.76 | 78.33 |",
        "| cycle 1, bi-encoder (roberta) | 0.00 | 1.00 | 2.00 | 1.50 |",
        "| cycle 1, bi-encoder (ensemble) | 50.00 | 50.00 | 50.00 | 50.00 |",
        "| cycle 1, bi- and cross-encoder (ensemble) | 60.00 | 60.00 | 60.00 | 60.00 |",
    ]
    assert best_round(rounds, "bi").student == "roberta"  # no ensemble is one model
    plot_progress(run / "progress.png", rounds, {})


def test_runs_of_several_seeds_are_summarized_by_mean_and_standard_deviation(tmp_path):
    values = [[60, 61, 70], [62, 61, 74], [64, 61, 78]]
    runs = [
        collect_rounds(make_run(tmp_path / f"{i}", ["bert"], {**ONE, "start": [row]})) for i, row in enumerate(values)
    ]
    # 60 62 64: deviations -2 0 2, sqrt(8 / 2) = 2. Means of the tests 65.5 67.5 69.5: again 2
    assert summary_table(runs).splitlines()[2:] == [
        "| start, bi-encoder | 62.00 ± 2.00 | 61.00 ± 0.00 | 74.00 ± 4.00 | 67.50 ± 2.00 |",
        "| cycle 1, cross-encoder | 71.00 ± 0.00 | 72.00 ± 0.00 | 80.00 ± 0.00 | 76.00 ± 0.00 |",
        "| cycle 1, bi-encoder | 65.00 ± 0.00 | 66.00 ± 0.00 | 75.00 ± 0.00 | 70.50 ± 0.00 |",
    ]


def test_runs_that_differ_in_more_than_their_seed_are_not_summarized_together(tmp_path):
    one = collect_rounds(make_run(tmp_path / "one", ["bert"], ONE))
    longer = collect_rounds(make_run(tmp_path / "longer", ["bert"], THREE))
    other = collect_rounds(make_run(tmp_path / "other", ["roberta"], ONE))
    for second in (longer, other):
        with pytest.raises(InputError, match="these runs differ in more than their seed"):
            summary_table([one, second])


def make_rounds(*rows: tuple[int, str, float], dev: bool = True) -> list[Round]:
    return [
        Round(cycle, kind, "bert", f"{cycle}-{kind}", {"stsb.dev": value, "stsb": -value} if dev else {"stsb": value})
        for cycle, kind, value in rows
    ]


def test_the_best_round_is_the_best_on_dev_of_its_kind():
    rounds = make_rounds((0, "bi", 60), (1, "cross", 71), (1, "bi", 65), (2, "cross", 70), (2, "bi", 68))
    assert best_round(rounds, "cross").cycle == 1
    assert best_round(rounds, "bi").cycle == 2


def test_the_best_bi_encoder_may_be_the_start():
    rounds = make_rounds((0, "bi", 70), (1, "cross", 71), (1, "bi", 65))
    assert best_round(rounds, "bi").cycle == 0


def test_a_collapsed_encoder_is_never_the_best():
    rounds = make_rounds((0, "bi", math.nan), (1, "cross", 60), (1, "bi", 65), (2, "cross", math.nan), (2, "bi", 64))
    assert best_round(rounds, "bi").cycle == 1
    assert best_round(rounds, "cross").cycle == 1


def test_without_a_dev_set_the_last_cycle_is_the_best():
    rounds = make_rounds((0, "bi", 90), (1, "cross", 80), (1, "bi", 70), (2, "cross", 60), (2, "bi", 50), dev=False)
    assert [best_round(rounds, kind).cycle for kind in ("cross", "bi")] == [2, 2]


def test_the_best_encoders_are_copied(tmp_path):
    run = make_run(tmp_path, ["bert"], THREE)
    lines = keep_best(run, collect_rounds(run))
    assert lines == [
        "`best/bi-encoder` is cycle 2, bi-encoder of bert (stsb.dev 68.00).",
        "`best/cross-encoder` is cycle 1, cross-encoder of bert (stsb.dev 71.00).",
    ]
    assert (run / "best" / "bi-encoder" / "config.json").read_text() == "cycle-2 bert"
    assert (run / "best" / "cross-encoder" / "config.json").read_text() == "cycle-1 bert"
    assert (run / "cycle-1" / "cross-encoder" / "bert" / "config.json").exists()
    assert sorted(path.name for path in (run / "best").iterdir()) == ["bi-encoder", "cross-encoder"]


def test_what_no_dev_set_chose_is_not_called_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rounds = make_rounds((0, "bi", 90), (1, "bi", 70), dev=False)
    for round_ in rounds:
        Path(round_.path).mkdir(parents=True)
    assert keep_best(tmp_path, rounds) == ["`last/bi-encoder` is cycle 1, bi-encoder of bert (the last cycle's)."]
    assert (tmp_path / "last" / "bi-encoder").is_dir() and not (tmp_path / "best").exists()


def test_a_ready_start_that_stays_the_best_is_named_and_not_copied(tmp_path):
    values = {"start": [[90, 1, 1]], "cycle-1": THREE["cycle-1"]}
    run = make_run(tmp_path, ["bert"], values, ready="org/simcse")
    lines = keep_best(run, collect_rounds(run))
    assert lines[0] == "The best bi-encoder is the start itself, org/simcse from the Hub: no copy was made."
    assert not (run / "best" / "bi-encoder").exists()


@pytest.mark.parametrize("students", [["bert"], ["bert", "roberta"]])
def test_the_plot_is_a_png_with_a_panel_for_each_student(tmp_path, students):
    values = {"start": [[1, 1, 1]] * len(students), "cycle-1": [[3, 3, 3]] * 2 * len(students)}
    rounds = collect_rounds(make_run(tmp_path / "run", students, values))
    plot_progress(tmp_path / "progress.png", rounds, {})
    content = (tmp_path / "progress.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == ((1.5 + 4.5 * len(students)) * 150, 600)
    assert not (tmp_path / ".progress.png").exists()


def plotted(monkeypatch, rounds, gains):
    """The only panel of a plot."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, file, **_: drawn.append(self) or Path(file).touch()
    )
    plot_progress(Path("progress.png"), rounds, gains)
    return drawn[0].axes[0]


def test_the_plot_has_dev_and_test_the_intervals_and_ten_points_at_least(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"start": [[80, 80, 82]], "cycle-1": [[81, 80.5, 82.5], [81, 81, 82]]}
    rounds = collect_rounds(make_run(tmp_path / "run", ["bert"], values))
    bi = Gain("spearman", ["stsb", "sickr"], 0.5, -0.5, 1.0)
    axis = plotted(monkeypatch, rounds, {"bi": [bi], "cross": [Gain("spearman", ["other"], 0.5, 0.4, 0.6)]})
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(10) and low < 80 and high > 82.5
    titles = [text.get_text() for text in axis.get_legend().get_texts()]
    assert titles == ["stsb.dev", "stsb", "sickr", "gain over the start, 95 %"]
    assert [line.get_linestyle() for line in axis.get_lines()[:3]] == ["--", "-", "-"]
    # The bi-encoder of cycle 1 is the third point; the mean of 81 and 82, 1 below it and 0.5 above it.
    (bar,) = axis.collections
    assert [list(end) for end in bar.get_segments()[0]] == [[2.0, 80.5], [2.0, 82.0]]


def test_a_start_that_stays_the_best_has_no_interval_and_long_ways_are_shown_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"start": [[90, 60, 60]], "cycle-1": [[71, 70, 75], [65, 66, 85]]}
    rounds = collect_rounds(make_run(tmp_path / "run", ["bert"], values))
    axis = plotted(monkeypatch, rounds, {"bi": [Gain("spearman", ["stsb"], 0.0, 0.0, 0.0)]})
    low, high = axis.get_ylim()
    assert not axis.collections and low < 60 and high > 90 and high - low < 35

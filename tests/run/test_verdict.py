"""The verdict: its bootstrap by hand and against a naive one, its words, and the pairs that it asks labels for."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import random_pairs, save_telling_encoders, write_jsonl, write_measured
from scipy import stats

from transencoder.data.tables import read_pairs
from transencoder.data.tasks import load_task
from transencoder.errors import InputError
from transencoder.run import verdict
from transencoder.run.layout import Layout
from transencoder.run.plan import load_plan
from transencoder.run.stages import make_stages, write_stages
from transencoder.run.summary import collect_rounds
from transencoder.run.verdict import Gain, Scored, draw_to_label, gains_over_first, how_to_search, judge, resampled

# --- the bootstrap ---------------------------------------------------------------------------------------------------


def test_auc_and_spearman_by_hand():
    # Positives 0.9 and 0.5, negatives 0.5 and 0.1: won 1 + 1 + 0.5 + 1 of 4. Turned round: 0.5 of 4.
    labels, scores = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.5, 0.5, 0.1])
    np.testing.assert_allclose(resampled("label", labels, np.stack([scores, -scores]), 0)[0], [87.5, 12.5])
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8; a constant score ranks nothing.
    gold, scores = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[0.1, 0.3, 0.2, 0.4], [7.0, 7.0, 7.0, 7.0]])
    np.testing.assert_allclose(resampled("score", gold, scores, 0)[0], [80.0, 0.0])


@pytest.mark.parametrize("gold", ["label", "score"])
def test_the_draws_are_those_of_a_bootstrap_that_copies_rows(gold, monkeypatch):
    monkeypatch.setattr(verdict, "RESAMPLES", 20)
    monkeypatch.setattr(verdict, "DRAWS_AT_ONCE", 10)
    draws = np.random.default_rng(3)
    values = draws.integers(0, 2 if gold == "label" else 6, 60).astype(float)
    scores = np.stack([values + draws.normal(size=60), draws.normal(size=60)]).round(1)  # with ties
    again, expected = np.random.default_rng(8), []
    for _ in range(2):
        for rows in again.integers(0, 60, (10, 60)):
            truth = values[rows]
            if gold == "label":
                won = [stats.mannwhitneyu(s[rows][truth == 1], s[rows][truth == 0]).statistic for s in scores]
                expected.append(np.array(won) / (truth.sum() * (1 - truth).sum()))
            else:
                expected.append([stats.spearmanr(s[rows], truth).statistic for s in scores])
    np.testing.assert_allclose(resampled(gold, values, scores, 8)[1:], 100 * np.array(expected), atol=1e-9)


def labelled(title, better, worse, pairs=400, gold="label"):
    """A set, and two encoders of which one is so much better than the other as the noise on their scores says."""
    draws = np.random.default_rng(1)
    values = draws.integers(0, 2, pairs).astype(float)
    scores = np.stack([values + noise * draws.normal(size=pairs) for noise in (worse, better)])
    return Scored(title, gold, values, scores)


def test_a_gain_is_better_worse_or_the_same_by_its_interval():
    (up,), (down,), (none,) = (
        gains_over_first([one])[0]
        for one in (labelled("a", 0.3, 1.0), labelled("a", 1.0, 0.3), labelled("a", 0.999, 1.0, 40))
    )
    assert [up.word, down.word, none.word] == ["better", "worse", "same"]
    assert up.low < up.value < up.high and up.metric == "auc"
    same = labelled("a", 1.0, 1.0)
    ((equal,),) = gains_over_first([Scored("a", "label", same.values, same.scores[[0, 0]])])
    assert (equal.value, equal.low, equal.high, equal.word) == (0.0, 0.0, 0.0, "same")


def test_the_gain_on_several_sets_is_the_mean_over_them_and_metrics_are_kept_apart():
    one, two = labelled("a", 0.3, 1.0), labelled("b", 1.0, 0.3)
    ((alone,),), ((other,),) = gains_over_first([one]), gains_over_first([two])
    ((both,),) = gains_over_first([one, two])
    assert both.value == pytest.approx((alone.value + other.value) / 2) and both.sets == ["a", "b"]
    ((auc, rho),) = gains_over_first([one, labelled("c", 1.0, 0.3, gold="score")])
    assert [auc.metric, rho.metric, verdict.word_of([auc, rho])] == ["auc", "spearman", "worse"]
    shown = verdict.in_words([Gain("auc", ["qqp"], 0.731, 0.414, 1.049), Gain("spearman", list("abcd"), -1, -2, 0)])
    assert shown == (
        "+0.73 (95 % +0.41 ... +1.05) on qqp, AUC; -1.00 (95 % -2.00 ... +0.00) on the mean of 4 sets, Spearman's rho"
    )


def test_search_re_ranks_only_where_that_was_measured_to_be_better():
    truth = labelled("dev", 1.0, 1.0, 2000)
    far = np.random.default_rng(5).normal(size=2000)
    cases = {"bi": far, "cross": 50 * truth.values, "mean": truth.values + far}
    for name, cross in cases.items():
        scores = np.stack([truth.scores[0], cross])
        advice = how_to_search([Scored("dev", "label", truth.values, scores / 100)])
        assert advice["rank_by"] == name, advice
        advice = how_to_search([Scored("dev", "label", truth.values, scores)])  # no cosines
        assert advice["rank_by"] == {"mean": "bi"}.get(name, name), advice


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """A run with a dev and a test set: the bi-encoder of cycle 1 is better than the start, the cross-encoder worse."""
    draws, run = np.random.default_rng(0), tmp_path / "run"
    pairs = [{"label": int(row.pop("score") > 2.5), **row} for row in random_pairs(300)]
    tasks = [
        load_task(f"mine{split}={write_jsonl(tmp_path / f'm{split}.jsonl', pairs[half])}") for split, half in SPLIT
    ]
    encoders = {0: ["contrastive/one"], 1: ["cycle-1/cross-encoder/one", "cycle-1/bi-encoder/one"]}
    noises = {0: [0.8], 1: [1.6, 0.2]}
    for cycle, names in encoders.items():
        scores = [[task.pairs["label"] + noise * draws.normal(size=150) for task in tasks] for noise in noises[cycle]]
        write_measured(Layout(run).cycle(cycle), [str(run / name) for name in names], tasks, scores)
        for name in names:
            (run / name).mkdir(parents=True)
    section = {"students": [{"name": "one", "plm": "p"}], "sentences": "s", "pairs": "p", "cycles": 1}
    section |= {"dev": f"mine.dev={tmp_path / 'm.dev.jsonl'}", "tasks": f"mine={tmp_path / 'm.jsonl'}"}
    (run / "recipe.yaml").write_text(yaml.safe_dump({"run_transencoder": section}))
    return run


SPLIT = (("", slice(150)), (".dev", slice(150, None)))


def test_a_run_ends_with_its_verdict_and_search_is_told(measured, run_script):
    result = run_script("summarize_run.py", measured)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("VERDICT better: bi-encoder +") and last.endswith(") on mine")
    text = (measured / "results.md").read_text()
    assert text.splitlines()[0] == last
    assert "WARNING: the cross-encoder is below its teacher, the start: -" in text
    assert "cycle 1, cross-encoder: below the start on mine (" in text and "cycle 1, bi-encoder: below" not in text
    content = json.loads((measured / "results.json").read_text())
    assert next(iter(content)) == "verdict" and content["verdict"] == last and content["word"] == "better"
    value = content["gains"]["bi"][0]["value"]
    table = {row["kind"] + str(row["cycle"]): row["values"]["mine"] for row in content["encoders"]}
    assert value == pytest.approx(table["bi1"] - table["bi0"], abs=1e-3)
    assert json.loads((measured / "best/search.json").read_text())["rank_by"] == "bi"
    assert sorted(path.name for path in (measured / "best").iterdir()) == [
        "bi-encoder", "cross-encoder", "search.json",
    ]  # fmt: skip


def test_scores_of_other_sets_or_from_a_damaged_file_give_no_verdict(measured):
    path = Layout(measured).pair_scores(1)
    whole, rounds = path.read_bytes(), collect_rounds(measured)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cycle-1/pair-scores\.parquet: not the scores of the results beside it"):
        judge(measured, rounds)
    path.unlink()
    assert judge(measured, rounds).line.startswith(f"VERDICT unknown: there is no {path}; delete results.json")
    path.write_bytes(Layout(measured).pair_scores(0).read_bytes())  # of another encoder
    with pytest.raises(InputError, match="not the scores of the results"):
        judge(measured, rounds)


def test_a_set_that_is_another_one_in_a_later_cycle_is_refused(measured, tmp_path):
    rows = [{"label": int(row.pop("score") > 2.5), **row} for row in random_pairs(150, seed=9)]
    tasks = [load_task(f"mine{split}={write_jsonl(tmp_path / f'o{split}.jsonl', rows)}") for split, _ in SPLIT]
    names = [str(measured / f"cycle-1/{kind}-encoder/one") for kind in ("cross", "bi")]
    write_measured(Layout(measured).cycle(1), names, tasks, [[np.arange(150.0)] * 2] * 2)
    with pytest.raises(InputError, match="mine was another set in one of the cycles"):
        judge(measured, collect_rounds(measured))


def test_the_start_that_stays_the_best_is_the_same(measured):
    layout = Layout(measured)
    layout.recipe.write_text(layout.recipe.read_text().replace("cycles: 1", "cycles: 2"))
    tasks = [load_task(f"mine{split}={measured.parent / f'm{split}.jsonl'}") for split, _ in SPLIT]
    for cycle, noise in ((0, 0.1), (1, 1.0), (2, 1.0)):
        draws = np.random.default_rng(cycle)
        names = ["contrastive/one"] if not cycle else [f"cycle-{cycle}/{kind}-encoder/one" for kind in ("cross", "bi")]
        scores = [[task.pairs["label"] + noise * draws.normal(size=150) for task in tasks] for _ in names]
        write_measured(layout.cycle(cycle), [str(measured / name) for name in names], tasks, scores)
    line = judge(measured, collect_rounds(measured)).line
    assert line == "VERDICT same: bi-encoder +0.00 (95 % +0.00 ... +0.00) on mine; the start stays the best"


def test_without_a_test_set_the_verdict_is_on_dev_and_says_so(measured):
    layout = Layout(measured)
    recipe = yaml.safe_load(layout.recipe.read_text())
    del recipe["run_transencoder"]["tasks"]
    layout.recipe.write_text(yaml.safe_dump(recipe))
    for cycle in (0, 1):
        entries = json.loads(layout.results(cycle).read_text())
        layout.results(cycle).write_text(json.dumps([entry for entry in entries if entry["split"] == "dev"]))
    line = judge(measured, collect_rounds(measured)).line
    assert line.startswith("VERDICT better: bi-encoder +")
    assert line.endswith(") on mine.dev (dev, on which the best was chosen: there is no test set)")


def test_a_worse_end_says_what_to_keep(measured):
    task = load_task(f"mine={measured.parent / 'm.jsonl'}")
    dev = load_task(f"mine.dev={measured.parent / 'm.dev.jsonl'}")
    turned = [[1.0 - np.array(task.pairs["label"]), np.array(dev.pairs["label"])] for _ in range(2)]
    names = [str(measured / f"cycle-1/{kind}-encoder/one") for kind in ("cross", "bi")]
    write_measured(Layout(measured).cycle(1), names, [task, dev], turned)
    found = judge(measured, collect_rounds(measured))
    assert found.line.startswith("VERDICT worse: bi-encoder -")
    assert found.notes[0] == (
        f"Keep the start, {measured / 'contrastive/one'}: the end is worse, and published only by --push_worse"
    )


def test_runs_of_several_seeds_each_have_their_verdict(measured, run_script, tmp_path):
    shutil.copytree(measured, tmp_path / "other")
    result = run_script("summarize_run.py", measured, tmp_path / "other", "--output", tmp_path / "table.md")
    assert result.returncode == 0, result.stderr
    line = judge(measured, collect_rounds(measured)).line
    text = (tmp_path / "table.md").read_text()
    assert all(f"{name}: {line}" in said for name in ("run", "other") for said in (text, result.stdout))


# --- without labels --------------------------------------------------------------------------------------------------


def test_half_of_the_pairs_to_label_moved_up_most_and_half_moved_down_most(monkeypatch):
    monkeypatch.setattr(verdict, "PAIRS_TO_LABEL", 4)
    moved = np.array([0, 5, -1, 9, -7, 2, -3, 8])
    texts = [["a"] * 8, ["b"] * 7 + ["a tab\tin it"]]  # which no line of a table can hold
    assert sorted(draw_to_label(moved, texts)) == [1, 3, 4, 6]
    assert sorted(draw_to_label(np.array([0, 1, 0, -2, -3, 0, 0, 0]), texts)) == [1, 4]  # as many of each
    assert len(draw_to_label(np.zeros(8), texts)) == 0


@pytest.fixture
def unlabelled(tiny_bert, corpus, tmp_path):
    """A run that measured nothing, with models."""
    run = tmp_path / "run"
    save_telling_encoders(tmp_path / "models", tiny_bert)
    section = {"students": [{"name": "one", "plm": str(tiny_bert)}], "sentences": "s", "cycles": 1}
    section["pairs"] = str(corpus / "pairs.jsonl")
    layout = Layout(run)
    for place, model in (("contrastive/one", tiny_bert), ("cycle-1/bi-encoder/one", tmp_path / "models/bi")):
        (run / place).parent.mkdir(parents=True)
        (run / place).symlink_to(model)
    (run / "cycle-1/cross-encoder").mkdir()
    (run / "cycle-1/cross-encoder/one").symlink_to(tmp_path / "models/cross")
    recipe = {"run_transencoder": section, "common": {"pooling": "mean", "mixed_precision": "no"}}
    layout.recipe.write_text(yaml.safe_dump(recipe))
    write_stages(make_stages(load_plan(recipe, "x"), run, layout.recipe), layout.plan)
    pq.write_table(read_pairs([str(corpus / "pairs.jsonl")]).data.table, layout.scores(1, "bi"))
    return run


def test_without_labels_the_run_says_how_far_it_went_and_asks_for_the_labels_that_decide(
    unlabelled, monkeypatch, run_script, tmp_path
):
    monkeypatch.setattr("transencoder.run.summary.is_complete", lambda folder: True)
    result = run_script("summarize_run.py", unlabelled)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("VERDICT unknown: there are no labels; start and end rank 64 training pairs with a ")
    assert (unlabelled / "last/bi-encoder/config.json").is_file() and not (unlabelled / "best").exists()
    path = unlabelled / "to_label.tsv"
    command = f"python scripts/summarize_run.py {unlabelled} --tasks labelled={path}"
    assert command in result.stdout and command in (unlabelled / "results.md").read_text()
    header, *rows = path.read_text().splitlines()
    assert header == "sentence1\tsentence2\tlabel" and 0 < len(rows) <= 64 and len(rows) % 2 == 0
    assert all(row.endswith("\t") for row in rows)

    # Somebody labels them as the end orders them; what is labelled is never overwritten.
    filled = "\n".join([header, *(f"{row}{place % 2}" for place, row in enumerate(rows[:-1])), rows[-1]]) + "\n"
    path.write_text(filled)
    result = run_script("summarize_run.py", unlabelled, "--tasks", f"labelled={path}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("VERDICT ") and ") on labelled" in result.stdout
    assert "Nothing was measured" not in result.stdout + (unlabelled / "results.md").read_text()
    line = result.stdout.splitlines()[-1]
    result = run_script("summarize_run.py", unlabelled)  # as the driver does once more: the labels still count
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == line and path.read_text() == filled
    assert "Only start and end were compared" in result.stdout
    assert json.loads((unlabelled / "results.json").read_text())["verdict"] == line
    shutil.copytree(unlabelled, tmp_path / "other", symlinks=True)
    result = run_script("summarize_run.py", unlabelled, tmp_path / "other")
    assert f"run: {line}" in result.stdout and f"other: {line}" in result.stdout

    path.write_text("\n".join([header, *(f"{row}1" for row in rows[:5]), *rows[5:]]) + "\n")  # somebody begins again
    result = run_script("summarize_run.py", unlabelled)
    assert result.returncode == 0 and result.stdout.splitlines()[-1].startswith("VERDICT unknown: there are no labels")
    assert "No verdict yet: " in result.stderr and "every label is 1; AUC needs both labels" in result.stderr
    assert path.read_text().count("\t1\n") == 5

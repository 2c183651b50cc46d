"""Choosing without labels, and the lexical teacher."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import launch, random_pairs
from sklearn.feature_extraction.text import TfidfVectorizer

from transencoder import lexical
from transencoder.config.parsing import parse_stage
from transencoder.data import tables
from transencoder.errors import InputError
from transencoder.lexical import lexical_scores
from transencoder.run.completion import stopped_before
from transencoder.selection import agreement, hold_out, select_by, training_rows

BI = ["--model_name_or_path", "m", "--scores", "s", "--output_dir", "o"]


def bi_arguments(*words):
    return parse_stage("distill_cross2bi", argv=[*BI, *map(str, words)])


def scored(scores, first=None):
    rows = range(len(scores))
    return {
        "sentence1": first or [f"a {row}" for row in rows],
        "sentence2": [f"b {row}" for row in rows],
        "score": [float(score) for score in scores],
    }


def write_scores(path, scores, first=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(scored(scores, first)), path)
    return path


# --- held-out pairs --------------------------------------------------------------------------------------------------


def test_held_out_pairs_are_a_seeded_part_of_the_labels_and_not_trained_on():
    labels = datasets.Dataset.from_dict(scored(range(20)))
    arguments = bi_arguments("--select_by", "agreement", "--num_held_out", 6, "--seed", 1)
    kept, held_out = hold_out(labels, arguments)
    assert training_rows(20, arguments) == len(kept) == 14 and len(held_out.pairs) == 6
    assert sorted([*kept["score"], *held_out.pairs["score"]]) == list(range(20))
    assert list(hold_out(labels, arguments)[1].pairs["score"]) == list(held_out.pairs["score"])
    other = bi_arguments("--select_by", "agreement", "--num_held_out", 6, "--seed", 2)
    assert list(hold_out(labels, other)[1].pairs["score"]) != list(held_out.pairs["score"])


def test_nothing_is_held_out_where_the_choice_is_another():
    labels = datasets.Dataset.from_dict(scored(range(20)))
    for words in ([], ["--dev", "d"], ["--select_by", "last"]):
        kept, held_out = hold_out(labels, bi_arguments(*words))
        assert held_out is None and len(kept) == 20


def test_a_choice_that_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="--num_held_out 11: more than half of the 20 pairs"):
        training_rows(20, bi_arguments("--select_by", "agreement", "--num_held_out", 11))
    step1 = ["--model_name_or_path", "m", "--sentences", "s", "--output_dir", "o", "--select_by", "agreement"]
    with pytest.raises(InputError, match="--select_by agreement: not in step 1"):
        select_by(parse_stage("train_contrastive", argv=step1))


@pytest.mark.slow
def test_the_kept_checkpoint_agrees_best_with_the_teacher(tiny_bert, tmp_path):
    rows = random_pairs(64)
    scores = write_scores(tmp_path / "scores.parquet", [row["score"] / 5 for row in rows])
    table = pq.read_table(scores).to_pydict()
    table |= {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
    pq.write_table(pa.table(table), scores)
    result = launch(
        "distill_cross2bi.py", "--model_name_or_path", tiny_bert, "--pooling", "mean", "--scores", scores,
        "--output_dir", tmp_path / "bi", "--select_by", "agreement", "--num_held_out", 24, "--total_batch_size", 8,
        "--learning_rate", "5e-3", "--num_epochs", 4, "--eval_steps", 2, "--mixed_precision", "no",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    facts = json.loads((tmp_path / "bi/run.json").read_text())
    assert (facts["examples"], facts["steps"], len(facts["history"])) == (40, 20, 12)
    best = max(facts["history"], key=lambda entry: entry["agreement"])
    assert (facts["agreement"], facts["kept_step"]) == (best["agreement"], best["step"])

    # What was saved is what was measured.
    held_out = hold_out(
        datasets.Dataset.from_dict(table), bi_arguments("--select_by", "agreement", "--num_held_out", 24)
    )
    held_out[1].pairs.to_json(tmp_path / "held-out.jsonl")
    words = ["--tasks", f"held={tmp_path / 'held-out.jsonl'}", "--output_dir", tmp_path / "evaluation"]
    result = launch("evaluate_encoders.py", "--encoders", tmp_path / "bi", *words, "--mixed_precision", "no")
    assert result.returncode == 0, result.stderr[-3000:]
    measured = {
        entry["metric"]: entry["value"] for entry in json.loads((tmp_path / "evaluation/results.json").read_text())
    }
    assert measured["spearman"] == pytest.approx(facts["agreement"], abs=1e-3)


# --- the end of the loop ---------------------------------------------------------------------------------------------


def test_agreement_is_the_rank_correlation_of_two_files(tmp_path):
    first = write_scores(tmp_path / "a.parquet", [0.1, 0.2, 0.3, 0.4])
    second = write_scores(tmp_path / "b.parquet", [0.0, 0.9, 0.1, 1.0])
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 (16 - 1)) = 0.8
    assert agreement(first, second) == pytest.approx(0.8)
    assert np.isnan(agreement(first, write_scores(tmp_path / "c.parquet", [0.5] * 4)))
    pq.write_table(pq.read_table(second), tmp_path / "d.parquet", row_group_size=3)  # in other pieces
    assert agreement(first, tmp_path / "d.parquet") == pytest.approx(0.8)


def test_files_that_cannot_be_compared_are_refused(tmp_path):
    first = write_scores(tmp_path / "a.parquet", [0.1, 0.2])
    other = write_scores(tmp_path / "b.parquet", [0.1, 0.2], first=["x", "y"])
    pq.write_table(pa.table({"sentence1": ["a"]}), tmp_path / "else.parquet")
    refusals = [(other, "not the pairs of")]
    refusals += [(tmp_path / f"{name}.parquet", "not a file of scores") for name in ("none", "else")]
    for second, words in refusals:
        with pytest.raises(InputError, match=words):
            agreement(first, second)


def test_the_loop_ends_where_the_labels_hardly_change(tmp_path):
    for cycle, scores in enumerate(([1, 2, 3, 4], [1, 3, 2, 4], [1, 3, 2, 4.5]), start=1):
        write_scores(tmp_path / f"cycle-{cycle}" / "bi-scores.parquet", scores)  # rank correlations 0.8 and 1
    ended = [[stopped_before(tmp_path, cycle, at) for cycle in (1, 2, 3, 4)] for at in (None, 0.9, 0.75)]
    assert ended == [[False] * 4, [False, False, True, False], [False, True, True, False]]


# --- the lexical teacher ---------------------------------------------------------------------------------------------


def test_lexical_scores_follow_what_is_shared():
    pairs = datasets.Dataset.from_dict(
        {
            "sentence1": ["a red parcel", "a red parcel", "a red parcel", "parcels arrived"],
            "sentence2": ["a red parcel", "my red parcels", "quick fox", "the parcel arrives"],
        }
    )
    same, close, none, forms = lexical_scores(pairs)
    assert same == pytest.approx(1.0, abs=1e-6) and none == 0.0
    assert 0.0 < forms < close < 1.0  # other forms of a word share most of its n-grams


def test_lexical_scores_of_two_letters_by_hand():
    # "ab" is " ab " inside its word's borders: n-grams " a" "ab" "b " " ab" "ab " " ab "; "ac" shares only " a".
    # Smoothed idf, 3 sentences: shared by 2 of them ln(4/3) + 1 = 1.287682, in 1 ln(4/2) + 1 = 1.693147.
    # Cosine: 1.287682^2 / (1.287682^2 + 5 * 1.693147^2) = 0.103679
    pairs = datasets.Dataset.from_dict({"sentence1": ["ab", "xy"], "sentence2": ["ac", "ab"]})
    np.testing.assert_allclose(lexical_scores(pairs), [0.103679, 0.0], atol=1e-5)


def test_lexical_scores_do_not_depend_on_the_blocks(monkeypatch):
    pairs = datasets.Dataset.from_list([{n: row[n] for n in ("sentence1", "sentence2")} for row in random_pairs(30)])
    whole = lexical_scores(pairs)
    monkeypatch.setattr(lexical, "COSINE_ROWS", 7)
    monkeypatch.setattr(tables, "BLOCK_ROWS", 5)
    np.testing.assert_allclose(lexical_scores(pairs), whole, atol=1e-6)
    # ... and are what scikit-learn makes of all sentences at once.
    sides = [pairs["sentence1"][:], pairs["sentence2"][:]]
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit(sorted({*sides[0], *sides[1]}))
    first, second = (vectorizer.transform(side) for side in sides)
    np.testing.assert_allclose(whole, np.asarray(first.multiply(second).sum(axis=1)).ravel(), atol=1e-6)


def test_lexical_scores_without_any_letters():
    pairs = datasets.Dataset.from_dict({"sentence1": ["a", " "], "sentence2": ["b", "\t"]})
    assert lexical_scores(pairs).shape == (2,)

"""Teachers of every kind: encoders, files of other tools' scores, shared strings; and their mean."""

import json
import shutil

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import random_pairs, random_sentences, save_telling_encoders, write_jsonl

from transencoder.config.options import HubTarget
from transencoder.config.parsing import parse_stage
from transencoder.contrastive import with_width
from transencoder.data.formats import write_rows
from transencoder.data.tables import PAIRS, read_pairs
from transencoder.embeddings import embed_texts, smoothed
from transencoder.errors import InputError
from transencoder.hub.card import CardContent, method_of, render_card
from transencoder.inference import Inference
from transencoder.labels import believed, teachers_of
from transencoder.losses import ranks, standard_scores
from transencoder.run.plan import load_plan
from transencoder.run.stages import read_stages
from transencoder.scoring import Mean, Teachers
from transencoder.selection import training_rows

ROWS = [("how late", "how is my parcel"), ("pay my order", "cancel it"), ("the app", "a plan"), ("not late", "late")]


@pytest.fixture
def pairs(tmp_path):
    rows = [dict(zip(PAIRS, row, strict=True)) for row in ROWS]
    return read_pairs([str(write_jsonl(tmp_path / "pairs.jsonl", rows))])


def given(tmp_path, pairs, rows, *words, suffix=".csv", ordered=False):
    """The scores of `pairs` in a file with `rows`: sentences and score."""
    path = tmp_path / f"scores{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_dict(dict(zip((*PAIRS, "score"), zip(*rows, strict=True), strict=True))).to_parquet(path)
    else:
        write_rows(path, [*PAIRS, "score"], rows)
    words = ["--encoders", "e", "--pairs", "p", "--output", "o", "--scores", str(path), *words]
    return teachers_of(parse_stage("score_pairs", argv=words), ["e"], pairs, ordered).given[0]


def test_ranks_and_standard_scores():
    # Of four scores the middles of the quarters; the two equal ones share the middle of both.
    assert ranks(np.array([0.9, 0.1, 0.5, 0.5])).tolist() == [0.875, 0.125, 0.5, 0.5]
    # Mean 2, deviation sqrt((1 + 1 + 0 + 0) / 4)
    assert standard_scores(np.array([1.0, 3.0, 2.0, 2.0])) == pytest.approx([-(2**0.5), 2**0.5, 0, 0])
    assert standard_scores(np.full(3, 0.1, dtype=np.float32)).tolist() == [0, 0, 0]


def test_a_pairs_mean_is_over_the_teachers_that_scored_it():
    mean = Mean(3, "none")
    mean.add(np.array([0.1, 0.2, 0.3]), 3.0)
    mean.add(np.array([0.5, np.nan, 0.7]), 1.0)
    # (3 x 0.1 + 0.5) / 4, 0.2 alone, (3 x 0.3 + 0.7) / 4
    assert mean.scores() == pytest.approx([0.2, 0.2, 0.4])


def test_teachers_disagree_by_the_weighted_deviation_of_their_scores():
    mean = Mean(3, "none")
    mean.add(np.array([0.1, 0.2, 0.5]), 3.0)
    assert mean.disagreement() is None
    mean.add(np.array([0.5, np.nan, 0.5]), 1.0)
    # The mean 0.2: sqrt((3 x 0.1^2 + 0.3^2) / 4); one teacher, so the median of the others; equal scores
    assert mean.disagreement() == pytest.approx([0.03**0.5, 0.03**0.5 / 2, 0], abs=1e-7)
    mean = Mean(4, "rank")
    mean.add(np.array([0.61, 0.6, 0.62, 0.63]), 1.0)
    mean.add(np.array([3.0, 1.0, 7.0, 5.0]), 1.0)
    assert mean.disagreement() == pytest.approx([0, 0, 1 / 8, 1 / 8])  # ranks 5/8 and 7/8, the other way round


def test_scores_on_any_scale_are_put_on_one():
    ours, theirs = np.array([0.61, 0.6, 0.62, 0.63]), np.array([np.nan, 1.0, 5.0, 3.0])
    mean = Mean(4, "rank")
    mean.add(ours, 1.0)
    mean.add(theirs, 1.0)
    # Ranks 3/8, 1/8, 5/8, 7/8 and -, 1/6, 5/6, 3/6
    assert mean.scores() == pytest.approx([3 / 8, 7 / 48, 35 / 48, 33 / 48])
    mean = Mean(4, "standard")
    mean.add(ours, 1.0)
    # Standard scores -0.447214, -1.341641, 0.447214, 1.341641; sigmoids of twice them
    assert mean.scores() == pytest.approx([0.290193, 0.063967, 0.709807, 0.936033], abs=1e-5)


def test_pairs_count_as_the_teachers_agree_on_them():
    def rows(disagreement, *words):
        words = ["--model_name_or_path", "m", "--scores", "s", "--output_dir", "o", *words]
        arguments = parse_stage("distill_cross2bi", argv=words)
        table = datasets.Dataset.from_dict({"row": range(len(disagreement)), "disagreement": disagreement})
        found = list(believed(table, arguments)["row"])
        assert len(found) == training_rows(len(disagreement), arguments)
        return found

    apart, drop, weight = [0.3, 0.1, 0.4, 0.2], ["--drop_disagreement", "0.25"], "--weight_disagreement"
    assert rows(apart) == [0, 1, 2, 3]
    assert rows(apart, *drop) == [0, 1, 3]
    # Weights 3/4, 7/4, 1/4, 5/4, which reach to 0.75, 2.5, 2.75, 4: where 0.5, 1.5, 2.5, 3.5 fall
    assert rows(apart, weight) == [0, 1, 1, 3]
    assert rows(apart, *drop, weight) == [1, 1, 3]  # 1/3, 5/3, 1
    assert rows([0.1] * 5, weight) == [0, 1, 2, 3, 4]
    equal = rows([0.1] * 100, "--drop_disagreement", "0.5")
    assert 50 not in (sum(row < 50 for row in equal), sum(row >= 50 for row in equal))  # not the file's last
    assert equal != rows([0.1] * 100, "--drop_disagreement", "0.5", "--seed", "1")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_of_scores_is_matched_by_text_in_either_order(tmp_path, pairs, suffix, capsys):
    first, second = ROWS[0], ROWS[1]
    rows = [("not", "ours", 0.5), (*second[::-1], 0.25), (*first, 0.75), (*first[::-1], 0.25), (*first, 0.5)]
    found = given(tmp_path, pairs, rows, suffix=suffix)
    np.testing.assert_allclose(found, [0.5, 0.25, np.nan, np.nan])  # the mean of what it has of a pair
    assert "scores of 2 of 4 pairs; the others have a mean without it" in capsys.readouterr().err
    given(tmp_path, pairs, rows, "--teacher_scale", "standard", suffix=suffix)
    assert "scores of 2 of 4 pairs\n" in capsys.readouterr().err
    found = given(tmp_path, pairs, rows, suffix=suffix, ordered=True)
    np.testing.assert_allclose(found, [0.625, np.nan, np.nan, np.nan])


def test_a_file_of_scores_that_cannot_be_used_is_refused(tmp_path, pairs):
    with pytest.raises(InputError, match=r"scores.csv: none of its 2 pairs is to be scored"):
        given(tmp_path, pairs, [("a", "b", 0.5), ("c", "d", 0.6)])
    rows = [(*ROWS[0], 0.5), (*ROWS[1], 4.0)]
    with pytest.raises(InputError, match=r"row 2: score 4.0 is not in \[-1, 1\].*--teacher_scale rank or standard"):
        given(tmp_path, pairs, rows)
    assert given(tmp_path, pairs, rows, "--teacher_scale", "rank")[1] == 4.0


@pytest.fixture(scope="module")
def encoders(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    save_telling_encoders(folder, tiny_bert)
    return [folder / "bi", folder / "cross"]


def test_labels_are_the_mean_of_encoders_files_and_strings(encoders, tmp_path, run_script):
    """What score_pairs.py writes is what a distillation makes of the same options."""
    rows = [{name: row[name] for name in (*PAIRS, "score")} for row in random_pairs(24)]
    pairs, theirs = write_jsonl(tmp_path / "pairs.jsonl", rows), write_jsonl(tmp_path / "theirs.jsonl", rows[::2])

    def score(name, *words):
        path = tmp_path / f"{name}.parquet"
        result = run_script("score_pairs.py", "--pairs", pairs, "--output", path, "--mixed_precision", "no", *words)
        assert result.returncode == 0, result.stderr
        return pq.read_table(path)["score"].to_numpy()

    bi, cross = (score(encoder.name, "--encoders", encoder) for encoder in encoders)
    mixed = ["--scores", theirs, "--teacher_scale", "rank", "--teacher_weights", 2, 1, 1]
    found = score("all", "--encoders", *encoders, *mixed)
    other = np.full(24, np.nan)
    other[::2] = ranks(np.array([row["score"] for row in rows[::2]]))
    weights = np.array([[2.0], [1.0], [1.0]]) * ~np.isnan([bi, cross, other])
    expected = (weights * np.nan_to_num([ranks(bi), ranks(cross), other])).sum(axis=0) / weights.sum(axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert ((found > 0) & (found < 1)).all()
    apart = (weights * (np.nan_to_num([ranks(bi), ranks(cross), other]) - expected) ** 2).sum(axis=0)
    kept = pq.read_table(tmp_path / "all.parquet")["disagreement"].to_numpy()
    np.testing.assert_allclose(kept, np.sqrt(apart / weights.sum(axis=0)), atol=1e-6)
    assert "disagreement" not in pq.read_schema(tmp_path / "cross.parquet").names

    words = ["--teachers", *encoders, "--pairs", pairs, *mixed, "--total_batch_size", 8, "--max_steps", 1]
    words += ["--model_name_or_path", encoders[0], "--output_dir", tmp_path / "student", "--mixed_precision", "no"]
    result = run_script("distill_cross2bi.py", *words)
    assert result.returncode == 0, result.stderr
    assert (pq.read_table(tmp_path / "student" / "teacher-scores.parquet")["score"].to_numpy() == found).all()


def test_a_student_need_not_learn_what_its_teachers_disagree_on(encoders, tmp_path, run_script):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", random_pairs(24))
    words = ["--model_name_or_path", encoders[1], "--total_batch_size", 8, "--max_steps", 1]
    words += ["--output_dir", tmp_path / "student", "--drop_disagreement", 0.5, "--weight_disagreement"]
    of_teacher = ["--teachers", encoders[1], "--pairs", pairs]
    result = run_script("distill_bi2cross.py", *words, *of_teacher, "--both_orders", "--smooth_neighbours", 3)
    assert result.returncode == 0, result.stderr
    assert "24 pairs, 24 examples" in result.stderr  # 12 are left, in both orders
    assert "12 of 24 pairs are dropped: the teachers disagree on them most" in result.stderr
    assert json.loads((tmp_path / "student" / "run.json").read_text())["examples"] == 24
    card = render_card(CardContent("acme/x", tmp_path / "student", "cross", str(encoders[1]), ""), HubTarget())
    assert "The 50 % of the pairs on which its teachers disagreed most were left out." in card
    assert "It saw a pair the more often the better its teachers agreed on it" in card
    assert "compared neighbourhoods: each sentence's 3 nearest in the data." in card

    words += ["--overwrite"]
    result = run_script("distill_bi2cross.py", *words, *of_teacher)
    assert result.returncode == 2 and "--drop_disagreement: one teacher scores the pairs" in result.stderr
    result = run_script("distill_bi2cross.py", *words, "--scores", pairs, "--rescale", "logistic")
    assert result.returncode == 2 and "no column 'disagreement'" in result.stderr


# --- step 1 ----------------------------------------------------------------------------------------------------------


def test_fewer_dimensions_keep_the_inner_products_of_what_has_no_more():
    draw = np.random.default_rng(0)
    flat = draw.normal(size=(20, 3)) @ draw.normal(size=(3, 8))
    flat = (flat / np.linalg.norm(flat, axis=1, keepdims=True)).astype(np.float32)
    for width in (3, 5, 8, 10):
        reduced = with_width(flat, width)
        assert reduced.shape == (20, width)
        np.testing.assert_allclose(reduced @ reduced.T, flat @ flat.T, atol=1e-5)


def test_a_student_learns_a_teachers_similarities(encoders, tiny_roberta, corpus, tmp_path, run_script):
    """The teacher is 32 wide, the student 24."""
    sentences, pairs = corpus / "sentences.txt", corpus / "test.jsonl"

    def agreement(name, encoder, *words):
        for one, path in ((encoders[0], tmp_path / "teacher.parquet"), (encoder, tmp_path / f"{name}.parquet")):
            arguments = ["--encoders", one, "--pairs", pairs, "--output", path, "--overwrite", *words]
            assert run_script("score_pairs.py", *arguments).returncode == 0
        scores = [pq.read_table(tmp_path / f"{one}.parquet")["score"].to_numpy() for one in ("teacher", name)]
        return np.corrcoef(*scores)[0, 1]

    words = ["--model_name_or_path", tiny_roberta, "--sentences", sentences, "--output_dir", tmp_path / "student"]
    words += ["--teacher", encoders[0], "--queue_size", 50, "--pooling", "mean", "--total_batch_size", 16]
    words += ["--num_epochs", 12, "--learning_rate", "3e-3", "--mixed_precision", "no"]
    result = run_script("train_contrastive.py", *words)
    assert result.returncode == 0, result.stderr
    found = agreement("student", tmp_path / "student")
    assert found > 0.5 and found > agreement("start", tiny_roberta, "--pooling", "mean") + 0.1
    assert not (tmp_path / "student" / "checkpoints").exists()
    card = method_of(json.loads((tmp_path / "student" / "run.json").read_text()))
    assert "a sentence is as similar to others as a teacher finds it" in card


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--loss", "teacher"], "--loss teacher: needs a bi-encoder to learn from"),
        (["--teacher", "t", "--method", "mirror"], "--teacher: goes with --method simcse"),
        (["--teacher", "no/model"], "no/model"),
        (["--teacher", "tiny_bert", "--pooling", "mean"], "a plain language model, where a sentence model is needed"),
    ],
)
def test_a_teacher_of_step_1_that_cannot_be_is_refused(step1, tiny_bert, tmp_path, run_script, words, expected):
    words = [tiny_bert if word == "tiny_bert" else word for word in words]
    result = run_script("train_contrastive.py", *step1, tmp_path / "out", *words)
    assert result.returncode == 2 and expected in result.stderr


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe_with(teachers, encoders, tiny_bert, pairs) -> dict:
    student = {"name": "one", "bi_encoder": str(encoders[0]), "plm": str(tiny_bert)}
    stage = {"total_batch_size": 8, "max_steps": 1}
    return {
        "common": {"mixed_precision": "no"},
        "run_transencoder": {"students": [student], "pairs": str(pairs), "cycles": 1, "teachers": teachers},
        "score_pairs": {"both_orders": True, "lexical_weight": 0.25, "teacher_scale": "rank"},
        "distill_bi2cross": stage,
        "distill_cross2bi": stage,
    }


def test_a_recipes_teachers_score_the_pairs_once_and_count_in_both_distillations(
    encoders, tiny_bert, tmp_path, run_script
):
    rows = [{name: row[name] for name in (*PAIRS, "score")} for row in random_pairs(24)]
    pairs, theirs = write_jsonl(tmp_path / "pairs.jsonl", rows), write_jsonl(tmp_path / "theirs.jsonl", rows[::2])
    teachers = [{"model": str(encoders[1]), "weight": 2}, {"scores": str(theirs)}]
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(recipe_with(teachers, encoders, tiny_bert, pairs)))
    for script, words in (("plan_run.py", ["--recipe", recipe, "--output_dir", run]), ("run_stages.py", [run])):
        result = run_script(script, *words)
        assert result.returncode == 0, result.stderr
    stages = read_stages(run / "plan.jsonl")
    assert [stage.script for stage in stages].count("score_pairs.py") == 3
    theirs_alone, bi, cross = (
        pq.read_table(stage.output)["score"].to_numpy() for stage in stages if stage.script == "score_pairs.py"
    )
    words = ["--pairs", pairs, "--both_orders", "--encoders", encoders[1], "--output", tmp_path / "alone.parquet"]
    assert run_script("score_pairs.py", *words, "--mixed_precision", "no").returncode == 0
    alone = pq.read_table(tmp_path / "alone.parquet")["score"].to_numpy()
    np.testing.assert_array_equal(theirs_alone, alone)  # without the recipe's scale and lexical weight
    assert np.corrcoef(bi, cross)[0, 1] > 0.5  # what is the same in both


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        ("cross", "must be a list, each with a model or with scores"),
        ([{"weight": 1}], "each has a model, perhaps with a label, or scores"),
        ([{"model": "m", "scores": "s.csv"}], "each has a model"),
        ([{"scores": "s.csv", "label": "entailment"}], "each has a model"),
        ([{"model": "m", "weight": 0}], "teachers.weight must be a positive number, not 0"),
        ([{"model": 3}], "teachers.model must be a name, not 3"),
        ([{"modell": "m"}], "unknown key 'modell'"),
    ],
)
def test_bad_teachers_of_a_recipe_are_refused(teachers, expected):
    recipe = recipe_with(teachers, ["b", "c"], "m", "p")
    with pytest.raises(InputError, match=expected):
        load_plan(recipe, "r")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"teacher_weights": [1]}, "teachers has the weights and the files of scores itself"),
        ({}, "none of its 2 pairs is to be scored"),
    ],
)
def test_teachers_that_do_not_go_with_the_pairs_are_refused_before_any_work(
    change, expected, encoders, tiny_bert, tmp_path, run_script
):
    pairs, theirs = (write_jsonl(tmp_path / f"{n}.jsonl", random_pairs(n, n)) for n in (24, 2))
    recipe = recipe_with([{"scores": str(theirs)}], encoders, tiny_bert, pairs)
    recipe["score_pairs"] |= change
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run_script("plan_run.py", "--recipe", path, "--output_dir", tmp_path / "run")
    assert result.returncode == 2 and expected in result.stderr
    assert not (tmp_path / "run").exists()


def test_scores_without_bounds_want_a_scale_before_any_work(encoders, tiny_bert, tmp_path, run_script):
    reranker, config = tmp_path / "reranker", "config_sentence_transformers.json"
    shutil.copytree(encoders[1], reranker)
    said = json.loads((reranker / config).read_text()) | {"activation_fn": "torch.nn.modules.linear.Identity"}
    (reranker / config).write_text(json.dumps(said))
    rows = [{**row, "score": place} for place, row in enumerate(random_pairs(24))]
    pairs, output = write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "scores.parquet"
    words, scale = ["--pairs", pairs, "--output", output, "--encoders", reranker], ["--teacher_scale", "rank"]
    refused, more = f"{reranker}: its scores are dot products or logits", "--teacher_scale rank or standard puts all"
    result = run_script("score_pairs.py", *words, encoders[0])
    assert result.returncode == 2 and refused in result.stderr and more in result.stderr
    assert run_script("score_pairs.py", *words, encoders[0], *scale).returncode == 0
    assert run_script("score_pairs.py", *words, "--overwrite").returncode == 0  # alone it has its own scale

    path = tmp_path / "recipe.yaml"
    for teacher, expected in (
        ({"model": str(reranker)}, refused),
        ({"scores": str(pairs)}, "row 3: score 2.0 is not"),
    ):
        recipe = recipe_with([teacher], encoders, tiny_bert, pairs)
        del recipe["run_transencoder"]["pairs"], recipe["score_pairs"]["teacher_scale"]  # mined later
        sentences = tmp_path / "sentences.txt"
        sentences.write_text("\n".join(random_sentences(40)))
        recipe["run_transencoder"]["sentences"] = str(sentences)
        path.write_text(yaml.safe_dump(recipe))
        result = run_script("plan_run.py", "--recipe", path, "--output_dir", tmp_path / "run")
        assert result.returncode == 2 and expected in result.stderr and more in result.stderr


def test_a_bi_encoder_can_compare_neighbourhoods(tmp_path, pairs, tiny_bert):
    save_telling_encoders(tmp_path, tiny_bert)
    bi, cross = str(tmp_path / "bi"), str(tmp_path / "cross")
    inference = Inference(Accelerator(), 4096)

    def scores(neighbours, name=bi, **kwargs):
        return Teachers([name], neighbours=neighbours, **kwargs).score([pairs], inference)[0]

    encoder = inference.load(bi)
    sentences = sorted({text for row in ROWS for text in row})
    vectors = smoothed(embed_texts(encoder, sentences, inference), 2, torch.device("cpu"))
    places = [[sentences.index(text) for text in side] for side in zip(*ROWS, strict=True)]
    expected = (vectors[places[0]] * vectors[places[1]]).sum(axis=1)
    assert scores(2) == pytest.approx(expected, abs=1e-5)
    assert np.abs(scores(2) - scores(0)).max() > 1e-3
    assert scores(2, cross) == pytest.approx(scores(0, cross))
    assert np.isfinite(scores(1000)).all()  # more than there are sentences


def test_a_recipe_with_one_teacher_has_no_disagreement(encoders, tiny_bert, tmp_path, run_script):
    """Both orders are two teachers of the bi-encoder, whose labels are the cross-encoder's, and one of the other."""
    recipe = recipe_with([], encoders, tiny_bert, write_jsonl(tmp_path / "pairs.jsonl", random_pairs(24)))
    recipe["score_pairs"] = {"both_orders": True}
    path = tmp_path / "recipe.yaml"
    for number, (stage, code) in enumerate((("distill_bi2cross", 2), ("distill_cross2bi", 0))):
        path.write_text(yaml.safe_dump(recipe | {stage: recipe[stage] | {"weight_disagreement": True}}))
        result = run_script("plan_run.py", "--recipe", path, "--output_dir", tmp_path / f"run-{number}")
        assert result.returncode == code, result.stderr
        assert ("--weight_disagreement: one teacher scores the pairs" in result.stderr) == (code == 2)

"""Every stage through the real launcher, with one and with two processes, and what bad input gets."""

import importlib.util
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import launch, random_pairs, write_jsonl

from transencoder.model_checks import inspect_encoder
from transencoder.runtime.backends import cpu_cores

QUICK = [
    "--total_batch_size",
    16,
    "--eval_steps",
    4,
    "--mixed_precision",
    "no",
    "--dropout",
    0,
    "--learning_rate",
    "1e-3",
]


def run_file(folder):
    return json.loads((folder / "run.json").read_text())


def must(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def train_start(tiny_bert, corpus, output, processes=1, *more, cold=False):
    must(
        launch(
            "train_contrastive.py", "--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt",
            "--output_dir", output, "--pooling", "mean", "--dev", corpus / "dev.jsonl", *QUICK, *more,
            processes=processes, cold=cold,
        )
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def start(tiny_bert, corpus, tmp_path_factory):
    return train_start(tiny_bert, corpus, tmp_path_factory.mktemp("runs") / "start")


@pytest.fixture(scope="module")
def bi_scores(start, corpus):
    path = start.parent / "bi-scores.parquet"
    words = ["--encoders", start, "--pairs", corpus / "pairs.jsonl", "--output", path]
    result = must(launch("score_pairs.py", *words))  # with one thread
    assert ("cores idle" in result.stderr) == (cpu_cores() > 1)
    return path


def train_cross(tiny_bert, bi_scores, corpus, output, processes=1, *more):
    must(
        launch(
            "distill_bi2cross.py", "--model_name_or_path", tiny_bert, "--scores", bi_scores, "--output_dir", output,
            "--dev", corpus / "dev.jsonl", *QUICK, *more, processes=processes,
        )
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def cross(tiny_bert, bi_scores, corpus):
    return train_cross(tiny_bert, bi_scores, corpus, bi_scores.parent / "cross")


def losses(folder):
    return [entry["loss"] for entry in run_file(folder)["history"]]


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_contrastive_is_the_same_with_one_and_two_processes(tiny_bert, corpus, start, tmp_path):
    two = train_start(tiny_bert, corpus, tmp_path / "two", 2, cold=True)  # nothing is imported before: as a user does
    assert run_file(start)["world_size"] == 1 and run_file(two)["world_size"] == 2
    assert losses(two) == pytest.approx(losses(start), rel=1e-4)
    for name, value in weights(start).items():
        np.testing.assert_allclose(weights(two)[name], value, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_mirror_masks_a_span_and_can_drop_heads(tiny_bert, corpus, tmp_path):
    folder = train_start(tiny_bert, corpus, tmp_path / "mirror", 1, "--method", "mirror", "--drophead", 0.1)
    facts = run_file(folder)
    assert facts["arguments"]["temperature"] == 0.04 and facts["arguments"]["mlp_head"] is False
    assert np.isfinite(losses(folder)).all()


@pytest.mark.slow
def test_scores_keep_the_order_and_do_not_depend_on_the_number_of_processes(start, corpus, bi_scores, tmp_path):
    two = tmp_path / "two.parquet"
    # So few tokens a batch that there are many, unevenly shared, batches.
    words = ["--encoders", start, "--pairs", corpus / "pairs.jsonl", "--output", two, "--eval_batch_tokens", 50]
    result = must(launch("score_pairs.py", *words, "--mixed_precision", "no", processes=2))
    assert "cores idle" not in result.stderr
    assert json.loads(pq.read_schema(two).metadata[b"transencoder"])["world_size"] == 2
    one, other = pq.read_table(bi_scores).to_pydict(), pq.read_table(two).to_pydict()
    pairs = [json.loads(line) for line in (corpus / "pairs.jsonl").read_text().splitlines()]
    assert one["sentence1"] == [pair["sentence1"] for pair in pairs]
    assert one["sentence2"] == other["sentence2"] == [pair["sentence2"] for pair in pairs]
    np.testing.assert_allclose(
        other["score"], one["score"], atol=2e-2
    )  # `one` was scored with autocast where there is bf16


@pytest.mark.slow
def test_several_encoders_of_both_kinds_are_averaged(start, cross, corpus, tmp_path):
    found = {}
    for name, encoders in {"bi": [start], "cross": [cross], "both": [start, cross]}.items():
        path = tmp_path / f"{name}.parquet"
        must(
            launch(
                "score_pairs.py", "--encoders", *encoders, "--pairs", corpus / "pairs.jsonl", "--output", path,
                "--mixed_precision", "no",
            )
        )  # fmt: skip
        found[name] = pq.read_table(path)["score"].to_numpy()
    np.testing.assert_allclose(found["both"], (found["bi"] + found["cross"]) / 2, atol=1e-6)


@pytest.mark.slow
def test_cross_encoder_is_the_same_with_two_processes_and_with_accumulation(
    tiny_bert, bi_scores, corpus, cross, tmp_path
):
    two = train_cross(tiny_bert, bi_scores, corpus, tmp_path / "two", 2)
    pieces = train_cross(tiny_bert, bi_scores, corpus, tmp_path / "pieces", 1, "--micro_batch_size", 4)
    assert run_file(two)["world_size"] == 2 and run_file(pieces)["gradient_accumulation_steps"] == 4
    assert run_file(cross)["examples"] == 128  # 64 pairs, each in both orders
    for other in (two, pieces):
        assert losses(other) == pytest.approx(losses(cross), rel=1e-4)
        for name, value in weights(cross).items():
            np.testing.assert_allclose(weights(other)[name], value, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_the_kept_cross_encoder_is_the_best_one_on_dev(cross, corpus, tmp_path):
    facts = run_file(cross)
    assert facts["dev"] == max(entry["dev"] for entry in facts["history"])
    words = ["--encoders", cross, "--tasks", f"mine={corpus / 'dev.jsonl'}", "--output_dir", tmp_path / "evaluation"]
    must(launch("evaluate_encoders.py", *words, "--mixed_precision", facts["mixed_precision"], processes=2))
    assert run_file(tmp_path / "evaluation")["world_size"] == 2
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert {entry["metric"]: entry["value"] for entry in results}["spearman"] == pytest.approx(facts["dev"], abs=1e-3)
    assert [results[0][key] for key in ("kind", "task", "split", "n")] == ["cross", "mine", "test", 40]


@pytest.mark.slow
def test_bi_encoder_learns_from_teachers_given_as_folders(start, cross, corpus, tmp_path):
    def train(name, processes):
        must(
            launch(
                "distill_cross2bi.py", "--model_name_or_path", start, "--teachers", cross,
                "--pairs", corpus / "pairs.jsonl", "--output_dir", tmp_path / name, "--num_epochs", 5, *QUICK,
                processes=processes,
            )
        )  # fmt: skip
        return tmp_path / name

    one, two = train("one", 1), train("two", 2)
    assert run_file(two)["world_size"] == 2
    assert pq.read_table(one / "teacher-scores.parquet").num_rows == 64
    assert losses(one)[-1] < losses(one)[0]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert run_file(one)["kept_step"] == run_file(one)["steps"]  # no dev set: the last


@pytest.mark.slow
def test_a_run_of_its_own_is_not_done_twice_and_another_one_is_refused(start, step1, tiny_bert, corpus):
    before = (start / "model.safetensors").stat().st_mtime_ns
    train_start(tiny_bert, corpus, start)
    assert (start / "model.safetensors").stat().st_mtime_ns == before
    words = [*step1, start, "--seed", 5]
    refused(
        launch("train_contrastive.py", *words, direct=True), str(start), "holds another run's results", "--overwrite"
    )
    assert (start / "model.safetensors").stat().st_mtime_ns == before


def test_scores_have_the_rows_and_columns_of_their_pairs(bi_encoder, tmp_path, run_script):
    (tmp_path / "pairs.csv").write_text("id,sentence1,sentence2\nx,a,b\ny,a,b\nz,c,d\n")
    words = ["--encoders", bi_encoder, "--pairs", tmp_path / "pairs.csv", "--drop_duplicates"]
    must(run_script("score_pairs.py", *words, "--output", tmp_path / "out.parquet", "--keep", "id"))
    found = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert list(found) == ["sentence1", "sentence2", "score", "id", "row"]
    assert found["id"] == ["x", "z"] and found["row"] == [1, 3]
    wrong = run_script("score_pairs.py", *words, "--output", tmp_path / "other.parquet", "--keep", "score")
    refused(wrong, "--keep score: the results have such a column anyway")


@pytest.mark.slow
def test_scores_of_a_file_that_has_changed_are_not_taken_for_the_old_ones(start, corpus, tmp_path, run_script):
    pairs = shutil.copy(corpus / "pairs.jsonl", tmp_path / "pairs.jsonl")
    words = ["--encoders", start, "--pairs", pairs, "--output", tmp_path / "out.parquet"]
    must(run_script("score_pairs.py", *words))
    assert "complete already" in must(run_script("score_pairs.py", *words)).stderr
    write_jsonl(pairs, random_pairs(10, seed=9))
    refused(run_script("score_pairs.py", *words), "out.parquet", "pairs.jsonl has changed", "--overwrite")
    must(run_script("score_pairs.py", *words, "--overwrite"))
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 10


@pytest.mark.slow
def test_a_cross_encoder_over_a_bi_encoder_leaves_nothing_of_it(start, tiny_bert, bi_scores, tmp_path, run_script):
    folder = shutil.copytree(start, tmp_path / "model")
    words = ["--model_name_or_path", tiny_bert, "--scores", bi_scores, "--output_dir", folder, "--max_steps", 2]
    refused(run_script("distill_bi2cross.py", *words), "holds the result of train_contrastive")
    must(run_script("distill_bi2cross.py", *words, "--overwrite"))
    assert inspect_encoder(str(folder)) == "cross" and not (folder / "1_Pooling").exists()


@pytest.mark.slow
def test_evaluation_of_an_ensemble_and_of_labels(start, cross, corpus, tmp_path):
    rows = [{"label": int(row.pop("score") > 2.5), **row} for row in random_pairs(40, seed=3)]
    words = ["--encoders", start, cross, "--ensemble", "--output_dir", tmp_path / "out"]
    result = must(launch("evaluate_encoders.py", *words, "--tasks", f"dup={write_jsonl(tmp_path / 'd.jsonl', rows)}"))
    (entry,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert entry["metric"] == "auc" and entry["kind"] == "bi+cross" and len(entry["encoders"]) == 2
    assert (tmp_path / "out" / "results.md").read_text() in result.stdout


# --- bad input: one line, exit code 2, before any model is loaded ---------------------------------------------------


def refused(result, *words):
    """The script said one line that holds `words`, and nothing else, and exited with 2."""
    assert result.returncode == 2, result.stderr[-3000:]
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and result.stdout == "", result.stderr
    assert all(word in lines[0] for word in words), lines[0]


BAD = {
    "no such file": ("missing.tsv", None, ["missing.tsv", "no such file"]),
    "empty file": ("empty.tsv", "", ["empty.tsv", "empty"]),
    "empty sentence": ("hole.tsv", "sentence1\tsentence2\na\tb\nc\t\n", ["hole.tsv", "row 2", "sentence2"]),
    "wrong column": (
        "column.tsv",
        "question1\tsentence2\na\tb\n",
        ["column.tsv", "sentence1", "question1", "--columns"],
    ),
    "one sentence": ("one.tsv", "sentence1\tsentence2\na\ta\n", ["one.tsv", "fewer than two"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused(case, tiny_bert, tmp_path, run_script):
    name, content, words = BAD[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    output = tmp_path / "out.parquet"
    given = ["--encoders", tiny_bert, "--pooling", "mean", "--pairs", tmp_path / name, "--output", output]
    refused(run_script("score_pairs.py", *given), *words)
    assert not output.exists()


def test_bad_scores_are_refused(tiny_bert, tmp_path, run_script):
    path = tmp_path / "scores.tsv"
    path.write_text("sentence1\tsentence2\tscore\na\tb\t0.5\nc\td\tnan\n")
    words = ["--model_name_or_path", tiny_bert, "--scores", path, "--output_dir", tmp_path / "out"]
    refused(run_script("distill_bi2cross.py", *words), "scores.tsv", "row 2", "score")
    path.write_text("sentence1\tsentence2\tscore\na\tb\t0.5\nc\td\t4.5\n")
    refused(run_script("distill_bi2cross.py", *words), "scores.tsv", "row 2", "4.5", "[-1, 1]")
    path.write_text("sentence1\tsentence2\tscore\na\tb\t0.5\nc\td\tmuch\n")
    refused(run_script("distill_bi2cross.py", *words), "scores.tsv", "row 2", "much")
    assert not (tmp_path / "out").exists()


def test_unknown_flags_and_keys_are_refused(tmp_path, run_script):
    refused(run_script("score_pairs.py", "--encodres", "x"), "--encoders")
    required = ["--encoders", "x", "--pairs", "y", "--output", "z"]
    refused(run_script("score_pairs.py", *required, "--bogus", 1), "--bogus")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("score_pairs:\n  encodres: [x]\n")
    refused(run_script("score_pairs.py", "--recipe", recipe), "r.yaml", "encodres")


def test_flags_that_cannot_work_are_refused(tiny_bert, corpus, tmp_path, run_script):
    words = ["--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt"]
    words += ["--output_dir", tmp_path / "out"]
    refused(run_script("train_contrastive.py", *words, "--select_by", "dev"), "--select_by", "--dev")
    refused(run_script("train_contrastive.py", *words, "--num_epochs", 0), "--num_epochs 0")
    refused(run_script("train_contrastive.py", *words, "--total_batch_size", 97), "96 examples", "--total_batch_size")
    words = ["--encoders", tiny_bert, "--pooling", "mean", "--pairs", corpus / "pairs.jsonl"]
    words += ["--output", tmp_path / "out.parquet"]
    for weights in ([1, 2], [0], ["nan"]):
        given = ["--teacher_weights", *weights]
        refused(run_script("score_pairs.py", *words, *given), "--teacher_weights", "one positive number", "1 teacher")
    words = ["--encoders", tiny_bert, "--tasks", f"mine={corpus / 'dev.jsonl'}", "--output_dir", tmp_path / "out"]
    words += ["--pooling", "mean"]
    refused(run_script("evaluate_encoders.py", *words, "--paper", "bert"), "--paper", "no 'bert'", "declutr/self")
    refused(run_script("evaluate_encoders.py", *words, "--ensemble", "--with_ensembles"), "--with_ensembles")
    words = ["--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt"]
    words += ["--output_dir", tmp_path / "out"]
    if importlib.util.find_spec("wandb") is None:
        refused(run_script("train_contrastive.py", *words, "--report_to", "wandb"), "--report_to wandb", "pip install")
    assert not (tmp_path / "out").exists()


def test_what_is_no_encoder_is_refused(tiny_bert, corpus, tmp_path, run_script):
    words = ["--pairs", corpus / "pairs.jsonl", "--output", tmp_path / "out.parquet", "--encoders"]
    refused(run_script("score_pairs.py", *words, corpus), str(corpus), "not an encoder")
    refused(run_script("score_pairs.py", *words, "some/model"), "some/model", "Hub", "folder")
    refused(run_script("score_pairs.py", *words, tiny_bert), str(tiny_bert), "--pooling")
    damaged = shutil.copytree(tiny_bert, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((tiny_bert / "model.safetensors").read_bytes()[:-100])
    refused(run_script("score_pairs.py", *words, damaged, "--pooling", "cls"), "model.safetensors", "damaged")
    words[3] = tmp_path / "out.tsv"
    refused(run_script("score_pairs.py", *words, tiny_bert, "--pooling", "cls"), "out.tsv", ".parquet")


@pytest.mark.slow
def test_a_cross_encoder_can_be_trained_on(cross, tiny_bert, bi_scores, tmp_path, run_script):
    def train(start, output, *more):
        words = ["--model_name_or_path", start, "--scores", bi_scores, "--output_dir", output, "--max_steps", 1]
        return run_script("distill_bi2cross.py", *words, "--learning_rate", "1e-9", "--mixed_precision", "no", *more)

    assert "keeps its head" in must(train(cross, tmp_path / "a", "--loss", "mse")).stderr
    for name, value in weights(cross).items():  # the head's weights too
        np.testing.assert_allclose(weights(tmp_path / "a")[name], value, atol=1e-6, err_msg=name)
    # The loss of one step: below 1/4 in every case for squares, and for these logits near log 2 for cross-entropies.
    must(train(cross, tmp_path / "b", "--loss", "bce"))
    assert losses(tmp_path / "a")[0] < 0.25 < losses(tmp_path / "b")[0]


@pytest.mark.slow
def test_a_training_is_the_same_where_its_tokens_are_made_batch_by_batch(tiny_bert, tmp_path, run_script, monkeypatch):
    rows = [{**row, "score": row["score"] / 5} for row in random_pairs(32)]
    scores = write_jsonl(tmp_path / "scores.jsonl", rows)
    for name, limit in (("before", 10**6), ("later", 63)):
        monkeypatch.setattr("transencoder.data.tokens.TOKENIZED_ROWS", limit)
        words = ["--model_name_or_path", tiny_bert, "--scores", scores, "--output_dir", tmp_path / name, *QUICK]
        # With sorted windows the two would draw other batches: one goes by tokens, the other by bytes.
        must(run_script("distill_bi2cross.py", *words, "--length_window", 1))
    assert losses(tmp_path / "before") == losses(tmp_path / "later")
    for name, value in weights(tmp_path / "before").items():
        assert np.array_equal(value, weights(tmp_path / "later")[name]), name


@pytest.mark.slow
def test_the_bi_encoders_loss_can_be_exchanged(start, bi_scores, tmp_path, run_script):
    found = {}
    for loss in ("mse", "bce"):
        words = ["--model_name_or_path", start, "--scores", bi_scores, "--output_dir", tmp_path / loss]
        must(run_script("distill_cross2bi.py", *words, "--loss", loss, "--max_steps", 1, "--total_batch_size", 64))
        found[loss] = losses(tmp_path / loss)[0]
    # The start's own cosines as scores: no error in squares, and cross-entropy from its least, log(1 + e^-1) = 0.313.
    assert found["mse"] < 0.02 and found["bce"] > 0.313


@pytest.mark.slow
def test_a_cross_encoder_is_no_start_for_step_3(cross, bi_scores, tmp_path, run_script):
    words = ["--model_name_or_path", cross, "--scores", bi_scores, "--output_dir", tmp_path / "out"]
    refused(run_script("distill_cross2bi.py", *words), str(cross), "a cross-encoder")


def test_an_output_folder_with_foreign_files_is_refused(tiny_bert, corpus):
    """In a process of its own: the exit code is what a shell sees."""
    words = ["--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt", "--output_dir", corpus]
    refused(launch("train_contrastive.py", *words, direct=True), str(corpus), "choose another --output_dir")


@pytest.mark.slow
def test_bad_input_ends_both_processes_without_a_traceback_of_ours(tiny_bert, tmp_path):
    path = tmp_path / "hole.tsv"
    path.write_text("sentence1\tsentence2\na\tb\nc\t\n")
    words = ["--encoders", tiny_bert, "--pooling", "mean", "--pairs", path, "--output", tmp_path / "out.parquet"]
    result = launch("score_pairs.py", *words, processes=2)
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if line.startswith("score_pairs.py: error:")]
    assert len(ours) == 1 and "row 2" in ours[0]
    assert "transencoder/" not in result.stderr

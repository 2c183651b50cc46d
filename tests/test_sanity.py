"""A training that breaks down, scores that say nothing, labels among training scores, and where numbers come from."""

import hashlib
import json
import re
import shutil
import subprocess

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import launch, random_pairs, write_jsonl
from safetensors.torch import load_file, save_file

import transencoder
from transencoder.config.parsing import parse_stage
from transencoder.contrastive import DropoutViews
from transencoder.data.pools import read_pool
from transencoder.data.tables import read_sentences
from transencoder.data.tasks import load_task
from transencoder.encoders import load_bi_encoder, load_encoder
from transencoder.errors import BrokenRun, InputError, one_line_errors
from transencoder.evaluation import origin, result_entries
from transencoder.inference import Inference
from transencoder.labels import check_no_labels, read_label_pairs
from transencoder.model_files import ModelOptions
from transencoder.run.checks import check_inputs
from transencoder.run.plan import load_plan
from transencoder.runtime import records
from transencoder.runtime.records import code_version
from transencoder.sanity import LossWatch, broken_weights, check_scores
from transencoder.scoring import Teachers
from transencoder.training import Trainer


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="no")


# --- training --------------------------------------------------------------------------------------------------------


class Remembering(DropoutViews):
    """Knows which rows, counted from 1, were asked for together."""

    def __getitems__(self, indices):
        self.batches = [*getattr(self, "batches", []), [index + 1 for index in indices]]
        return super().__getitems__(indices)


class Training:
    """Sixteen steps of eight sentences, a checkpoint every four, in which one step breaks down."""

    def __init__(self, accelerator, tiny_bert, corpus, output, *words):
        sentences = read_sentences([str(corpus / "sentences.txt")])
        stage = ["--model_name_or_path", "m", "--sentences", "s", "--output_dir", str(output)]
        options = ["--total_batch_size", "8", "--num_epochs", "2", "--max_steps", "16", "--seed", "3"]
        options += ["--checkpointing_steps", "4", "--eval_steps", "1000"]
        self.arguments = parse_stage("train_contrastive", argv=[*stage, *options, *words])
        self.accelerator = accelerator
        self.encoder = load_bi_encoder(str(tiny_bert), ModelOptions("mean"))
        self.rows = Remembering(sentences, self.encoder, self.encoder.max_length)

    def run(self, loss_of):
        return Trainer(self.accelerator, self.encoder, self.rows, loss_of, self.arguments, None).run()

    def loss(self, model, batch):
        first, second = model(**batch["inputs"]).chunk(2)
        return 1 - torch.nn.functional.cosine_similarity(first, second).mean()


def test_a_loss_that_is_no_number_stops_the_training_and_never_reaches_a_checkpoint(
    accelerator, tiny_bert, corpus, tmp_path
):
    training = Training(accelerator, tiny_bert, corpus, tmp_path)
    steps = []

    def loss_of(model, batch):
        steps.append(1)
        return training.loss(model, batch) * (float("nan") if len(steps) == 7 else 1)

    with pytest.raises(BrokenRun) as caught:
        training.run(loss_of)
    rows = ", ".join(map(str, training.rows.batches[6]))
    last = tmp_path / "checkpoints" / "step-000004"
    where = f"its batch is the examples {rows} (8 of 96); the last good checkpoint is {last}; "
    assert str(caught.value).startswith(f"step 7 of 16: the loss is nan; {where}")
    assert [path.name for path in last.parent.iterdir()] == [last.name]
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert not list(tmp_path.glob("*.safetensors"))


def test_gradients_that_are_no_numbers_are_seen_in_the_weights_before_they_are_kept(
    accelerator, tiny_bert, corpus, tmp_path
):
    training = Training(accelerator, tiny_bert, corpus, tmp_path)
    steps = []

    def loss_of(model, batch):
        steps.append(1)
        # The square root of zero is zero, and its slope is infinite.
        extra = sum((parameter.sum() * 0).sqrt() for parameter in model.parameters()) if len(steps) == 12 else 0
        return training.loss(model, batch) + extra

    with pytest.raises(BrokenRun, match=r"^step 12 of 16: the weights are not finite after this step; .*step-000008;"):
        training.run(loss_of)
    assert not (tmp_path / "checkpoints" / "step-000012").exists()


def test_the_last_step_of_all_is_looked_at_before_the_model_is_kept(accelerator, tiny_bert, corpus, tmp_path):
    training = Training(accelerator, tiny_bert, corpus, tmp_path, "--checkpointing_steps", "0")
    steps = []

    def loss_of(model, batch):
        steps.append(1)
        return training.loss(model, batch) * (float("inf") if len(steps) == 16 else 1)

    with pytest.raises(
        BrokenRun, match=r"^step 16 of 16: the loss is inf; .*; no checkpoint had been written before;"
    ):
        training.run(loss_of)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_watch_finds_the_first_bad_step_of_the_last_ones(accelerator):
    watch = LossWatch(accelerator, 4)
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, float("inf"), float("nan")], start=1):
        watch.note(step, torch.tensor(loss))
    assert watch.look(7, torch.tensor(2.5)) == ((6, float("inf")), [2.5])
    for step in range(8, 12):
        watch.note(step, torch.tensor(0.5))
    assert watch.look(11, torch.tensor(1.0), torch.tensor(2.0)) == (None, [1.0, 2.0])


def test_broken_weights_are_counted_by_tensors():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    assert broken_weights(model) == 0
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
        model[1].bias[0] = -float("inf")
    assert broken_weights(model) == 2


def test_a_broken_run_is_told_in_one_line_with_exit_code_1(capsys):
    @one_line_errors
    def main():
        raise BrokenRun("step 3: the loss\nis nan")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith(": error: step 3: the loss is nan\n")


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_stop_the_work(value):
    with pytest.raises(BrokenRun, match=rf"^a: the score of pair 2 is {value} \(1 such scores in 3\)"):
        check_scores("a", np.array([0.5, value, 0.1]))


def test_scores_that_are_all_alike_are_warned_of(capsys):
    check_scores("a", np.full(5, 0.25) + np.linspace(0, 1e-5, 5))
    assert capsys.readouterr().err.startswith("warning: a gives all of 5 pairs nearly the same score (0.2500, ")
    check_scores("a", np.linspace(0.2, 0.25, 5))
    check_scores("a", np.array([0.5]))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_a_collapsed_encoder_is_warned_of_and_a_random_one_is_not(
    accelerator, bi_encoder, cross_encoder, tmp_path, capsys, kind
):
    pairs = datasets.Dataset.from_list(random_pairs(30))
    collapsed = tmp_path / "collapsed"
    shutil.copytree(bi_encoder if kind == "bi" else cross_encoder, collapsed)
    weights = load_file(collapsed / "model.safetensors")
    if kind == "cross":
        weights["classifier.weight"] *= 100  # a random head says next to nothing
        save_file(weights, collapsed / "model.safetensors", {"format": "pt"})
    Teachers([str(collapsed)]).score([pairs], Inference(accelerator, 4096))
    assert "warning" not in capsys.readouterr().err
    # Every token nearly alike, or a head that hardly looks at anything.
    names = [
        name
        for name in weights
        if ("classifier.weight" if kind == "cross" else "layer.1.output.LayerNorm.weight") in name
    ]
    assert names
    for name in names:
        weights[name] *= 1e-4
    if kind == "bi":
        for name in weights:
            weights[name] += 0.1 if "layer.1.output.LayerNorm.bias" in name else 0
    save_file(weights, collapsed / "model.safetensors", {"format": "pt"})
    Teachers([str(collapsed)]).score([pairs], Inference(accelerator, 4096))
    assert "pairs nearly the same score" in capsys.readouterr().err
    for name in names:
        weights[name] *= 0
    save_file(weights, collapsed / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"^{collapsed}: gives different texts the same output; "):
        load_encoder(str(collapsed))


# --- labels ----------------------------------------------------------------------------------------------------------


def scores_file(path, rows, turn=False):
    names = ("sentence2", "sentence1") if turn else ("sentence1", "sentence2")
    return write_jsonl(path, [dict(zip((*names, "score"), row, strict=True)) for row in rows])


def label_arguments(path):
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--scores", str(path)]
    return parse_stage("distill_cross2bi", argv=words)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("scale", [0.2, -0.1])
def test_the_labels_of_the_dev_set_are_no_training_scores(tmp_path, turn, scale):
    pairs = random_pairs(40, seed=1)
    dev = load_task(f"mine.dev={write_jsonl(tmp_path / 'dev.jsonl', pairs)}")
    gold = [(row["sentence1"], row["sentence2"], scale * row["score"]) for row in pairs[:20]]
    others = [(f"how {i}", f"late {i}", 0.01 * i) for i in range(30)]
    path = scores_file(tmp_path / "scores.jsonl", others + gold, turn)
    expected = rf"^--scores {path}: on the 20 pairs that it shares with --dev \(mine.dev\) its scores are the scores"
    with pytest.raises(InputError, match=expected):
        read_label_pairs(label_arguments(path), dev)
    assert len(read_label_pairs(label_arguments(path))) == 50


def test_zeros_and_ones_of_the_dev_set_are_no_training_scores(tmp_path):
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 3 == 0} for i in range(30)]
    write_jsonl(tmp_path / "dev.jsonl", [row | {"label": int(row["label"])} for row in rows])
    dev = load_task(str(tmp_path / "dev.jsonl"))
    path = scores_file(tmp_path / "s.jsonl", [(r["sentence1"], r["sentence2"], float(r["label"])) for r in rows])
    with pytest.raises(InputError, match="are the labels themselves"):
        read_label_pairs(label_arguments(path), dev)


def test_an_encoders_scores_of_the_dev_pairs_are_training_scores(tmp_path):
    pairs = random_pairs(40, seed=1)
    dev = load_task(str(write_jsonl(tmp_path / "dev.jsonl", pairs)))
    noise = np.random.default_rng(0).normal(0, 0.1, len(pairs))
    near = [(r["sentence1"], r["sentence2"], r["score"] / 10 + n) for r, n in zip(pairs, noise, strict=True)]
    assert len(read_label_pairs(label_arguments(scores_file(tmp_path / "a.jsonl", near)), dev)) == 40
    few = [(r["sentence1"], r["sentence2"], r["score"] / 10) for r in pairs[:9]]
    assert len(read_label_pairs(label_arguments(scores_file(tmp_path / "b.jsonl", few)), dev)) == 9
    alike = datasets.Dataset.from_list([row | {"score": 0.5} for row in pairs])
    check_no_labels("c", alike, dev)


def test_the_labels_of_a_pool_are_never_read(tmp_path, corpus):
    """Of a file of labelled pairs the pairs are taken; labels that could not even be read do no harm."""
    rows = [json.loads(line) | {"label": "not a label"} for line in (corpus / "dev.jsonl").read_text().splitlines()]
    path = write_jsonl(tmp_path / "pool.jsonl", rows)
    words = ["--encoders", "x", "--output", "x", "--pairs", str(path)]
    assert read_pool(parse_stage("score_pairs", argv=words), drop_duplicates=True).column_names == [
        "sentence1",
        "sentence2",
    ]


@pytest.mark.slow
def test_two_processes_stop_together_where_the_training_breaks_down(step1, tmp_path):
    words = [*step1, tmp_path / "out"]
    words += [
        "--learning_rate",
        "1e30",
        "--total_batch_size",
        8,
        "--checkpointing_steps",
        1,
        "--mixed_precision",
        "no",
    ]
    result = launch("train_contrastive.py", *words, processes=2)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "train_contrastive.py: error: " in line]
    assert "step 2 of 12: the loss is nan; its batch is the examples " in line
    assert f"the last good checkpoint is {tmp_path / 'out' / 'checkpoints' / 'step-000001'}; lower" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoints", "run.json"]


# --- where numbers come from -----------------------------------------------------------------------------------------


def test_the_code_is_known_by_version_and_commit(monkeypatch, tmp_path):
    assert re.fullmatch(re.escape(transencoder.__version__) + r"(\+g[0-9a-f]{12}(\.dirty)?)?", code_version())
    # A package that lies in somebody else's checkout, or none at all.
    monkeypatch.setattr(records, "__file__", str(tmp_path / "transencoder" / "runtime" / "records.py"))
    assert code_version.__wrapped__() == transencoder.__version__


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "transencoder").mkdir()
    (tmp_path / "a").write_text("a")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "A"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(records, "__file__", str(tmp_path / "transencoder" / "runtime" / "records.py"))
    assert code_version.__wrapped__() == f"{transencoder.__version__}+g{commit[:12]}"
    (tmp_path / "a").write_text("b")
    assert code_version.__wrapped__() == f"{transencoder.__version__}+g{commit[:12]}.dirty"


def test_a_set_has_one_checksum_in_every_format_and_another_with_another_label(tmp_path):
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "score": i / 2} for i in range(3)]
    sums = [load_task(str(write_jsonl(tmp_path / "a.jsonl", rows))).sha256]
    lines = ["sentence1\tsentence2\tscore", *("\t".join(map(str, row.values())) for row in rows)]
    (tmp_path / "b.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sums.append(load_task(str(tmp_path / "b.tsv")).sha256)
    # sha256 of the lines ["a 0", "b", 0.0]["a 1", "b", 0.5]["a 2", "b", 1.0]
    expected = hashlib.sha256(b'["a 0", "b", 0.0]["a 1", "b", 0.5]["a 2", "b", 1.0]').hexdigest()
    assert sums == [expected, expected]
    other = write_jsonl(tmp_path / "c.jsonl", [*rows[:2], rows[2] | {"score": 1.5}])
    assert load_task(str(other)).sha256 != expected


def test_results_say_which_code_measured_on_which_data(corpus, bi_encoder):
    task = load_task(f"mine={corpus / 'test.jsonl'}")
    results = result_entries([str(bi_encoder)], task, np.linspace(0, 1, 40))
    assert {(entry["code"], entry["data_sha256"]) for entry in results} == {(code_version(), task.sha256)}
    expected = f"Measured by trans-encoder {code_version()}. SHA-256 of the sets: mine `{task.sha256[:12]}`.\n"
    assert origin(results) == expected
    assert origin([{"task": "mine", "split": "test"}]) == ""  # of an older version


def test_a_dev_set_that_is_a_test_set_under_another_name_is_refused(corpus, tiny_bert, tmp_path):
    section = {
        "students": [{"name": "a", "plm": str(tiny_bert)}],
        "sentences": str(corpus / "sentences.txt"),
        "pairs": str(corpus / "pairs.jsonl"),
        "tasks": [f"mine={corpus / 'test.jsonl'}"],
    }
    options = {
        stage: {"total_batch_size": 8} for stage in ("train_contrastive", "distill_bi2cross", "distill_cross2bi")
    }
    copy = tmp_path / "copy.tsv"
    rows = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    lines = ["sentence1\tsentence2\tscore", *("\t".join(map(str, row.values())) for row in rows)]
    copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for dev, refused in ((corpus / "dev.jsonl", False), (copy, True)):
        recipe = {"run_transencoder": {**section, "dev": str(dev)}, **options}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        plan = load_plan(recipe, str(path))
        if refused:
            with pytest.raises(
                InputError, match=r"the dev set copy.dev and the task mine are the same labelled pairs"
            ):
                check_inputs(plan, str(path))
        else:
            check_inputs(plan, str(path))

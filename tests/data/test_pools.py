"""Named pools of pairs and sentences, and what comes from the Hub."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from conftest import random_pairs, write_jsonl

from transencoder.config.arguments import ScoringArguments
from transencoder.config.options import Reading
from transencoder.config.parsing import parse_stage
from transencoder.data import hub_sets
from transencoder.data.pools import (
    POOLS,
    check_both_orders,
    input_files,
    is_ordered,
    read_pool,
    read_sentence_pool,
    swap_of,
)
from transencoder.data.tasks import GROUPS, TASKS, load_task, read_split
from transencoder.errors import InputError
from transencoder.runtime.records import HubSource


def naming(pairs, data_dir):
    """Options of score_pairs.py."""
    return ScoringArguments(encoders=["bert"], pairs=pairs, output="scores.parquet", data_dir=str(data_dir))


def options(pairs, data_dir=None, **changes):
    """What a stage that reads pairs knows of them."""
    values = dict(extra_pairs=None, num_extra_pairs=None, num_training_pairs=None, seed=1, **vars(Reading()))
    return SimpleNamespace(pairs=pairs, data_dir=data_dir and str(data_dir), **{**values, **changes})


@pytest.fixture
def data_dir(tmp_path):
    """The parts of the pool `sickr`, 3 + 2 + 2 pairs of which one is there twice, and `pool.sts`, 4 pairs."""
    rows = random_pairs(6)
    write_jsonl(tmp_path / "sickr.train.jsonl", rows[:3])
    write_jsonl(tmp_path / "sickr.dev.jsonl", rows[3:5])
    write_jsonl(tmp_path / "sickr.test.jsonl", [rows[0], rows[5]])
    write_jsonl(tmp_path / "pool.sts.jsonl", [{k: row[k] for k in ("sentence1", "sentence2")} for row in rows[2:6]])
    (tmp_path / "wiki1m.txt").write_text("a\nb\na\n")
    return tmp_path


def said(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_pool_is_its_parts_without_repeats_and_says_how_many_there_are(data_dir, capsys):
    assert len(read_pool(options(["sickr"], data_dir), drop_duplicates=False)) == 6
    assert said(capsys) == [
        "sickr.train: 3 rows, 4439 expected (SentEval's files hold 4927, 500 and 4500)",
        "sickr.dev: 2 rows, 495 expected (SentEval's files hold 4927, 500 and 4500)",
        "sickr: 2 rows, 4906 expected (SentEval's files hold 4927, 500 and 4500)",
        "pool sickr: 6 pairs, 9840 expected",
    ]


def test_a_file_may_stand_for_a_pool_and_pools_hold_pools(data_dir, capsys):
    table = read_pool(options(["sts_sickr"], data_dir), drop_duplicates=True)
    assert len(table) == 6 and table.column_names == ["sentence1", "sentence2"]
    lines = said(capsys)
    assert lines[0].startswith("pool sts: 4 pairs, 27237 expected (the paper also takes the pairs of 2015")
    assert lines[-1].startswith("pool sts_sickr: 6 pairs, the paper has 37081 (")


def test_a_pool_of_the_papers_size_says_so(tmp_path, capsys):
    write_jsonl(tmp_path / "pool.mrpc.jsonl", [{"sentence1": f"a {i}", "sentence2": "b"} for i in range(5801)])
    read_pool(options(["mrpc"], tmp_path), drop_duplicates=False)
    assert said(capsys) == ["pool mrpc: 5801 pairs, as many as in the paper"]


def test_samples_and_extra_pairs(data_dir, tmp_path, capsys):
    pairs = write_jsonl(tmp_path / "mine.jsonl", random_pairs(30, seed=5))

    def read(**changes):
        return list(read_pool(options([f"custom={pairs}"], data_dir, **changes), drop_duplicates=True))

    everything = read()
    assert len(everything) == 30
    ten = read(num_training_pairs=10)
    assert len(ten) == 10 and all(row in everything for row in ten) and ten == read(num_training_pairs=10)
    assert ten != read(num_training_pairs=10, seed=2)
    both = read(num_training_pairs=10, extra_pairs=["sts"], num_extra_pairs=3)
    assert both[:10] == ten and len(both) == 13
    assert len(read(num_training_pairs=10, extra_pairs=["sts"])) == 14
    capsys.readouterr()
    assert len(read(num_training_pairs=31)) == 30
    assert said(capsys) == ["31 pairs were asked for, there are 30"]
    assert len(read(extra_pairs=[str(pairs)])) == 30  # the same pairs again


def test_sentences_of_pools_and_of_wikipedia(data_dir, capsys):
    found = read_sentence_pool(["wiki1m", "sts"], str(data_dir))["sentence"][:]
    assert found[:2] == ["a", "b"] and len(set(found)) == len(found) > 4
    assert "wiki1m: 3 sentences, 1000000 expected" in said(capsys)


@pytest.mark.parametrize("name", ["stss", "custom=stss"])
def test_what_is_neither_a_file_nor_a_pool_is_refused_with_the_pools(data_dir, name):
    for read in (
        lambda: read_pool(options([name], data_dir), drop_duplicates=True),
        lambda: read_sentence_pool([name], str(data_dir)),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value).startswith(f"{name}: neither a file nor a pool; pools: sts, sickr, sts_sickr, qqp")


def test_a_pool_without_its_files_is_refused(data_dir):
    (data_dir / "pool.sts.jsonl").unlink()
    with pytest.raises(InputError, match=r"no sts12\.jsonl\(\.gz\) or sts12\.test\.jsonl\(\.gz\) for task sts12"):
        read_pool(options(["sts_sickr"], data_dir), drop_duplicates=True)
    (data_dir / "wiki1m.txt").unlink()
    with pytest.raises(InputError, match=r"no wiki1m\.txt\(\.gz\)"):
        read_sentence_pool(["wiki1m"], str(data_dir))


def test_only_where_the_order_means_nothing_pairs_are_turned_round():
    assert is_ordered(["a.tsv", "qnli"]) and is_ordered(["mrpc"], ["qnli"])
    assert not is_ordered(["sts_sickr", "qqp", "mrpc", "snli", "a.tsv"])
    assert [swap_of(None, False), swap_of(None, True), swap_of(True, False), swap_of(False, True)] == [
        True,
        False,
        True,
        False,
    ]
    check_both_orders(True, False)
    check_both_orders(False, True)
    for refused in (lambda: swap_of(True, True), lambda: check_both_orders(True, True)):
        with pytest.raises(InputError, match="the order of these pairs matters"):
            refused()


def test_a_change_of_a_file_is_noticed_whatever_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "date=2024-05-01" / "p.tsv", tmp_path / "lr=3e-5" / "model", tmp_path / "a=b.tsv"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    words = [str(paths[0]), "lr=3e-5/model", "mine=lr=3e-5/model", f"mine={paths[2]}", "a=b.tsv"]
    found = [path for path in input_files(naming(words, None)) if isinstance(path, Path)]
    assert [path.resolve() for path in found] == [paths[0], paths[1], paths[2], paths[2]]


def test_a_change_of_a_pools_file_is_noticed(data_dir):
    names = {
        path.name
        for path in input_files(naming(["sts_sickr", "wiki1m", "bert", "stsb.dev"], data_dir))
        if isinstance(path, Path) and path.is_file()
    }
    assert names == {"pool.sts.jsonl", "wiki1m.txt", *(f"sickr.{split}.jsonl" for split in ("train", "dev", "test"))}
    write_jsonl(data_dir / "sts12.jsonl", random_pairs(3))
    assert "sts12.jsonl" in {path.name for path in input_files(naming(["sts"], data_dir))}  # the group of tasks


def test_the_registry_holds_together():
    for name, source in TASKS.items():
        assert dict(source.splits).keys() == dict(source.rows).keys(), name
    parts = {part for pool in POOLS.values() for part in pool.parts} - set(POOLS)
    assert all(dict(TASKS[part.partition(".")[0]].rows)[part.partition(".")[2] or "test"] for part in parts)
    assert all(name in TASKS for group in GROUPS.values() for name in group)
    # With no repeats among them, GLUE's parts are as many as the paper's pairs.
    for name in ("qqp", "qnli", "mrpc"):
        assert sum(rows for _, rows in TASKS[name].rows) == POOLS[name].pairs


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one table, and what was asked of it."""
    asked = []
    columns = dict(question=["who?", "where?"], sentence=["me", "here"], idx=[0, 1])

    def load_dataset(hub_id, config=None, split=None, revision=None, **more):
        asked.append((hub_id, config, split, revision))
        return datasets.Dataset.from_dict({**columns, "label": hub.labels})

    hub = SimpleNamespace(labels=[0, 1], asked=asked)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_sets, "HUB_COMMITS", {})
    datasets.disable_progress_bars()
    return hub


def test_a_task_from_the_hub_is_renamed_and_its_commit_noted(hub, monkeypatch, capsys):
    commit = "0" * 40
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, name, **how: SimpleNamespace(sha=commit))
    task = load_task("qnli.dev")
    assert hub.asked == [("nyu-mll/glue", "qnli", "validation[:1000]", None)]
    assert task.pairs["sentence1"][:] == ["who?", "where?"] and task.pairs["label"][:] == [1.0, 0.0]
    assert said(capsys) == [f"nyu-mll/glue: commit {commit}", "qnli.dev: 2 rows, 1000 expected"]
    assert {"nyu-mll/glue": commit} == hub_sets.HUB_COMMITS
    assert read_split("qnli.train", None, None).column_names == ["sentence1", "sentence2"]
    assert said(capsys) == ["qnli.train: 2 rows, 10000 expected"]  # the commit is said once


def test_a_commit_that_nobody_knows_is_not_made_up(hub, capsys):
    load_task("qnli")  # offline: the Hub is not asked
    assert said(capsys)[0] == "nyu-mll/glue: commit unknown (the Hub was not asked, the cache has main)"


def test_labels_of_the_hub_are_checked(hub):
    hub.labels = [0, -1]
    with pytest.raises(InputError, match=r"^nyu-mll/glue:validation\[1000:\]: row 2: label is neither 0 nor 1"):
        load_task("qnli")
    hub.labels = [1, 1]
    with pytest.raises(InputError, match=r"^qnli: every label is 0; AUC needs both labels"):
        load_task("qnli")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Revision 'x' doesn't exist\non the Hub"),
            "Revision 'x' doesn't exist",
        ),
        (ValueError('Unknown split "x". Should be one of [...]'), 'Unknown split "x"'),
    ],
)
def test_a_wrong_revision_or_split_is_one_line(monkeypatch, error, words):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        load_task("sickr")
    message = str(caught.value)
    assert message.startswith("RobZamp/sick, revision refs/convert/parquet, split test: cannot be loaded from the Hub")
    assert words in message and "\n" not in message and "--data_dir" in message


def test_a_hub_source_can_name_split_and_revision(hub):
    columns = ["sentence1=question", "sentence2=sentence"]
    read_pool(options(["org/pairs:dev@v1.0"], columns=columns), drop_duplicates=True)
    read_pool(options(["org/pairs"], columns=columns), drop_duplicates=True)
    assert hub.asked == [("org/pairs", None, "dev", "v1.0"), ("org/pairs", None, "train", None)]


def test_pairs_only_have_nothing_to_measure():
    with pytest.raises(InputError, match=r"^snli: pairs only, nothing to measure; tasks: sts12, .*groups: sts, "):
        load_task("snli")


def test_a_set_with_one_value_only_is_refused(tmp_path):
    rows = [{**row, "label": 1} for row in random_pairs(4)]
    for gold, words in (("label", "every label is 1; AUC needs both"), ("score", "every score is 1; a correlation")):
        path = tmp_path / f"{gold}.jsonl"
        path.write_text("".join(json.dumps({**row, "score": 1, gold: 1}) + "\n" for row in rows))
        spec = f"mine={path}"
        path.write_text(path.read_text().replace('"score"' if gold == "label" else '"label"', '"other"'))
        with pytest.raises(InputError, match=f"^{spec}: {words}"):
            load_task(spec)


def test_a_model_on_the_hub_that_teaches_step_1_is_an_input():
    words = ["--model_name_or_path", "acme/plm", "--sentences", "wiki1m", "--output_dir", "out"]
    arguments = parse_stage("train_contrastive", argv=[*words, "--teacher", "acme/teacher"])
    assert HubSource("acme/teacher", "model") in input_files(arguments)

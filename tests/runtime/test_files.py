"""What a stage leaves on disk."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import transencoder
from transencoder.config.arguments import Bi2CrossArguments
from transencoder.config.stages import STAGES
from transencoder.data import tables
from transencoder.data.pools import input_files
from transencoder.data.scores import check_output, is_made, write_scores
from transencoder.data.tables import read_pairs
from transencoder.encoders import load_bi_encoder
from transencoder.errors import InputError
from transencoder.inference import token_batches
from transencoder.labels import read_label_pairs
from transencoder.model_files import ModelOptions
from transencoder.runtime import records
from transencoder.runtime.files import replacing, write_json
from transencoder.runtime.records import RUN_FILE, difference

STAGE = "distill_bi2cross"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- files and folders -----------------------------------------------------------------------------------------------


def test_json_is_written_as_utf_8_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    write_json(tmp_path / "a.json", {"é": [1, None, 0.5]})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"é": [1, None, 0.5]}
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert names(tmp_path) == ["a.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="two folders change places in one step there only")
def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "old").touch()

    def rename_and_die(source, target, rename=os.replace):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_and_die)
    with contextlib.suppress(KeyboardInterrupt), replacing(tmp_path / "index") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert names(tmp_path) == ["index"] and names(tmp_path / "index") == ["new"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_stays_and_its_target_is_replaced(tmp_path, there):
    target = tmp_path / "disk" / "target"
    target.parent.mkdir()
    if there:
        target.mkdir()
        (target / "old").touch()
    (tmp_path / "link").symlink_to(target)
    with replacing(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert names(tmp_path / "link") == ["new"] and names(tmp_path) == ["disk", "link"]
    assert not there or (names(target.parent) == ["target"] and names(target) == ["new"])


@pytest.mark.parametrize("content", [{1, 2}, "half a character: \ud83d"], ids=["not JSON", "not UTF-8"])
def test_json_that_cannot_be_written_leaves_the_old_file_as_it_was(tmp_path, content):
    write_json(tmp_path / "a.json", "old")
    with pytest.raises((TypeError, UnicodeEncodeError)):
        write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == "old"
    assert names(tmp_path) == ["a.json"]


def write_folder(target: Path, *files: str) -> None:
    with replacing(target) as folder:
        folder.mkdir()
        for name in files:
            (folder / name).touch()


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "models" / "best"
    write_folder(target, "a", "b")
    assert names(target) == ["a", "b"]
    write_folder(target, "c")
    assert names(target) == ["c"]
    assert names(target.parent) == ["best"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_cannot_be_written_leaves_the_old_one_as_it_was(tmp_path, kind):
    target = tmp_path / "best"
    if kind == "folder":
        write_folder(target, "old")
    else:
        target.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(target) as temporary:
        (temporary if kind == "file" else temporary.parent / "stray").write_text("half")
        raise OSError("disk full")
    assert names(target) == ["old"] if kind == "folder" else target.read_text() == "old"
    assert names(tmp_path) == ["best"]


def test_where_folders_cannot_change_places_one_is_missing_for_no_longer_than_a_rename(tmp_path, monkeypatch):
    """The old one goes when the new one is whole, and is deleted when the new one is in its place."""
    monkeypatch.setattr("transencoder.runtime.files._exchanged", lambda new, old: False)
    target, seen, replace, rmtree = tmp_path / "best", [], os.replace, shutil.rmtree
    write_folder(target, "old")

    def noted(work):
        def wrapper(*words, **options):
            seen.append((work.__name__, names(target) if target.exists() else None))
            return work(*words, **options)

        return wrapper

    monkeypatch.setattr(os, "replace", noted(replace))
    monkeypatch.setattr(shutil, "rmtree", noted(rmtree))
    write_folder(target, "new")
    assert seen == [("replace", ["old"]), ("replace", None), ("rmtree", ["new"])]


def test_only_what_the_dead_left_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f".a.{socket.gethostname()}.{number}.tmp" for number in (gone.pid, os.getppid(), "x")]
    for name in [*left, f".a.elsewhere.{gone.pid}.tmp"]:
        (tmp_path / name / "half").mkdir(parents=True)
    write_json(tmp_path / "a", 1)
    assert names(tmp_path) == sorted([*left[1:], f".a.elsewhere.{gone.pid}.tmp", "a"])


def save(folder: Path, text: str, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_placed_model_leaves_nothing_of_the_one_before_and_all_that_is_not_its_own(tmp_path):
    """Only what run.json lists is deleted: not a person's files that have names as a model's."""
    arguments = run_arguments(tmp_path / "out", overwrite=True)
    write_run(arguments, STAGE, "running")
    bi = ["config.json", "modules.json", "model-00001-of-00002.safetensors", "1_Pooling/config.json", "tokenizer.json"]
    records.place(save(tmp_path / "bi", "bi", *bi), tmp_path / "out")
    write_run(arguments, STAGE, "complete")
    others = ["vocab_of_my_thesis.txt", "tokens/list.txt", "teacher-scores.parquet", "notes.txt", "1_Pooling/mine.txt"]
    save(tmp_path / "out", "mine", *others)
    for _ in range(2):  # again, where the first time was cut off: the source still has it all
        write_run(arguments, STAGE, "running")
        cross = ["config.json", "model.safetensors", "tokenizer.json"]
        records.place(save(tmp_path / "cross", "cross", *cross, "manifest.json"), tmp_path / "out")
        found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        assert found - {RUN_FILE} == {*cross, *others}
        assert {(tmp_path / "out" / name).read_text() for name in others} == {"mine"}
        assert {(tmp_path / "out" / name).read_text() for name in cross} == {"cross"}
        (tmp_path / "out" / "config.json").unlink()


# --- whose output folder it is ---------------------------------------------------------------------------------------


def some_options(**values: object) -> Any:
    """These options, with the properties that the stages give them."""
    known = {option.name: option.metadata for stage in STAGES.values() for option in fields(stage.arguments)}
    return make_dataclass("Options", [(name, Any, field(metadata=known[name])) for name in values])(**values)


def run_arguments(folder: Path, **changes: object) -> Any:
    values = dict(output_dir=str(folder), overwrite=False, seed=1, learning_rate=2e-5, pairs=["a.tsv"], recipe=None)
    return some_options(**{**values, **changes})


def identity(arguments: Any) -> dict[str, Any]:
    return records.identity(arguments, input_files(arguments))


def claim(arguments: Any, stage: str, result: str | None = None) -> bool:
    return records.claim(arguments, stage, identity(arguments), result)


def write_run(arguments: Any, stage: str, status: str, **metadata: Any) -> None:
    records.write_run(arguments, stage, status, identity(arguments), **metadata)


def test_a_new_or_empty_folder_is_free(tmp_path):
    assert claim(run_arguments(tmp_path / "new"), STAGE) is False
    assert claim(run_arguments(tmp_path), STAGE) is False


@pytest.mark.parametrize("name", ["out", "lr=[1e-5]"])
def test_a_complete_run_is_done_and_an_interrupted_one_is_not(tmp_path, name):
    tmp_path = tmp_path / name
    write_run(run_arguments(tmp_path), STAGE, "running")
    assert claim(run_arguments(tmp_path), STAGE) is False
    write_run(run_arguments(tmp_path), STAGE, "complete")
    (tmp_path / "model.safetensors").touch()
    assert claim(run_arguments(tmp_path), STAGE) is True


def test_a_complete_run_whose_result_was_deleted_is_made_again(tmp_path):
    for stage, result in ((STAGE, None), ("evaluate_encoders", "results.json")):
        folder, name = tmp_path / stage, result or "model-00001-of-00002.safetensors"
        write_run(run_arguments(folder), stage, "complete")
        assert claim(run_arguments(folder), stage, result) is False
        (folder / name).touch()
        assert claim(run_arguments(folder), stage, result) is True


def test_what_does_not_change_the_result_may_differ(tmp_path):
    write_run(run_arguments(tmp_path, recipe="a.yaml", report_to="none", micro_batch_size=8), STAGE, "complete")
    (tmp_path / "model.safetensors").touch()
    assert claim(run_arguments(tmp_path, report_to="all", micro_batch_size=4, eval_batch_tokens=99), STAGE) is True
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    assert claim(run_arguments(link), STAGE) is True  # the same folder by another name


@pytest.mark.parametrize("status", ["running", "complete"])
def test_the_folder_of_another_run_is_refused_with_the_difference(tmp_path, status):
    write_run(run_arguments(tmp_path), STAGE, status)
    with pytest.raises(InputError, match=r"holds another run's results \(seed is 1 there and 2 here\); .*--overwrite"):
        claim(run_arguments(tmp_path, seed=2), STAGE)
    with pytest.raises(InputError, match="swap is None there and True here"):
        claim(run_arguments(tmp_path, swap=True), STAGE)


def test_the_folder_of_another_stage_is_refused(tmp_path):
    write_run(run_arguments(tmp_path), "distill_cross2bi", "complete")
    with pytest.raises(InputError, match=f"--output_dir {tmp_path}: holds the result of distill_cross2bi; "):
        claim(run_arguments(tmp_path), STAGE)


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds files that are not this tool's; choose another"):
        claim(run_arguments(tmp_path), STAGE)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '"text"',
        '{"stage": "distill_bi2cross", "status": "complete"}',
        '{"stage": "distill_bi2cross", "status": "complete", "arguments": [1]}',
        '{"stage": "distill_bi2cross", "status": "complete", "arguments": null}',
        "\xff",
    ],
)
def test_a_folder_with_a_broken_run_file_is_refused(tmp_path, content):
    (tmp_path / RUN_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"run\.json cannot be read; "):
        claim(run_arguments(tmp_path), STAGE)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not a folder"):
            claim(run_arguments(tmp_path / "file", overwrite=overwrite), STAGE)


@pytest.mark.parametrize("content", ["{", '{"stage": "other"}', None])
def test_overwrite_takes_no_folder_that_is_not_ours(tmp_path, content):
    if content:
        (tmp_path / RUN_FILE).write_text(content)
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(InputError, match=r"run.json cannot be read|holds files that are not this tool's"):
        claim(run_arguments(tmp_path, overwrite=True), STAGE)
    assert (tmp_path / "vocab.txt").exists()


def test_overwrite_repeats_a_complete_run(tmp_path):
    write_run(run_arguments(tmp_path), STAGE, "complete")
    assert claim(run_arguments(tmp_path, overwrite=True), STAGE) is False


def test_a_named_result_may_lie_beside_other_files_but_not_replace_a_foreign_one(tmp_path):
    (tmp_path / "bi-scores.parquet").touch()
    assert claim(run_arguments(tmp_path), "evaluate_encoders", result="results.json") is False
    (tmp_path / "results.json").touch()
    with pytest.raises(InputError, match="holds files that are not this tool's"):
        claim(run_arguments(tmp_path), "evaluate_encoders", result="results.json")
    write_run(run_arguments(tmp_path), "evaluate_encoders", "complete")
    assert claim(run_arguments(tmp_path), "evaluate_encoders", result="results.json") is True


def test_a_named_result_does_not_hide_another_stages_run(tmp_path):
    write_run(run_arguments(tmp_path), STAGE, "complete")
    with pytest.raises(InputError, match=f"holds the result of {STAGE}"):
        claim(run_arguments(tmp_path), "evaluate_encoders", result="results.json")


def test_the_run_file_says_what_made_the_result(tmp_path):
    write_run(run_arguments(tmp_path / "a" / "b", overwrite=True), STAGE, "complete", steps=7, dev=81.5)
    run = json.loads((tmp_path / "a" / "b" / RUN_FILE).read_text(encoding="utf-8"))
    assert run["stage"] == STAGE
    assert run["status"] == "complete"
    assert run["arguments"] == {"seed": 1, "learning_rate": 2e-5, "pairs": ["a.tsv"], "inputs": {}}
    assert run["versions"]["transencoder"].startswith(transencoder.__version__)
    assert set(run["versions"]) == {"transencoder", "torch", "transformers"}
    assert (run["steps"], run["dev"]) == (7, 81.5)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"--output_dir {tmp_path}/file/run: cannot be written: "):
        write_run(run_arguments(tmp_path / "file" / "run"), STAGE, "running")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_identity_holds_checksums_of_every_file_and_model_that_is_named(tmp_path):
    files = {name: str(tmp_path / name) for name in ("a.tsv", "b c.tsv", "dev.tsv", "no.tsv")}
    for name in ("a.tsv", "b c.tsv", "dev.tsv"):
        Path(files[name]).write_text(name)
    (tmp_path / "model").mkdir()
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / "model" / name).write_text(name)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    arguments = run_arguments(
        tmp_path / "out",
        pairs=[files["a.tsv"], files["b c.tsv"], files["no.tsv"], "org/name"],
        dev=f"mine.dev={files['dev.tsv']}",
        model_name_or_path=str(tmp_path / "model"),
        encoders=[str(tmp_path / "empty"), "org/model"],
        dropout=None,
        swap=True,
    )
    found = identity(arguments)
    assert found.pop("inputs") == {
        files["a.tsv"]: sha256(b"a.tsv"),
        files["b c.tsv"]: sha256(b"b c.tsv"),
        files["dev.tsv"]: sha256(b"dev.tsv"),
        str(tmp_path / "model"): {
            "config.json": sha256(b"{}"),
            "model-00001-of-00002.safetensors": sha256(b"model-00001-of-00002.safetensors"),
            "model-00002-of-00002.safetensors": sha256(b"model-00002-of-00002.safetensors"),
        },
    }
    left_out = {"recipe", "overwrite", "output_dir"}
    assert found == {name: value for name, value in vars(arguments).items() if name not in left_out}


def test_where_a_result_goes_is_no_part_of_what_it_is(tmp_path):
    for name in ("recipe.yaml", "scores.parquet"):
        (tmp_path / name).write_text("x")
    recipe, output = (str(tmp_path / name) for name in ("recipe.yaml", "scores.parquet"))
    with_files = identity(some_options(seed=1, output=output, recipe=recipe, output_dir=str(tmp_path)))
    assert with_files == identity(some_options(seed=1)) == {"seed": 1, "inputs": {}}


@pytest.mark.parametrize("status", ["running", "complete"])
@pytest.mark.parametrize("spec", ["{}", "mine={}"])
def test_a_run_whose_input_file_changed_is_refused(tmp_path, status, spec, monkeypatch):
    source = tmp_path / "pairs.tsv"
    source.write_text("one")
    arguments = run_arguments(tmp_path / "out", dev=spec.format(source))
    write_run(arguments, STAGE, status)
    (tmp_path / "out" / "model.safetensors").touch()
    assert claim(arguments, STAGE) is (status == "complete")
    os.utime(source, (0, 0))
    assert claim(arguments, STAGE) is (status == "complete")  # the content counts, not the time
    source.write_text("two")
    refused = rf"holds another run's results \({source} has changed since\); .*--overwrite"
    with pytest.raises(InputError, match=refused):
        claim(arguments, STAGE)
    assert claim(run_arguments(tmp_path / "out", dev=arguments.dev, overwrite=True), STAGE) is False
    monkeypatch.setenv("TRANSENCODER_RUN", str(tmp_path))
    with pytest.raises(InputError, match=rf"put it back, or delete {tmp_path / 'out'}, and the same command"):
        claim(arguments, STAGE)
    source.unlink()
    with pytest.raises(InputError, match="has changed since"):
        claim(arguments, STAGE)


@pytest.mark.parametrize(
    "file",
    [
        *("model.safetensors", "other.safetensors", "config.json", "tokenizer.json", "vocab.txt", "modules.json"),
        *("config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    ],
)
def test_a_run_whose_input_model_changed_in_any_file_is_refused(tmp_path, file):
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    (model / file).write_bytes(b"content")
    arguments = run_arguments(tmp_path / "out", teachers=[str(model)])
    write_run(arguments, STAGE, "complete")
    (tmp_path / "out" / "model.safetensors").touch()
    (model / "run.json").write_text("{}")  # no part of the model
    (model / "README.md").write_text("card")
    assert claim(arguments, STAGE) is True
    (model / file).write_bytes(b"others!")
    with pytest.raises(InputError, match=f"{model}/{file} has changed since"):
        claim(arguments, STAGE)


def test_a_new_commit_on_the_hub_is_named(tmp_path, monkeypatch):
    """Of a model and of a data set; where the Hub cannot be asked, nothing is said."""
    commits = {"org/model": "a" * 40, "org/set": "b" * 40}
    monkeypatch.setattr(records, "hub_commit", lambda name, kind, revision: commits.get(name))
    arguments = run_arguments(tmp_path, encoders=["org/model"], pairs=["org/set:train"])
    write_run(arguments, STAGE, "complete")
    (tmp_path / "model.safetensors").touch()
    assert claim(arguments, STAGE) is True
    for name in list(commits):
        before = commits.pop(name)
        assert claim(arguments, STAGE) is True
        commits[name] = "c" * 40
        with pytest.raises(
            InputError, match=f"{name} is at commit {before} there and at commit {'c' * 40} here; HF_HUB"
        ):
            claim(arguments, STAGE)
        commits[name] = before


def test_a_difference_names_files_only_where_the_arguments_are_the_same():
    before, now = {"a": 1, "inputs": {"x": "0", "y": "1"}}, {"a": 1, "inputs": {"x": "0", "y": "2", "z": "3"}}
    assert difference(before, now) == "y has changed since, z has changed since"
    assert difference({**before, "a": 2}, now) == "a is 2 there and 1 here"
    assert difference(before, dict(before)) == ""
    assert difference({"a": 1}, {"a": 1, "inputs": {}}) == ""
    assert difference({"a": 1}, before) == "x has changed since, y has changed since"
    many = {name: "0" for name in "abcde"}
    assert difference({"inputs": many}, {"inputs": {}}).count("has changed since") == 3


def test_a_difference_names_up_to_three_values():
    before, now = {"a": 1, "b": 2, "gone": "x"}, {"a": 1, "b": 3, "new": [4]}
    expected = "b is 2 there and 3 here, gone is 'x' there and None here, new is None there and [4] here"
    assert difference(before, now) == expected
    assert difference(before, before) == ""
    assert difference(dict.fromkeys("abcd", 1), dict.fromkeys("abcd", 2)).count("there") == 3


# --- scores ----------------------------------------------------------------------------------------------------------

FACTS = {"encoders": ["a", "b"], "seed": 1, "columns": None}


def pairs_table(count: int = 5) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {name: [f"{name} {i}" for i in range(count)] for name in ("sentence1", "sentence2")}
    )


def test_scores_are_written_beside_their_pairs_in_order(tmp_path):
    pairs = pairs_table().select([4, 0, 2])  # as dropping duplicates leaves it
    path = tmp_path / "new" / "scores.parquet"
    check_output(path)
    write_scores(path, pairs, np.array([0.1, -0.2, 0.3], dtype=np.float32), FACTS)
    assert names(path.parent) == ["scores.parquet"]
    table = pq.read_table(path)
    assert table.column_names == ["sentence1", "sentence2", "score"]
    assert table.schema.field("score").type == pa.float32()
    assert table["sentence1"].to_pylist() == ["sentence1 4", "sentence1 0", "sentence1 2"]
    assert table["sentence2"].to_pylist() == ["sentence2 4", "sentence2 0", "sentence2 2"]
    assert table["score"].to_pylist() == pytest.approx([0.1, -0.2, 0.3])


def test_scores_are_written_block_by_block(tmp_path, monkeypatch):
    scores = np.linspace(0, 1, 5, dtype=np.float32)
    write_scores(tmp_path / "whole.parquet", pairs_table(), scores, FACTS)
    monkeypatch.setattr(tables, "BLOCK_ROWS", 2)
    write_scores(tmp_path / "blocks.parquet", pairs_table(), scores, FACTS)
    whole, parts = (pq.ParquetFile(tmp_path / f"{name}.parquet") for name in ("whole", "blocks"))
    assert (whole.num_row_groups, parts.num_row_groups) == (1, 3)
    assert whole.read().equals(parts.read()) and whole.schema_arrow.metadata == parts.schema_arrow.metadata


def test_written_scores_are_read_as_training_pairs(tmp_path):
    write_scores(tmp_path / "scores.parquet", pairs_table(), np.linspace(0, 1, 5, dtype=np.float32), FACTS)
    table = read_pairs([str(tmp_path / "scores.parquet")], "score")
    assert table["sentence2"][:] == pairs_table()["sentence2"][:]
    assert table["score"][:] == [0, 0.25, 0.5, 0.75, 1]


def test_scores_are_there_when_they_come_from_the_same_facts(tmp_path):
    path = tmp_path / "scores.parquet"
    assert is_made(path, FACTS) is False
    write_scores(path, pairs_table(), np.zeros(5, dtype=np.float32), FACTS)
    assert is_made(path, dict(FACTS)) is True


def test_other_scores_are_refused_with_the_difference(tmp_path):
    path = tmp_path / "scores.parquet"
    write_scores(path, pairs_table(), np.zeros(5, dtype=np.float32), FACTS)
    with pytest.raises(
        InputError, match=r"--output .*scores\.parquet: holds other scores \(seed is 1 there and 2 here\)"
    ):
        is_made(path, {**FACTS, "seed": 2})


def test_files_that_are_not_our_scores_are_refused(tmp_path):
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="was not written by this tool; choose another name"):
            is_made(path, FACTS, overwrite=overwrite)
    path.write_text("text")
    with pytest.raises(InputError, match="is not a Parquet file; delete it, or choose"):
        is_made(path, FACTS)
    os.unlink(path)
    path.mkdir()
    with pytest.raises(InputError, match=r"--output .*scores\.parquet: must be the name of a \.parquet file"):
        is_made(path, FACTS)


def test_an_output_that_is_an_input_or_a_foreign_plot_is_refused(tmp_path, run_script):
    path = tmp_path / "scores.parquet"
    write_scores(path, pairs_table(), np.zeros(5, dtype=np.float32), FACTS)
    before = path.read_bytes()
    words = ["--encoders", "no/model", "--output", path, "--overwrite"]
    result = run_script("score_pairs.py", "--pairs", path, *words)
    assert result.returncode == 2 and f"--output {path}: is an input" in result.stderr
    (tmp_path / "thesis.png").write_bytes(b"x")
    words = ["--encoders", "no/model", "--sentences", path, "--output", tmp_path / "out.parquet"]
    result = run_script("mine_pairs.py", *words, "--histogram", tmp_path / "thesis.png")
    assert result.returncode == 2 and "thesis.png: exists and is no PNG" in result.stderr
    assert path.read_bytes() == before and (tmp_path / "thesis.png").read_bytes() == b"x"


def test_the_number_of_processes_is_noted_and_makes_no_other_scores(tmp_path):
    path = tmp_path / "scores.parquet"
    write_scores(path, pairs_table(), np.zeros(5, dtype=np.float32), {**FACTS, "world_size": 2})
    assert json.loads(pq.read_schema(path).metadata[b"transencoder"])["world_size"] == 2
    assert is_made(path, FACTS) is True
    with pytest.raises(InputError, match="seed is 1 there and 2 here"):
        is_made(path, {**FACTS, "seed": 2})


def test_scores_of_files_that_have_changed_are_refused(tmp_path):
    (tmp_path / "pairs.txt").write_text("a||b\n")
    arguments, path = run_arguments(tmp_path, pairs=[str(tmp_path / "pairs.txt")]), tmp_path / "scores.parquet"
    write_scores(path, pairs_table(), np.zeros(5, dtype=np.float32), identity(arguments))
    assert is_made(path, identity(arguments)) is True
    (tmp_path / "pairs.txt").write_text("a||c\n")
    with pytest.raises(InputError, match=r"holds other scores \(.*pairs\.txt has changed since\)"):
        is_made(path, identity(arguments))


@pytest.mark.parametrize("name", ["scores", "scores.tsv", "scores.parquet.gz", "parquet"])
def test_scores_go_into_a_parquet_file_only(tmp_path, name):
    with pytest.raises(InputError, match=r"must be the name of a \.parquet file"):
        check_output(tmp_path / name)
    with pytest.raises(InputError, match=r"must be the name of a \.parquet file"):
        is_made(tmp_path / name, FACTS)


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"--output {tmp_path}/file/scores\.parquet: cannot be written: "):
        check_output(tmp_path / "file" / "scores.parquet")


def test_an_output_in_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transencoder.data.scores.tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        check_output(tmp_path / "scores.parquet")


def test_checking_an_output_makes_its_folder_and_nothing_in_it(tmp_path):
    check_output(tmp_path / "a" / "b" / "scores.parquet")
    assert names(tmp_path / "a" / "b") == []


def test_scores_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
    path = tmp_path / "scores.parquet"
    write_scores(path, pairs_table(), np.zeros(5, dtype=np.float32), FACTS)

    class FullDisk(pq.ParquetWriter):
        def write_table(self, table: pa.Table) -> None:
            super().write_table(table)
            raise OSError("disk full")

    monkeypatch.setattr("transencoder.data.scores.pq.ParquetWriter", FullDisk)
    with pytest.raises(OSError, match="disk full"):
        write_scores(path, pairs_table(), np.ones(5, dtype=np.float32), FACTS)
    assert names(tmp_path) == ["scores.parquet"]
    assert pq.read_table(path)["score"].to_pylist() == [0] * 5


# --- a student's pairs -----------------------------------------------------------------------------------------------


SCALES = "as cosines and probabilities are; step 2 takes other scales with --rescale logistic"


def label_arguments(**changes: object) -> Bi2CrossArguments:
    return Bi2CrossArguments(model_name_or_path="no/model", output_dir="cross", **changes)


@pytest.mark.parametrize("score", ["1.01", "-1.5", "3"])
def test_scores_that_are_neither_cosines_nor_probabilities_are_refused_with_their_row(tmp_path, score):
    path = tmp_path / "scores.tsv"
    path.write_text(f"sentence1\tsentence2\tscore\na\tb\t0.5\nc\td\t{score}\ne\tf\t7\n")
    with pytest.raises(InputError) as caught:
        read_label_pairs(label_arguments(scores=[str(path)]))
    assert str(caught.value) == f"{path}: row 2: score {float(score)} is not in [-1, 1], {SCALES}"


def test_scores_up_to_rounding_are_taken_and_repeats_kept(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("q1,sentence2,score\na,b,1\na,b,-1\nc,d,1.000001\ne,f,-1.000001\n")
    table = read_label_pairs(label_arguments(scores=[str(path)], columns=["sentence1=q1"]))
    assert table["sentence1"][:] == ["a", "a", "c", "e"]
    assert table["score"][:] == [1, -1, 1.000001, -1.000001]


def test_pairs_for_teachers_come_without_repeats_and_scores(tmp_path, tiny_bert):
    folder = tmp_path / "bi"
    folder.mkdir()
    load_bi_encoder(str(tiny_bert), ModelOptions("mean")).save_pretrained(folder)
    path = tmp_path / "pairs.txt"
    path.write_text("a||b\nc||d\na||b\nb||a\n")
    table = read_label_pairs(label_arguments(teachers=[str(folder)], pairs=[str(path)]))
    assert table.column_names == ["sentence1", "sentence2"]
    assert list(zip(table["sentence1"][:], table["sentence2"][:], strict=True)) == [("a", "b"), ("c", "d"), ("b", "a")]


def test_teachers_are_checked_before_the_pairs_are_used(tmp_path, tiny_bert):
    path = tmp_path / "pairs.txt"
    path.write_text("a||b\n")
    for teacher, expected in [(str(tmp_path / "no"), "no such folder"), (str(tiny_bert), "add --pooling")]:
        with pytest.raises(InputError, match=expected):
            read_label_pairs(label_arguments(teachers=[teacher], pairs=[str(path)]))


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["scores.tsv", "file/scores.parquet"])
def test_score_pairs_refuses_a_bad_output_before_any_work(tmp_path, run_script, name, words):
    (tmp_path / "file").touch()
    output = tmp_path / name
    result = run_script("score_pairs.py", "--encoders", "no/model", "--pairs", "no.txt", "--output", output, *words)
    assert result.returncode == 2
    assert f"error: --output {output}: " in result.stderr


# --- scoring batches -------------------------------------------------------------------------------------------------


def test_token_batches_hold_every_row_once_longest_first_within_the_budget():
    lengths = np.random.default_rng(0).integers(3, 65, size=500)
    batches = list(token_batches(lengths, 256))
    assert sorted(np.concatenate(batches)) == list(range(500))
    ordered = lengths[np.concatenate(batches)]
    assert (np.diff(ordered) <= 0).all()
    assert all(len(batch) * lengths[batch].max() <= 256 for batch in batches)
    # No batch could have taken the next row as well.
    assert all((len(batch) + 1) * lengths[batch].max() > 256 for batch in batches[:-1])


def test_a_row_longer_than_the_budget_comes_alone():
    batches = [batch.tolist() for batch in token_batches(np.array([3, 50, 4, 20]), 10)]
    assert batches == [[1], [3], [2, 0]]

"""Whatever the readers, the recipes, the model folders and the scripts are given: an answer, or one line.

No traceback, no hang, nothing half written. Hypothesis makes the cases, the same ones in every run of CI;
`FUZZ_EXAMPLES=2000 pytest tests/scripts/test_bad_inputs.py` makes more of them, others each time. The last test counts
them.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import launch_command, random_pairs, write_jsonl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from transencoder.config.options import HubTarget
from transencoder.config.parsing import parse_stage
from transencoder.config.recipes import DRIVER, as_options, read_recipe
from transencoder.config.stages import STAGES
from transencoder.config.tools import DuplicatesArguments, SearchArguments, parse_tool
from transencoder.data.scores import read_metadata
from transencoder.data.tables import read_pairs, read_sentences
from transencoder.data.tasks import load_task
from transencoder.encoders import load_encoder
from transencoder.errors import one_line_errors
from transencoder.hub.push import recall, stage_repository
from transencoder.inference import Inference
from transencoder.model_checks import check_encoders, check_language_model
from transencoder.model_files import ModelOptions
from transencoder.run.plan import load_plan
from transencoder.run.stages import Stage, make_stages
from transencoder.run.summary import read_results
from transencoder.runtime.accelerator import quiet_libraries
from transencoder.runtime.records import claim, identity
from transencoder.scoring import score_texts
from transencoder.search.index import check_index

LONGER = int(os.environ.get("FUZZ_EXAMPLES", 0))
SECONDS = 30  # after which a case counts as hanging
CASES: set[str] = set()


def cases(examples: int) -> Callable:
    """Settings of a property: so many examples in CI, drawn without chance."""
    return settings(
        max_examples=LONGER or examples,
        derandomize=not LONGER,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for all cases of a property."""
    return tmp_path_factory.mktemp("cases")


def outcome(action: Callable[[], Any], case: Any) -> Any:
    """What `action` returns, or its line of error, told as a script tells it.

    Fails for any other exception, for more than one line, for a hang, and for what is left of unfinished files.
    """
    CASES.add(repr(case))
    quiet_libraries()  # as every script does
    found: list[Any] = []
    errors = io.StringIO()

    def hang(*_: Any) -> None:
        raise AssertionError(f"still at work after {SECONDS} s: {case!r:.300}")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(errors):
            one_line_errors(lambda: found.append(action()))()
    except SystemExit as stop:
        assert stop.code == 2, stop.code
        lines = errors.getvalue().splitlines()
        assert len(lines) == 1, lines
        assert ": error: " in lines[0]
        return lines[0]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.tmp"))
    return found[0]


def is_refused(result: Any) -> bool:
    return isinstance(result, str) and ": error: " in result


# --- tables ----------------------------------------------------------------------------------------------------------

# Letters of all kinds, among them combining marks, right-to-left marks, emoji, control characters and NUL.
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from("\0\r\n\t\"',|{}[]\\\ufeff\u2028\u202e\u200b😀é\x85\x1a")
)
ODD_CELLS = st.one_of(st.text(CHARACTERS, max_size=12), st.sampled_from(["", " ", "a||b", '"', "a\tb", "\0"]))
GOOD_CELLS = st.sampled_from(["a", "b c", "NaN", "null", "مرحبا", "👩‍👩‍👧", "déjà vu", "0", "'", "{}", "x" * 300])
CELLS = st.integers(0, 7).flatmap(lambda place: GOOD_CELLS if place < 7 else ODD_CELLS)
ODD_SCORES = st.one_of(
    st.floats(),
    st.none(),
    st.booleans(),
    CELLS,
    st.sampled_from([10**400, -(10**400), [1], {"a": 1}, "0x1", "1,5", "\u0661"]),
)
SCORES = st.integers(0, 7).flatmap(lambda place: st.sampled_from([0, 1, 0.5, "1"]) if place < 7 else ODD_SCORES)
COLUMNS = ("sentence1", "sentence2", "score", "label", "sentence", "", "a.b")
ROWS = st.lists(st.tuples(CELLS, CELLS, SCORES, SCORES, CELLS, CELLS, CELLS), min_size=1, max_size=6)
CODECS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift-jis", "utf-7")
SUFFIXES = (".txt", ".tsv", ".csv", ".jsonl")


def as_text(rows: list[tuple], names: list[str], suffix: str, end: str) -> str:
    """Rows as a file of this suffix, cells that break the format included."""
    if suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows]
    else:
        separator = {".txt": "||", ".tsv": "\t", ".csv": ","}[suffix]
        table = rows if suffix == ".txt" else [tuple(names), *rows]
        lines = [separator.join(map(str, row)) for row in table]
    return end.join([*lines, ""])


@st.composite
def text_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The suffix and the bytes of a file that may be a table: other codecs, line ends, repeated rows and columns, cut
    anywhere, zipped or only called so.
    """
    suffix = draw(st.sampled_from(SUFFIXES))
    kept = draw(st.permutations(range(len(COLUMNS))))[: draw(st.integers(1, len(COLUMNS)))]
    kept = draw(st.sampled_from([[0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], kept, [*kept, *kept]]))
    rows = [tuple(row[i] for i in kept) for row in draw(ROWS)] * draw(st.integers(1, 2))
    text = as_text(rows, [COLUMNS[i] for i in kept], suffix, draw(st.sampled_from(["\n", "\n", "\r\n", "\r"])))
    content = text.encode(draw(st.sampled_from([*["utf-8"] * 8, *CODECS])), "replace")
    if draw(st.integers(0, 4)) == 4:
        content = content[: draw(st.integers(0, len(content)))]
    packing = draw(st.sampled_from(["plain", "plain", "plain", "gzip", "cut", "not gzip"]))
    if packing in ("gzip", "cut"):
        content = gzip.compress(content, mtime=0)
    if packing == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    return suffix + ("" if packing == "plain" else ".gz"), content


def read_any(path: str, gold: str | None) -> list:
    """What the file gives as pairs, or as sentences."""
    return read_sentences([path])["sentence"] if gold == "sentences" else list(read_pairs([path], gold))


@cases(220)
@given(file=text_files(), gold=st.sampled_from([None, None, "score", "label", "sentences"]))
def test_a_text_file_is_read_or_refused_by_name(place, file, gold):
    suffix, content = file
    path = place / f"table{suffix}"
    path.write_bytes(content)
    result = outcome(lambda: read_any(str(path), gold), ("text", suffix, content, gold))
    if is_refused(result):
        assert str(path) in result
    elif gold in ("score", "label"):
        assert all(abs(row[gold]) < float("inf") for row in result)


@cases(60)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([*SUFFIXES, ".parquet"]), zipped=st.booleans())
@example(content=b"\xff\xfeh\x00i\x00", suffix=".txt", zipped=False)
@example(content=b"h\x00i\x00\n\x00y\x00o\x00", suffix=".txt", zipped=False)
@example(content=b'{"sentence1": "a", "sentence1": "b", "sentence2": "c"}\n', suffix=".jsonl", zipped=False)
@example(content=b'{"sentence1": "\\ud800", "sentence2": "c"}\n' * 2, suffix=".jsonl", zipped=False)
@example(content=b"[" * 100_000, suffix=".jsonl", zipped=False)
@example(
    content=b'{"sentence1": "a", "sentence2": "b"}\n{"x":' + b"[" * 100_000 + b"\n", suffix=".jsonl", zipped=False
)
@example(content=b'{"sentence1": "a", "sentence2": "b"}\n{"x":' * 3000, suffix=".jsonl", zipped=False)
@example(content=b'"' * 200_000, suffix=".csv", zipped=False)
@example(content=b"PAR1" + b"\xff" * 60 + b"PAR1", suffix=".parquet", zipped=False)
def test_any_bytes_are_read_or_refused_by_name(place, content, suffix, zipped):
    path = place / f"bytes{suffix}{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    for gold in (None, "sentences"):
        result = outcome(lambda gold=gold: read_any(str(path), gold), ("bytes", content, suffix, zipped, gold))
        assert not is_refused(result) or str(path) in result


WORD = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='|",\ufeff'), min_size=1, max_size=20)
SENTENCE = WORD.filter(str.strip)


@cases(60)
@given(
    pairs=st.lists(st.tuples(SENTENCE, SENTENCE), min_size=2, max_size=5, unique=True),
    suffix=st.sampled_from(SUFFIXES),
    zipped=st.booleans(),
    mark=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_text_in_any_script_arrives_as_it_was_written(place, pairs, suffix, zipped, mark, end):
    text = as_text(pairs, ["sentence1", "sentence2"], suffix, end).encode("utf-8-sig" if mark else "utf-8")
    path = place / f"good{suffix}{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(text, mtime=0) if zipped else text)
    result = outcome(lambda: read_any(str(path), None), ("good", text, suffix, zipped))
    if len({sentence for pair in pairs for sentence in pair}) > 1:
        assert [(row["sentence1"], row["sentence2"]) for row in result] == pairs


PARQUET_COLUMNS = {
    "text": pa.array(["a", "b"]),
    "long text": pa.array(["a" * 1_000_000, "b"]),
    "large text": pa.array(["a", "b"], pa.large_string()),
    "text view": pa.array(["a", "b"], pa.string_view()),
    "bytes": pa.array([b"a", b"\xff"]),
    "integers": pa.array([1, 2]),
    "large numbers": pa.array([2**63, 1], pa.uint64()),
    "halves": pa.array([0.5, 1.0], pa.float16()),
    "floats": pa.array([0.5, float("nan")]),
    "decimals": pa.array([1, 2]).cast(pa.decimal128(30, 2)),
    "truths": pa.array([True, False]),
    "nothing": pa.nulls(2),
    "gaps": pa.array(["a", None]),
    "lists": pa.array([["a"], ["b"]]),
    "structs": pa.array([{"a": 1}, {"a": 2}]),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "dates": pa.array([1, 2]).cast(pa.timestamp("us")),
    "numbers as text": pa.array(["1", " 2 "]),
    "numbers as a dictionary": pa.array(["1", "0"]).dictionary_encode(),
}


@cases(90)
@given(
    kinds=st.tuples(*[st.sampled_from(sorted(PARQUET_COLUMNS))] * 3),
    name=st.sampled_from(["score", "label", "sentence1", "other"]),
    keep=st.sampled_from([1.0, 1.0, 0.5, 0.9]),
    gold=st.sampled_from([None, "score", "label", "sentences"]),
)
@example(kinds=("text", "long text", "large numbers"), name="score", keep=1.0, gold="score")
def test_a_parquet_file_of_any_types_is_read_or_refused_by_name(place, kinds, name, keep, gold):
    path = place / "table.parquet"
    pq.write_table(pa.table([PARQUET_COLUMNS[kind] for kind in kinds], names=["sentence1", "sentence2", name]), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    result = outcome(lambda: read_any(str(path), gold), ("parquet", kinds, name, keep, gold))
    if is_refused(result):
        assert str(path) in result
    else:
        assert keep == 1.0


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_very_many_columns_are_read(place, suffix):
    names = ["sentence1", "sentence2", *(f"column {i}" for i in range(20_000))]
    path, row = place / f"wide{suffix}", ["a", "b", *["x"] * 20_000]
    if suffix == ".parquet":
        pq.write_table(pa.table([[cell] for cell in row[:3000]], names=names[:3000]), path)
    else:
        path.write_text(as_text([tuple(row)], names, suffix, "\n"), encoding="utf-8")
    assert outcome(lambda: read_any(str(path), None), ("wide", suffix)) == [{"sentence1": "a", "sentence2": "b"}]


@pytest.mark.parametrize("suffix", [".txt", ".tsv", ".csv", ".jsonl"])
def test_a_sentence_of_a_megabyte_arrives_whole(place, suffix):
    pair, path = ("á" * 500_000, "b"), place / f"long{suffix}"
    path.write_text(as_text([pair], ["sentence1", "sentence2"], suffix, "\n"), encoding="utf-8")
    (row,) = outcome(lambda: read_any(str(path), None), ("long", suffix))
    assert (row["sentence1"], row["sentence2"]) == pair


# --- what is no file -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_paths(place) -> dict[str, str]:
    """What a path may lead to, other than a file."""
    folder = place / "odd"
    (folder / "folder.jsonl").mkdir(parents=True)
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "nowhere.jsonl").symlink_to(folder / "missing")
    (folder / "empty.jsonl").touch()
    names = {name: str(folder / f"{name}.jsonl") for name in ("folder", "pipe", "loop", "nowhere", "empty", "missing")}
    return names | {
        "null": "/dev/null",
        "zero": "/dev/zero",
        "long": str(folder / ("x" * 300 + ".jsonl")),
        "very long": "x/" * 5000 + "y.jsonl",
        "inside a file": str(folder / "empty.jsonl" / "a.jsonl"),
        "no text": str(folder / "d\udce9j\udce0.jsonl"),
        "star": "*.jsonl",
        "nothing": "",
        "blank": " ",
    }


ODD = ["folder", "pipe", "loop", "nowhere", "empty", "missing", "null", "zero", "long", "very long", "inside a file"]
ODD += ["no text", "star", "nothing", "blank"]
TAKES_A_PATH: dict[str, Callable[[str], Any]] = {
    "pairs": lambda path: read_pairs([path]),
    "scores": lambda path: read_pairs([path], "score"),
    "sentences": lambda path: read_sentences([path]),
    "recipe": read_recipe,
    "task": load_task,
    "named task": lambda path: load_task(f"mine={path}"),
    "encoder": lambda path: check_encoders([path], "mean"),
    "language model": check_language_model,
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("reader", TAKES_A_PATH)
def test_what_is_no_file_is_refused(odd_paths, reader, kind):
    assert is_refused(outcome(lambda: TAKES_A_PATH[reader](odd_paths[kind]), ("path", reader, kind)))


SCRIPTS: dict[str, list[str]] = {
    "train_contrastive.py": ["--model_name_or_path", "{model}", "--sentences", "{odd}", "--output_dir", "{out}"],
    "score_pairs.py": ["--encoders", "{model}", "--pairs", "{odd}", "--output", "{out}/scores.parquet"],
    "mine_pairs.py": ["--encoders", "{model}", "--sentences", "{odd}", "--output", "{out}/pairs.parquet"],
    "distill_bi2cross.py": ["--model_name_or_path", "{model}", "--scores", "{odd}", "--output_dir", "{out}"],
    "distill_cross2bi.py": ["--model_name_or_path", "{model}", "--scores", "{odd}", "--output_dir", "{out}"],
    "evaluate_encoders.py": ["--encoders", "{model}", "--tasks", "mine={odd}", "--output_dir", "{out}"],
    "search.py": ["--index", "{out}", "--bi_encoder", "{model}", "--sentences", "{odd}", "--query", "a"],
    "find_duplicates.py": [
        *("--bi_encoder", "{model}", "--cross_encoder", "{model}"),
        *("--sentences", "{odd}", "--output", "{out}/x.csv"),
    ],
    "plan_run.py": ["--recipe", "{odd}", "--output_dir", "{out}"],
    "summarize_run.py": ["{odd}"],
    "run_stages.py": ["{odd}"],
    "push_to_hub.py": ["{odd}", "--hub_model_id", "org/name"],
    "export_onnx.py": ["{odd}", "{out}"],
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "null", "long", "no text"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_refuses_what_is_no_file_and_leaves_nothing(
    tmp_path, odd_paths, bi_encoder, run_script, script, kind
):
    out = tmp_path / "out"
    words = [word.format(model=bi_encoder, odd=odd_paths[kind], out=out) for word in SCRIPTS[script]]
    CASES.add(repr(("script", script, kind)))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(SECONDS)
    try:
        result = run_script(script, *words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"{script}: error: ")
    assert result.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- recipes ---------------------------------------------------------------------------------------------------------

KEYS = sorted({field.name for stage in STAGES.values() for field in dataclasses.fields(stage.arguments)})
PLAN_KEYS = ["students", "tasks", "pairs", "sentences", "dev", "cycles", "data_dir", "paper", "stop_at", "remine"]
PLAN_KEYS += ["num_training_pairs", "extra_pairs", "student_start", "alternate", "sentences_b", "no such key"]
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["../x", "a/b", "..", ".", "", "..=file", "--overwrite", "a\0b", "bert", "sts", "stsb.dev", "=", "a="]
    ),
    st.sampled_from(["ensemble", "no", "1e9", "-1", "nan", "inf", "x" * 300, "*", "$(id)", "'; id", "a\nb", "\ud800"]),
)
SCALARS = st.one_of(WORDS, st.integers(), st.floats(), st.booleans(), st.none(), st.dates(), st.binary(max_size=3))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(WORDS, st.integers()), inner, max_size=3)
    ),
    max_leaves=6,
)
STUDENTS = st.lists(
    st.fixed_dictionaries(
        {"name": st.one_of(st.just("bert"), SCALARS)},
        optional={
            "plm": VALUES,
            "bi_encoder": VALUES,
            "distill_bi2cross": st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
        },
    ),
    max_size=2,
)
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        DRIVER: st.one_of(
            st.fixed_dictionaries(
                {"students": STUDENTS, "tasks": VALUES},
                optional={key: VALUES for key in PLAN_KEYS if key not in ("students", "tasks")},
            ),
            VALUES,
        ),
        **{
            section: st.one_of(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), VALUES)
            for section in ("common", "distill_bi2cross", "score_pairs", "no such section")
        },
    },
)


# A plan that is good but for a thing or two.
NEARLY_GOOD = st.builds(
    lambda changes, sections: {DRIVER: {**GOOD_PLAN, **changes}, **sections},
    st.dictionaries(st.sampled_from(PLAN_KEYS), VALUES, max_size=1),
    st.dictionaries(
        st.sampled_from(sorted(STAGES)), st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=1), max_size=1
    ),
)
GOOD_PLAN = {"students": [{"name": "bert", "plm": "x"}], "tasks": ["stsb"], "pairs": ["x"], "sentences": ["x"]}


def use_recipe(path: str) -> list[Stage]:
    """All that the driver does with a recipe before it looks at files: the stages."""
    stages = make_stages(load_plan(read_recipe(path), path), Path("run"), Path(path))
    for stage in STAGES:
        parse_stage(stage, argv=as_options({**REQUIRED[stage], "recipe": path}))
    return stages


REQUIRED = {
    "train_contrastive": {"model_name_or_path": "x", "sentences": "x", "output_dir": "x"},
    "mine_pairs": {"encoders": "x", "sentences": "x", "output": "x"},
    "score_pairs": {"encoders": "x", "pairs": "x", "output": "x"},
    "distill_bi2cross": {"model_name_or_path": "x", "scores": "x", "output_dir": "x"},
    "distill_cross2bi": {"model_name_or_path": "x", "scores": "x", "output_dir": "x"},
    "evaluate_encoders": {"encoders": "x", "tasks": "x", "output_dir": "x"},
}


@cases(200)
@given(recipe=st.one_of(NEARLY_GOOD, NEARLY_GOOD, SECTIONS, VALUES), flow=st.booleans())
def test_a_recipe_of_anything_is_taken_or_refused(place, recipe, flow):
    path = place / "recipe.yaml"
    path.write_text(yaml.dump(recipe, default_flow_style=flow), encoding="utf-8")
    outcome(lambda: use_recipe(str(path)), ("recipe", path.read_text(encoding="utf-8")))


@cases(120)
@given(text=st.one_of(st.text(CHARACTERS, max_size=40), st.text("{}[]:-?!&*|>'\"%@#, \nab01.", max_size=30)))
@example(text="common: {seed: 2021-02-31}")
@example(text="common: {seed: !!int ''}")
@example(text="common: {seed: !!timestamp x}")
@example(text="common: {seed: !!float x}")
@example(text="common: {seed: !!binary é}")
@example(text=f"common: {{seed: {'9' * 5000}}}")
@example(text='common: {columns: "\\0"}')
@example(text='common: {columns: "\\ud800"}')
@example(text="common: !!python/object/apply:os.system [touch /tmp/no]")
@example(text="common: !!python/name:os.system")
@example(text="!!python/object:__main__.X {}")
@example(text="common: {? [a] : b}")
@example(text="common: &a {columns: *a}")
@example(text="common: &a [*a]")
@example(text="%YAML 9.9\n---\ncommon:\n")
@example(text="a: b\n---\nc: d\n")
@example(text="common:\n\tseed: 1\n")
@example(text="[" * 2000)
@example(text="common: " + "{a: " * 2000)
@example(text="x" * 1_000_000)
def test_any_text_as_a_recipe_is_taken_or_refused(place, text):
    path = place / "recipe.yaml"
    path.write_bytes(text.encode(errors="replace"))
    outcome(lambda: use_recipe(str(path)), ("recipe text", text))


def laughs(levels: int, width: int) -> str:
    """Lists of lists of ... of a word, by aliases: short to write, `width ** levels` words to read."""
    lines = [f"a0: &a0 [{', '.join(['lol'] * width)}]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


BOMBS = {
    "lists": laughs(9, 10),
    "long text": f"a: &a {'x' * 200_000}\nb: [{', '.join(['*a'] * 9_000)}]",
    "merged": "\n".join(
        ["a0: &a0 {k: v}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
    ),
    "in an option": f"common:\n  columns: &a [{'x, ' * 1000}]\n  pairs: [{', '.join(['*a'] * 1000)}]",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_recipe_that_blows_itself_up_is_refused_at_once(place, kind):
    path = place / "bomb.yaml"
    path.write_text(BOMBS[kind], encoding="utf-8")
    assert "its aliases stand for too much text" in outcome(lambda: use_recipe(str(path)), ("bomb", kind))


def test_aliases_that_repeat_a_little_are_taken(place):
    path = place / "aliases.yaml"
    path.write_text("common: &shared {seed: 7}\nscore_pairs: {<<: *shared, shard_rows: 10}\n", encoding="utf-8")
    assert read_recipe(str(path))["score_pairs"] == {"seed": 7, "shard_rows": 10}


@pytest.mark.parametrize("seed", ["-5", str(2**32), "x", "1.5", ""])
def test_the_drivers_seed_is_checked(place, run_script, seed):
    (place / "seed.yaml").write_text("common: {seed: 1}\n", encoding="utf-8")
    CASES.add(repr(("driver's seed", seed)))
    result = run_script("plan_run.py", "--recipe", place / "seed.yaml", "--output_dir", place / "run", "--seed", seed)
    assert result.returncode == 2
    assert "--seed" in result.stderr and result.stderr.count("\n") == 1


NAMES = [
    "../x",
    "a/b",
    "/etc",
    "..",
    ".",
    "",
    "-x",
    "a b",
    "a\nb",
    "a=b",
    "é" * 101,
    "a:b",
    "$x",
    ".hidden",
    "\\",
    "~",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_student_whose_name_is_no_plain_folder_name_is_refused(name):
    students = [{"name": name, "plm": "x"}]
    plan = {DRIVER: {"students": students, "tasks": ["stsb"], "pairs": ["x"], "sentences": ["x"]}}
    assert is_refused(outcome(lambda: load_plan(plan, "recipe"), ("student", name)))


@pytest.mark.parametrize("name", [*NAMES, "a|b", "..\0"])
def test_a_task_whose_name_would_break_a_table_or_leave_a_folder_is_refused(corpus, name):
    spec = f"{name}={corpus / 'test.jsonl'}"
    assert is_refused(outcome(lambda: load_task(spec), ("task name", name)))


# --- arguments -------------------------------------------------------------------------------------------------------


OPTION_VALUES = st.one_of(st.integers(1, 99), st.sampled_from(["mean", "cls", "bf16", "0.5", True]), SCALARS)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A stage and words for it: what it requires, and some options with any values."""
    stage = draw(st.sampled_from(sorted(STAGES)))
    names = [field.name for field in dataclasses.fields(STAGES[stage].arguments) if field.name != "recipe"]
    values = draw(st.dictionaries(st.sampled_from(names), OPTION_VALUES, max_size=2))
    extra = draw(st.sampled_from([[], [], [], ["--overwrite"], ["x"], ["--no_such_option", "1"], [""]]))
    return stage, as_options({**REQUIRED[stage], **values}) + extra


@cases(150)
@given(words=command_lines())
def test_any_words_are_arguments_or_refused(words):
    stage, argv = words
    outcome(lambda: vars(parse_stage(stage, argv=argv)), ("arguments", stage, argv))


TOOL_OPTIONS = ["top_k", "candidates", "threshold", "neighbours", "pooling", "seed", "shard_rows", "query", "host"]
TOOL_OPTIONS += ["port", "run"]


@cases(60)
@given(
    tool=st.sampled_from([SearchArguments, DuplicatesArguments]),
    values=st.dictionaries(st.sampled_from(TOOL_OPTIONS), OPTION_VALUES, max_size=2),
)
def test_any_words_are_arguments_of_a_tool_or_refused(tool, values):
    fields = {field.name: field for field in dataclasses.fields(tool)}
    required = {name: "x" for name, field in fields.items() if field.default is dataclasses.MISSING}
    argv = sys.argv
    sys.argv = ["tool.py", *as_options({**required, **values})]
    try:
        outcome(lambda: vars(parse_tool(tool, None)), ("tool", sys.argv))
    finally:
        sys.argv = argv


RECORD = st.one_of(
    st.text(max_size=30).map(str.encode),
    st.binary(max_size=30),
    st.dictionaries(st.sampled_from(["stage", "status", "arguments", "x"]), VALUES).map(
        lambda content: json.dumps(content, default=str).encode()
    ),
    st.just(b"[" * 5_000),
)


@cases(60)
@given(record=RECORD)
def test_an_output_folder_with_any_record_is_refused(place, record):
    folder = place / "claimed"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(record)
    arguments = parse_stage("train_contrastive", argv=as_options(REQUIRED["train_contrastive"]))
    arguments.output_dir = str(folder)
    assert is_refused(
        outcome(lambda: claim(arguments, "train_contrastive", identity(arguments, [])), ("record", record))
    )


TAKES_A_RECORD = {
    "index.json": lambda folder: check_index(folder, "x", None),
    "hub.json": recall,
    "run.json": lambda folder: stage_repository(folder, HubTarget(hub_model_id="org/name")),
    "results.json": lambda folder: read_results(folder / "results.json"),
}


@cases(80)
@given(record=RECORD, name=st.sampled_from(sorted(TAKES_A_RECORD)))
@example(record=b"[]", name="index.json")
@example(record=b"{}", name="hub.json")
@example(record=b'{"stage": "score_pairs", "arguments": {}}', name="run.json")
@example(record=b"[{}]", name="results.json")
def test_any_record_in_the_place_of_ours_is_read_or_refused_by_name(place, record, name):
    folder = place / "records"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(record)
    result = outcome(lambda: TAKES_A_RECORD[name](folder), ("record", name, record))
    assert not is_refused(result) or str(folder) in result


@cases(30)
@given(record=RECORD)
def test_any_metadata_of_a_parquet_file_is_read_or_passed_over(place, record):
    path = place / "facts.parquet"
    pq.write_table(pa.table({"score": [0.5]}).replace_schema_metadata({"transencoder": record}), path)
    assert isinstance(outcome(lambda: read_metadata(path), ("facts", record)), dict | None)


# --- models ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(folder: Path, changes: dict[str, bytes | None]) -> Iterator[Path]:
    """A copy of a model's folder with other files; None takes one away."""
    copy = folder.with_name("changed-model")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    for name, content in changes.items():
        (copy / name).unlink(missing_ok=True)
        if content is not None:
            (copy / name).write_bytes(content)
    yield copy
    shutil.rmtree(copy)


def use_model(folder: Path) -> str:
    """Check and load an encoder, as a script that scores does."""
    check_encoders([str(folder)], ModelOptions("mean"))
    encoder, texts = load_encoder(str(folder), ModelOptions("mean")), (["a", "b c"], ["d", "e"])
    assert score_texts(encoder.eval(), *texts, Inference(Accelerator(cpu=True))).shape == (2,)
    return encoder.kind


CONFIG_KEYS = ["model_type", "architectures", "id2label", "hidden_size", "num_hidden_layers", "num_attention_heads"]
CONFIG_KEYS += [
    "vocab_size",
    "max_position_embeddings",
    "auto_map",
    "dtype",
    "hidden_act",
    "problem_type",
    "num_labels",
]
CONFIG_KEYS += ["initializer_range", "layer_norm_eps", "quantization_config", "transformers_version", "is_decoder"]
MODEL_VALUES = st.one_of(
    st.integers(-2, 70), st.none(), st.booleans(), st.sampled_from(["", "bert", "x", "float32", "../x", "gelu"]),
    st.lists(st.sampled_from(["BertModel", "BertForSequenceClassification", 1, None]), max_size=2),
    st.dictionaries(st.sampled_from(["0", "1", "AutoModel", "quant_method"]), st.sampled_from(["x", "a.b", 1])),
)  # fmt: skip


@cases(120)
@given(
    changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), MODEL_VALUES, min_size=1, max_size=2),
    kind=st.sampled_from(["bi", "cross"]),
)
@example(changes={"auto_map": {"AutoModel": "evil.Model"}}, kind="bi")
@example(changes={"auto_map": {"AutoModel": "evil.Model"}, "model_type": "own"}, kind="cross")
@example(changes={"hidden_size": 64}, kind="bi")
@example(changes={"num_hidden_layers": 3}, kind="cross")
@example(changes={"vocab_size": 30_000}, kind="bi")
def test_a_model_with_any_configuration_is_loaded_or_refused_by_name(bi_encoder, cross_encoder, changes, kind):
    folder = bi_encoder if kind == "bi" else cross_encoder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    with changed(folder, {"config.json": json.dumps(config).encode()}) as model:
        result = outcome(lambda: use_model(model), ("config", kind, changes))
        assert not is_refused(result) or str(model) in result
        if changes.get("auto_map"):
            assert "asks for code of its own" in result


SIDE_FILES = ["config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"]
SIDE_FILES += ["tokenizer_config.json", "run.json", "special_tokens_map.json", "config_sentence_transformers.json"]
SIDE_KEYS = ["max_seq_length", "pooling_mode", "pooling_mode_mean_tokens", "model", "type", "status", "prompts"]
SIDE_KEYS += ["default_prompt_name", "similarity_fn_name", "truncate_dim", "module_output_name", "modality_config"]


@cases(90)
@given(
    name=st.sampled_from(SIDE_FILES),
    content=st.one_of(
        st.none(),
        st.sampled_from([b"", b"null", b"[]", b"{}", b"0", b'"x"', b"[{}]", b"\xff\xfe", b"[" * 5_000, b"{" * 10]),
        st.dictionaries(
            st.sampled_from(SIDE_KEYS),
            MODEL_VALUES,
        ).map(lambda content: json.dumps(content).encode()),
    ),
)
def test_a_model_with_any_file_in_the_place_of_its_own_is_loaded_or_refused_by_name(bi_encoder, name, content):
    with changed(bi_encoder, {name: content}) as model:
        result = outcome(lambda: use_model(model), ("model file", name, content))
        assert not is_refused(result) or str(model) in result


SETTINGS = {
    "config_sentence_transformers.json": ["prompts", "default_prompt_name", "similarity_fn_name", "activation_fn"],
    "sentence_bert_config.json": ["max_seq_length", "module_output_name", "modality_config", "transformer_task"],
    "1_Pooling/config.json": ["pooling_mode", "embedding_dimension", "include_prompt"],
}


@cases(120)
@given(
    kind=st.sampled_from(["bi", "cross"]),
    place_=st.sampled_from([(file, key) for file, keys in SETTINGS.items() for key in keys]),
    value=MODEL_VALUES,
)
@example(kind="bi", place_=("config_sentence_transformers.json", "default_prompt_name"), value=["x"])
@example(kind="bi", place_=("config_sentence_transformers.json", "truncate_dim"), value="x")
@example(kind="cross", place_=("sentence_bert_config.json", "max_seq_length"), value=-2)
@example(kind="cross", place_=("sentence_bert_config.json", "max_seq_length"), value="x")
@example(kind="bi", place_=("sentence_bert_config.json", "module_output_name"), value=[])
def test_a_model_with_any_setting_of_its_modules_is_used_or_refused_by_name(
    bi_encoder, cross_encoder, kind, place_, value
):
    folder, (file, key) = bi_encoder if kind == "bi" else cross_encoder, place_
    if (folder / file).exists():
        content = json.loads((folder / file).read_text(encoding="utf-8")) | {key: value}
        with changed(folder, {file: json.dumps(content).encode()}) as model:
            result = outcome(lambda: use_model(model), ("setting", kind, place_, value))
            assert not is_refused(result) or str(model) in result


@cases(40)
@given(cut=st.floats(0, 1, exclude_max=True), flips=st.lists(st.integers(0, 2000), max_size=3))
def test_damaged_weights_are_refused_by_name(bi_encoder, cut, flips):
    content = bytearray((bi_encoder / "model.safetensors").read_bytes())
    for place_ in flips:
        content[place_] ^= 0xFF
    with changed(bi_encoder, {"model.safetensors": bytes(content[: int(cut * len(content))])}) as model:
        assert str(model / "model.safetensors") in outcome(lambda: use_model(model), ("weights", cut, flips))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_refused_with_its_file_and_name(cross_encoder, value, dtype):
    with changed(cross_encoder, {}) as model:
        weights = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
        name = sorted(weights)[3]
        weights[name].view(-1)[-1] = value
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        result = outcome(lambda: check_encoders([str(model)]), ("not finite", value, dtype))
        assert f"{model / 'model.safetensors'}: {name} holds values that are not finite" in result


@pytest.mark.parametrize("missing", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_weights_that_lack_a_tensor_are_refused_with_its_name(bi_encoder, missing):
    with changed(bi_encoder, {}) as model:
        weights = load_file(model / "model.safetensors")
        weights.pop(missing)
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        result = outcome(lambda: use_model(model), ("missing tensor", missing))
        assert f"{model}: its weights lack {missing}" in result


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_pickled_weights_are_never_read_and_the_advice_converts_them(bi_encoder, cross_encoder, kind):
    folder = bi_encoder if kind == "bi" else cross_encoder
    with changed(folder, {"model.safetensors": None}) as model:
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, model / "pytorch_model.bin")
        result = outcome(lambda: use_model(model), ("pickle", kind))
        assert "its weights are pickled" in result
        command = result.partition('python -c "')[2].removesuffix('"')
        exec(command, {})
        assert use_model(model) == kind
        after = load_file(model / "model.safetensors")
        assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_pickled_weights_in_the_hubs_cache_are_not_read_either(bi_encoder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--old" / "snapshots" / ("a" * 40)
    shutil.copytree(bi_encoder, snapshot)
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "models--org--old" / "refs").mkdir()
    (tmp_path / "models--org--old" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    result = outcome(lambda: load_encoder("org/old"), "pickled weights in the cache")
    assert "org/old: its weights are pickled" in result and result.endswith("and pass DIR")


def test_weights_in_a_pipe_are_refused(bi_encoder):
    with changed(bi_encoder, {"model.safetensors": None}) as model:
        os.mkfifo(model / "model.safetensors")
        assert "not a file" in outcome(lambda: use_model(model), "weights in a pipe")


# --- the whole of it -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_refuses_in_one_line_and_leaves_nothing(tmp_path, corpus, bi_encoder):
    """What was tried in this process, in processes of its own, side by side."""
    out, pipe, bomb, folder = (tmp_path / name for name in ("out", "pipe.tsv", "bomb.yaml", "pickled"))
    os.mkfifo(pipe)
    bomb.write_text(BOMBS["lists"], encoding="utf-8")
    shutil.copytree(bi_encoder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    gold = write_jsonl(
        tmp_path / "gold.jsonl", [row | {"score": row["score"] / 5} for row in random_pairs(40, seed=1)]
    )
    dev = ["--dev", corpus / "dev.jsonl"]
    commands = {
        "not a file": ["score_pairs.py", "--encoders", bi_encoder, "--pairs", pipe, "--output", out / "a.parquet"],
        "stand for too much text": ["plan_run.py", "--recipe", bomb, "--output_dir", out],
        "are pickled": ["evaluate_encoders.py", "--encoders", folder, "--tasks", "stsb", "--output_dir", out],
        "its scores are the scores themselves": [
            *("distill_cross2bi.py", "--model_name_or_path", bi_encoder, "--scores", gold, *dev, "--output_dir", out),
        ],
        "unknown arguments: --topk 3": [
            "search.py",
            "--index",
            out,
            "--bi_encoder",
            bi_encoder,
            "--query",
            "a",
            "--topk",
            "3",
        ],
    }
    runs = {
        expected: subprocess.Popen(**launch_command(*words, direct=True, cold=True), stderr=subprocess.PIPE, text=True)
        for expected, words in commands.items()
    }
    for expected, run in runs.items():
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 2, errors
        assert expected in errors.splitlines()[-1] and "Traceback" not in errors
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_there_were_enough_cases(request, capsys):
    ran = {item.originalname for item in request.session.items if item.path == request.path}
    slow = {test_the_command_line_refuses_in_one_line_and_leaves_nothing.__name__}
    if ran | slow < {name for name in globals() if name.startswith("test_")}:
        pytest.skip("only some of the tests were chosen")
    with capsys.disabled():
        print(f" {len(CASES)} distinct cases", end=" ")
    assert len(CASES) >= 500

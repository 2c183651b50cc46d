"""Files -> checked tables -> tokens -> batches."""

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tokenizer, random_pairs, random_sentences, write_jsonl

from transencoder import data
from transencoder.data import (
    PAIRS,
    SENTENCES,
    DropoutViews,
    LengthWindowSampler,
    MaskedViews,
    PairInputs,
    SentencePairs,
    is_hub_id,
    make_loader,
    pad,
    read_pairs,
    read_sentences,
    sample,
    tokenize,
    unique_sentences,
)
from transencoder.errors import InputError

ROWS = [("pay my card", "cancel my plan"), ("é “NA”", "late, is it"), ("pay my card", "the app")]
SCORES = [0.5, 4.0, -1.25]
WITH_SCORES = {
    ".txt": "pay my card||cancel my plan||0.5\né “NA”||late, is it||4\npay my card||the app||-1.25\n",
    ".tsv": "score\tsentence2\tsentence1\n0.5\tcancel my plan\tpay my card\n4\tlate, is it\té “NA”\n"
    "-1.25\tthe app\tpay my card\n",
    ".csv": 'sentence1,id,sentence2,score\npay my card,1,cancel my plan,0.5\né “NA”,2,"late, is it",4\n'
    "pay my card,3,the app,-1.25\n",
    ".jsonl": "".join(
        json.dumps({"id": [i], "sentence2": b, "sentence1": a, "score": s}) + "\n"
        for i, ((a, b), s) in enumerate(zip(ROWS, SCORES, strict=True))
    ),
}


def write(path: Path, content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def pairs_of(table: datasets.Dataset) -> list[tuple[str, str]]:
    return [(row["sentence1"], row["sentence2"]) for row in table]


@pytest.fixture
def small_blocks(monkeypatch):
    """Files are read 64 bytes at a time."""
    monkeypatch.setattr(data, "BLOCK_BYTES", 64)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [s + gz for s in WITH_SCORES for gz in ("", ".gz")])
def test_text_formats_plain_and_gzipped_give_the_pairs_and_scores_in_order(tmp_path, suffix):
    source = write(tmp_path / f"pairs{suffix}", WITH_SCORES[suffix.removesuffix(".gz")])
    table = read_pairs([source], "score")
    assert pairs_of(table) == ROWS
    assert table["score"][:] == SCORES
    assert table.features["score"] == datasets.Value("float64")
    assert read_pairs(
        [source] if ".txt" not in suffix else [write(tmp_path / "two.txt", "a||b\n")]
    ).column_names == list(PAIRS)


def test_parquet_gives_the_pairs_and_scores_in_order(tmp_path):
    first, second = zip(*ROWS, strict=True)
    columns = {"score": pa.array(SCORES, pa.float32()), "sentence2": second, "id": [1, 2, 3], "sentence1": first}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    table = read_pairs([str(tmp_path / "pairs.parquet")], "score")
    assert pairs_of(table) == ROWS
    assert table["score"][:] == SCORES


def test_csv_quotes_may_hold_commas_quotes_and_line_ends(tmp_path):
    source = write(tmp_path / "pairs.csv", 'sentence1,sentence2\r\n"a, ""b""\r\nc",d\r\n"e\nf","g"\r\n')
    assert pairs_of(read_pairs([source])) == [('a, "b"\r\nc', "d"), ("e\nf", "g")]


def test_tsv_quotes_are_ordinary_characters(tmp_path):
    source = write(tmp_path / "pairs.tsv", 'sentence1\tsentence2\n"a\tb"\n5" screen\t"c"\n')
    assert pairs_of(read_pairs([source])) == [('"a', 'b"'), ('5" screen', '"c"')]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".txt", "a||b\nc||d\n"),
        (".tsv", "sentence1\tsentence2\na\tb\nc\td\n"),
        (".csv", "sentence1,sentence2\na,b\nc,d\n"),
        (".jsonl", '{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "c", "sentence2": "d"}\n'),
    ],
)
def test_byte_order_mark_windows_line_ends_and_a_missing_last_one_change_nothing(tmp_path, suffix, content):
    for name, variant in {
        "bom": "\ufeff" + content,
        "crlf": content.replace("\n", "\r\n"),
        "both": "\ufeff" + content.replace("\n", "\r\n"),
        "open": content.removesuffix("\n"),
    }.items():
        assert pairs_of(read_pairs([write(tmp_path / f"{name}{suffix}", variant)])) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".txt", "NA||null\nNone||nan\n"),
        (".tsv", "sentence1\tsentence2\nNA\tnull\nNone\tnan\n"),
        (".csv", "sentence1,sentence2\nNA,null\nNone,nan\n"),
        (".jsonl", '{"sentence1": "NA", "sentence2": "null"}\n{"sentence1": "None", "sentence2": "nan"}\n'),
    ],
)
def test_words_that_look_like_missing_values_stay_text(tmp_path, suffix, content):
    assert pairs_of(read_pairs([write(tmp_path / f"pairs{suffix}", content)])) == [("NA", "null"), ("None", "nan")]


def test_whitespace_around_a_sentence_is_kept(tmp_path):
    assert pairs_of(read_pairs([write(tmp_path / "pairs.txt", " a || b\n")])) == [(" a ", " b")]


def test_columns_renames_theirs_to_ours(tmp_path):
    source = write(tmp_path / "pairs.csv", "q1,q2,gold\na,b,0\nc,d,1\n")
    table = read_pairs([source], "label", ["sentence1=q2", "sentence2=q1", "label=gold"])
    assert pairs_of(table) == [("b", "a"), ("d", "c")]
    assert table["label"][:] == [0.0, 1.0]
    # The cache knows the renaming: the same file, the columns the other way round.
    assert pairs_of(read_pairs([source], columns=["sentence1=q1", "sentence2=q2"])) == [("a", "b"), ("c", "d")]


def test_several_sources_are_put_together_in_order(tmp_path):
    sources = [write(tmp_path / "b.txt", "b||1\n"), write(tmp_path / "a.tsv", "sentence1\tsentence2\na\t2\n")]
    assert pairs_of(read_pairs(sources)) == [("b", "1"), ("a", "2")]


def test_drop_duplicates_keeps_the_first_of_exactly_equal_pairs_only(tmp_path):
    source = write(tmp_path / "pairs.txt", "b||c\na||b\nb||a\na||b\na||b \na||a\nb||b\na||a\n")
    assert pairs_of(read_pairs([source], drop_duplicates=True)) == [
        ("b", "c"),
        ("a", "b"),
        ("b", "a"),  # the other order is another pair
        ("a", "b "),
        ("a", "a"),
        ("b", "b"),
    ]
    assert len(read_pairs([source])) == 8


def test_sentences_come_once_each_in_order_of_first_appearance(tmp_path):
    source = write(tmp_path / "sentences.txt", "late || parcel\npay\nlate || parcel\ncard\npay\n")
    assert read_sentences([source])["sentence"][:] == ["late || parcel", "pay", "card"]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_a_pairs_file_gives_the_sentences_of_both_sides_once_each(tmp_path, suffix):
    table = {"sentence1": ["a", "c", "a"], "sentence2": ["b", "a", "d"], "score": [1.0, 2.0, 3.0]}
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(table), path)
    elif suffix == ".jsonl":
        write_jsonl(path, [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)])
    else:
        separator = "\t" if suffix == ".tsv" else ","
        lines = [table, *zip(*table.values(), strict=True)]
        write(path, "".join(separator.join(map(str, line)) + "\n" for line in lines))
    sentences = read_sentences([str(path)])["sentence"][:]
    assert sorted(sentences) == ["a", "b", "c", "d"]
    assert sentences[0] == "a"


def test_sentences_of_text_and_pairs_files_mix_without_repeats(tmp_path):
    sources = [write(tmp_path / "s.txt", "x\na\n"), write(tmp_path / "p.tsv", "sentence1\tsentence2\na\tb\nb\tx\n")]
    assert read_sentences(sources)["sentence"][:] == ["x", "a", "b"]


def test_a_sentence_column_can_be_named(tmp_path):
    source = write(tmp_path / "s.csv", "text,sentence1,sentence2\nt,a,b\nu,c,d\n")
    assert read_sentences([source], ["sentence=text"])["sentence"][:] == ["t", "u"]


def test_characters_of_several_bytes_survive_the_end_of_a_block(tmp_path, small_blocks):
    lines = ["é" * n + "||" + "日本" * n for n in range(1, 40)]
    for name in ("pairs.txt", "pairs.txt.gz"):
        assert pairs_of(read_pairs([write(tmp_path / name, "\n".join(lines))])) == [
            tuple(x.split("||")) for x in lines
        ]


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path):
    path = tmp_path / "pairs.txt"
    source = write(path, "a||b\n")
    before = read_pairs([source])
    assert read_pairs([source]).cache_files == before.cache_files
    write(path, "a||c\n")  # as long as before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert pairs_of(read_pairs([source])) == [("a", "c")]
    write(path, "a||b\nc||d\n")
    assert pairs_of(read_pairs([source])) == [("a", "b"), ("c", "d")]


def test_a_refused_file_leaves_nothing_in_the_cache(tmp_path):
    read_pairs([write(tmp_path / "good.txt", "a||b\n")])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trans-encoder"
    before = sorted(folder.iterdir())
    with pytest.raises(InputError):
        read_pairs([write(tmp_path / "bad.txt", "a||b\nc||\n")])
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("source", "expected"),
    [("org/name", True), ("org/name:train", True), ("data/pairs.tsv", False), ("pairs.txt", False), ("/a/b/c", False)],
)
def test_a_hub_id_is_told_from_a_path(source, expected):
    assert is_hub_id(source) is expected


def test_an_existing_path_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    write(tmp_path / "org" / "name", "a")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("org/name")


# --- bad input -------------------------------------------------------------------------------------------------------


def refusal(source: Path | str, gold: str | None = None, columns: list[str] | None = None) -> str:
    """What `read_pairs` says of a source that it refuses; the file is always named first."""
    with pytest.raises(InputError) as caught:
        read_pairs([str(source)], gold, columns)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    return message.removeprefix(f"{source}: ")


def test_missing_file_folder_unknown_suffix_and_empty_file_are_refused(tmp_path):
    assert refusal(tmp_path / "no.tsv") == "no such file"
    (tmp_path / "folder.tsv").mkdir()
    assert refusal(tmp_path / "folder.tsv") == "not a file"
    assert refusal(write(tmp_path / "pairs.xlsx", "a")).startswith("unknown format; known: .txt, .tsv")
    for suffix in data.FORMATS:
        (tmp_path / f"empty{suffix}").touch()
        assert refusal(tmp_path / f"empty{suffix}") == "the file is empty"


@pytest.mark.parametrize(("suffix", "header"), [(".csv", "sentence1,sentence2\n"), (".tsv", "sentence1\tsentence2\n")])
def test_a_file_with_a_header_only_is_refused(tmp_path, suffix, header):
    assert refusal(write(tmp_path / f"pairs{suffix}", header)) == "no rows"


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in PAIRS}), tmp_path / "pairs.parquet")
    assert refusal(tmp_path / "pairs.parquet") == "no rows"


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".tsv", "sentence1\tquestion\na\tb\n"),
        (".csv", 'sentence1,"question"\na,b\n'),
        (".jsonl", '{"sentence1": "a", "question": "b"}\n'),
    ],
)
def test_a_missing_column_is_named_with_those_found(tmp_path, suffix, content):
    message = refusal(write(tmp_path / f"pairs{suffix}", content))
    assert message.startswith("no column 'sentence2'; it has: sentence1, question ")


def test_a_missing_parquet_or_score_column_is_named_with_those_found(tmp_path):
    pq.write_table(pa.table({"sentence1": ["a"], "sentence2": ["b"]}), tmp_path / "pairs.parquet")
    assert refusal(tmp_path / "pairs.parquet", "score").startswith("no column 'score'; it has: sentence1, sentence2 ")


def test_a_column_that_columns_names_must_exist(tmp_path):
    source = write(tmp_path / "pairs.tsv", "sentence1\tsentence2\na\tb\n")
    assert refusal(source, columns=["sentence2=q2"]).startswith("no column 'q2'; it has: sentence1, sentence2 ")


@pytest.mark.parametrize("columns", [["sentence1"], ["sentence1=a=b"], ["sentence2=b", "q1"]])
def test_columns_that_are_not_ours_equals_theirs_are_refused(tmp_path, columns):
    source = write(tmp_path / "pairs.tsv", "sentence1\tsentence2\na\tb\n")
    with pytest.raises(InputError, match=r"^--columns (sentence1|sentence1=a=b|q1): expected ours=theirs"):
        read_pairs([source], columns=columns)


@pytest.mark.parametrize("blank", ["", " ", "\t", "\u00a0\u2003"])
@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_an_empty_or_blank_sentence_is_refused_with_its_row(tmp_path, suffix, side, blank):
    rows = [["a", "b"], ["c", "d"], ["e", "f"]]
    rows[2][side - 1] = blank
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(list(map(pa.array, zip(*rows, strict=True))), names=list(PAIRS)), path)
    elif suffix == ".jsonl":
        write_jsonl(path, [dict(zip(PAIRS, row, strict=True)) for row in rows])
    else:
        separator = "||" if suffix == ".txt" else ","
        write(path, "\n".join(separator.join(row) for row in ([PAIRS, *rows] if suffix == ".csv" else rows)) + "\n")
    assert refusal(path) == f"row 3: sentence{side} is empty"


def test_a_blank_line_among_sentences_is_refused_with_its_row(tmp_path):
    with pytest.raises(InputError, match=r"sentences\.txt: row 2: sentence is empty$"):
        read_sentences([write(tmp_path / "sentences.txt", "a\n\nb\n")])


@pytest.mark.parametrize(("line", "fields"), [("c", 1), ("c||d||e", 3), ("", 1)])
def test_a_text_line_with_another_number_of_fields_is_refused_with_its_row(tmp_path, line, fields):
    message = refusal(write(tmp_path / "pairs.txt", f"a||b\n{line}\n"))
    assert message == f"row 2: expected sentence1||sentence2, found {fields} field(s)"


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("fields", [["c"], ["c", "d", "e"]])
def test_a_table_row_with_another_number_of_fields_is_refused_with_its_row(tmp_path, suffix, separator, fields):
    lines = [separator.join(row) for row in (PAIRS, ["a", "b"], fields)]
    message = refusal(write(tmp_path / f"pairs{suffix}", "\n".join(lines) + "\n"))
    assert f"Row #3: Expected 2 columns, got {len(fields)}" in message  # pyarrow counts the header


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence1": "c"}', "row 2: sentence2 is missing"),
        ('{"sentence1": "c", "sentence2": null}', "row 2: sentence2 is missing"),
        ('{"sentence1": "c", "sentence2": 3}', "line 2: sentence2 is not a string"),
        ('["c", "d"]', "line 2: not a JSON object"),
    ],
)
def test_a_json_line_without_both_strings_is_refused_with_its_number(tmp_path, line, message):
    good = '{"sentence1": "a", "sentence2": "b"}\n'
    assert refusal(write(tmp_path / "pairs.jsonl", f"{good}{line}\n{good}")) == message


def test_a_broken_json_line_is_refused_with_its_number_in_the_file(tmp_path):
    good = '{"sentence1": "a", "sentence2": "b"}\n'
    message = refusal(write(tmp_path / "pairs.jsonl", f'{good}\n{good}{{"sentence1": "c", "sentence2": \n'))
    assert message.startswith("line 4: not JSON: ")


@pytest.mark.parametrize(("suffix", "start"), [(".csv", "sentence1,sentence2,score\na,b,1\n"), (".txt", "a||b||1\n")])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("good", "score 'good' is not a number"),
        ("", "score '' is not a number"),
        ("NA", "score 'NA' is not a number"),
        ("1;5", "score '1;5' is not a number"),
        ("1_000", "score '1_000' is not a number"),
        ("nan", "score is not a finite number"),
        ("inf", "score is not a finite number"),
        ("-inf", "score is not a finite number"),
    ],
)
def test_a_score_that_is_not_a_finite_number_is_refused_with_its_row(tmp_path, suffix, start, value, what):
    row = f"c||d||{value}\n" if suffix == ".txt" else f"c,d,{value}\n"
    assert refusal(write(tmp_path / f"pairs{suffix}", start + row), "score") == f"row 2: {what}"


def test_spaces_around_a_score_are_no_part_of_it(tmp_path):
    for name, content in {
        "pairs.csv": "sentence1,sentence2,score\na,b, 0.5\nc,d,1.5 \n",
        "pairs.txt": "a||b|| 0.5\nc||d||1.5 \n",
    }.items():
        assert read_pairs([write(tmp_path / name, content)], "score")["score"][:] == [0.5, 1.5]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("null", "row 2: score is missing"),
        ("NaN", "row 2: score is not a finite number"),
        ("-Infinity", "row 2: score is not a finite number"),
        ("1e999", "line 2: score is not a finite number"),
        ('"3"', "line 2: score '3' is not a number"),
        ("true", "line 2: score True is not a number"),
        ("[1]", r"line 2: score [1] is not a number"),
    ],
)
def test_a_json_score_that_is_not_a_finite_number_is_refused_with_its_row(tmp_path, value, what):
    lines = [f'{{"sentence1": "a", "sentence2": "b", "score": {score}}}\n' for score in ("1", value)]
    assert refusal(write(tmp_path / "pairs.jsonl", "".join(lines)), "score") == what


def test_a_json_line_without_a_score_is_refused_with_its_row(tmp_path):
    rows = [dict(zip(PAIRS, pair, strict=True)) for pair in ROWS]
    path = write_jsonl(tmp_path / "pairs.jsonl", [{**rows[0], "score": 1}, {**rows[1], "score": 2}, rows[2]])
    assert refusal(path, "score") == "row 3: score is missing"


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pa.array(["1", "x"]), "row 2: score 'x' is not a number"),
        (pa.array([1.0, None]), "row 2: score is missing"),
        (pa.array([1.0, float("nan")]), "row 2: score is not a finite number"),
        (pa.array([[1.0], [2.0]]), "row 1: score [1.0] is not a number"),
    ],
)
def test_a_parquet_score_that_is_not_a_finite_number_is_refused_with_its_row(tmp_path, column, what):
    pq.write_table(
        pa.table({"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": column}), tmp_path / "p.parquet"
    )
    assert refusal(tmp_path / "p.parquet", "score") == what


@pytest.mark.parametrize("column", [pa.array([["b"], ["d"]]), pa.array([b"b", b"\xff"])], ids=["list", "bytes"])
def test_a_parquet_column_that_holds_no_text_is_refused_by_name(tmp_path, column):
    pq.write_table(pa.table({"sentence1": ["a", "c"], "sentence2": column}), tmp_path / "pairs.parquet")
    assert "sentence2" in refusal(tmp_path / "pairs.parquet")


@pytest.mark.parametrize("value", ["2", "0.5", "-1"])
def test_a_label_that_is_neither_0_nor_1_is_refused_with_its_row(tmp_path, value):
    source = write(tmp_path / "pairs.tsv", f"sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t0\ne\tf\t{value}\n")
    assert refusal(source, "label") == "row 3: label is neither 0 nor 1"


@pytest.mark.parametrize("suffix", [".txt", ".tsv", ".csv", ".jsonl"])
@pytest.mark.parametrize("cut", [0.5, 1.0])
def test_a_truncated_gzip_file_is_refused(tmp_path, suffix, cut):
    rows = [(first, f"{first} {i}") for i, first in enumerate(random_sentences(400))]
    if suffix == ".jsonl":
        content = "".join(json.dumps(dict(zip(PAIRS, row, strict=True))) + "\n" for row in rows)
    else:
        separator = {".txt": "||", ".tsv": "\t", ".csv": ","}[suffix]
        content = "".join(separator.join(row) + "\n" for row in ([] if suffix == ".txt" else [PAIRS]) + rows)
    compressed = gzip.compress(content.encode())
    path = tmp_path / f"pairs{suffix}.gz"
    path.write_bytes(compressed[: int(cut * len(compressed)) - 6])
    assert refusal(path).startswith("cannot be read: ")


def test_a_file_that_only_claims_to_be_gzip_or_parquet_is_refused(tmp_path):
    for name in ("pairs.tsv.gz", "pairs.parquet"):
        (tmp_path / name).write_bytes(b"sentence1\tsentence2\na\tb\n")
        assert refusal(tmp_path / name).startswith("cannot be read: ")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".txt", b"a||b\nc||\xff\n"),
        (".tsv", b"sentence1\tsentence2\na\tb\nc\t\xff\n"),
        (".csv", b"sentence1,sentence2\na,b\nc,\xff\n"),
        (".csv", b"sentence1,sentence2,\xff\na,b,c\n"),
        (".jsonl", b'{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "c", "sentence2": "\xff"}\n'),
    ],
)
def test_text_that_is_not_utf_8_is_refused(tmp_path, suffix, content):
    message = refusal(write(tmp_path / f"pairs{suffix}", content))
    assert "utf8" in message.lower().replace("-", "")


def test_fewer_than_two_distinct_sentences_are_refused(tmp_path):
    assert refusal(write(tmp_path / "pairs.txt", "a||a\na||a\n")) == "fewer than two distinct sentences"
    with pytest.raises(InputError, match=r"s\.txt: fewer than two distinct sentences$"):
        read_sentences([write(tmp_path / "s.txt", "a\na\n")])


def test_a_hub_data_set_that_cannot_be_loaded_is_refused():
    assert datasets.config.HF_HUB_OFFLINE  # else this would ask the network
    assert refusal("nobody/no-such-pairs:train").startswith("cannot be loaded from the Hub (")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".jsonl.gz"])
def test_row_numbers_count_on_from_block_to_block(tmp_path, small_blocks, suffix):
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i} for i in range(300)]
    rows[256]["sentence2"] = " "
    if suffix.startswith(".jsonl"):
        content = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    else:
        separator = "\t" if suffix == ".tsv" else ","
        content = "".join(separator.join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)])
    assert refusal(write(tmp_path / f"pairs{suffix}", content), "score") == "row 257: sentence2 is empty"
    content = content.replace('"score":290}', '"score":null}').replace(f"{' '}", "x")
    if suffix in (".tsv", ".csv"):
        content = content.replace(f"b290{separator}290", f"b290{separator}x")
    what = "is missing" if suffix.startswith(".jsonl") else "'x' is not a number"
    assert refusal(write(tmp_path / f"again{suffix}", content), "score") == f"row 291: score {what}"


def test_row_numbers_of_a_long_text_file_are_right(tmp_path):
    lines = [f"{i}" for i in range(100_003)]
    lines[100_001] = ""
    with pytest.raises(InputError, match=r"long\.txt: row 100002: sentence is empty$"):
        read_sentences([write(tmp_path / "long.txt", "\n".join(lines) + "\n")])


def test_row_numbers_of_a_parquet_file_are_right_beyond_the_first_batch(tmp_path):
    names = [f"{i}" for i in range(70_000)]
    table = pa.table({"sentence1": names, "sentence2": [*names[:-2], None, "x"]})
    pq.write_table(table, tmp_path / "long.parquet", row_group_size=30_000)
    assert refusal(tmp_path / "long.parquet") == "row 69999: sentence2 is missing"


# --- samples ---------------------------------------------------------------------------------------------------------


def test_sample_is_a_random_subset_in_order_that_the_seed_decides():
    table = datasets.Dataset.from_dict({"sentence": [f"{i:03}" for i in range(200)]})
    drawn = sample(table, 50, seed=1)["sentence"][:]
    assert len(set(drawn)) == 50
    assert drawn == sorted(drawn)
    assert drawn != table["sentence"][:50]
    assert drawn == sample(table, 50, seed=1)["sentence"][:]
    assert drawn != sample(table, 50, seed=2)["sentence"][:]


@pytest.mark.parametrize("size", [None, 3, 4])
def test_a_sample_of_everything_or_more_is_the_whole_table(size):
    table = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"]})
    assert sample(table, size, seed=1)["sentence"][:] == ["a", "b", "c"]


# --- tokens ----------------------------------------------------------------------------------------------------------


def sentences_table(*sentences: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"sentence": list(sentences)})


def pairs_table(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def test_rows_are_padded_to_the_longest_with_mask(tokenizer):
    # [CLS] = 2, [SEP] = 3; the words are numbered from 5 in the order of WORDS.
    tokens = tokenize(sentences_table("how do i", "late", "my card"), SENTENCES, tokenizer, 16)
    assert len(tokens) == 3
    assert tokens.lengths.tolist() == [5, 3, 4]
    batch = pad(tokens, np.array([2, 0, 2]), tokenizer)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[2, 9, 15, 3, 0], [2, 5, 6, 7, 3], [2, 9, 15, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert pad(tokens, np.array([1]), tokenizer)["input_ids"].tolist() == [[2, 20, 3]]


def test_a_pair_is_one_input_with_token_types(tokenizer):
    table = pairs_table([{"sentence1": "my card", "sentence2": "late"}, {"sentence1": "pay", "sentence2": "app"}])
    batch = pad(tokenize(table, PAIRS, tokenizer, 16), np.array([0, 1]), tokenizer)
    assert batch["input_ids"].tolist() == [[2, 9, 15, 3, 20, 3], [2, 23, 3, 25, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]


def test_a_pair_has_no_token_types_where_the_model_takes_none(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokens = tokenize(pairs_table([{"sentence1": "my card", "sentence2": "late"}]), PAIRS, tokenizer, 16)
    assert set(pad(tokens, np.array([0]), tokenizer)) == {"input_ids", "attention_mask"}


def test_padding_is_the_tokenizers_own(tokenizer):
    tokenizer.pad_token = "[UNK]"  # id 1, as RoBERTa's
    tokens = tokenize(sentences_table("how do i", "late"), SENTENCES, tokenizer, 16)
    assert pad(tokens, np.array([0, 1]), tokenizer)["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 20, 3, 1, 1]]


def test_inputs_are_cut_to_max_length_with_their_special_tokens(tokenizer):
    sentences = tokenize(sentences_table("how do i change my password", "late"), SENTENCES, tokenizer, 5)
    assert pad(sentences, np.array([0]), tokenizer)["input_ids"].tolist() == [[2, 5, 6, 7, 3]]
    pairs = tokenize(pairs_table([{"sentence1": "how do i change my", "sentence2": "late app"}]), PAIRS, tokenizer, 7)
    assert pad(pairs, np.array([0]), tokenizer)["input_ids"].tolist() == [
        [2, 5, 6, 3, 20, 25, 3]
    ]  # the longer one is cut


def test_kept_tokens_are_not_used_for_another_length_or_vocabulary(tmp_path, tokenizer):
    table = read_sentences([write(tmp_path / "s.txt", "how do i change my password\nlate app\n")])
    assert tokenize(table, SENTENCES, tokenizer, 16).lengths.tolist() == [8, 4]
    assert tokenize(table, SENTENCES, tokenizer, 5).lengths.tolist() == [5, 4]
    tokenizer.add_tokens(["change my"])
    assert tokenize(table, SENTENCES, tokenizer, 16).lengths.tolist() == [7, 4]


def test_tokens_are_kept_from_run_to_run(tmp_path, tokenizer):
    source = write(tmp_path / "s.txt", "how do i\nlate app\n")
    tokenize(read_sentences([source]), SENTENCES, tokenizer, 16)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trans-encoder"
    before = sorted(folder.iterdir())
    used = make_tokenizer()  # as a new process makes it, but used before: a fast tokenizer remembers how
    used(["how do i", "late"], truncation=True, max_length=3, padding=True)
    tokenize(read_sentences([source]), SENTENCES, used, 16)
    assert sorted(folder.iterdir()) == before


def test_tokens_are_found_in_every_chunk(monkeypatch, tokenizer):
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 7)  # rows that `map` writes at a time
    sentences = random_sentences(40)
    tokens = tokenize(sentences_table(*sentences), SENTENCES, tokenizer, 64)
    order = np.random.default_rng(0).permutation(40)
    for row, index in zip(tokens.rows("input_ids", order), order, strict=True):
        assert row.tolist() == tokenizer(sentences[index])["input_ids"]


def test_unique_sentences_and_their_places_give_the_pairs_back():
    table = pairs_table(random_pairs(50) + random_pairs(50)[::-1])
    for part in (table, table.select([97, 3, 3, 50, 2])):
        unique, (first, second) = unique_sentences(part)
        sentences = unique["sentence"][:]
        assert len(set(sentences)) == len(sentences)
        assert set(sentences) == set(part["sentence1"]) | set(part["sentence2"])
        assert [sentences[i] for i in first] == part["sentence1"][:]
        assert [sentences[i] for i in second] == part["sentence2"][:]


# --- batches ---------------------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(0).integers(3, 65, size=1003)


def rows_of(batches: Iterable[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def full_batches(sampler: LengthWindowSampler) -> list[list[int]]:
    """The sampler's batches, pieces put together."""
    pieces = list(sampler)
    return [rows_of(pieces[i : i + sampler.pieces]) for i in range(0, len(pieces), sampler.pieces)]


def padded_tokens(batches: list[list[int]]) -> int:
    return sum(len(batch) * LENGTHS[batch].max() - LENGTHS[batch].sum() for batch in batches)


@pytest.mark.parametrize("window", [1, 4, 32, 1000])
def test_each_row_comes_at_most_once_and_only_full_batches_come(window):
    sampler = LengthWindowSampler(LENGTHS, batch_size=16, pieces=2, window=window, seed=1)
    pieces = list(sampler)
    assert sampler.batches == 62  # 1003 = 62 * 16 + 11
    assert len(sampler) == len(pieces) == 124
    assert {len(piece) for piece in pieces} == {sampler.batch_size} == {8}
    rows = rows_of(pieces)
    assert len(set(rows)) == len(rows) == 992
    assert set(rows) <= set(range(1003))


@pytest.mark.parametrize("window", [1, 8])
def test_a_batch_holds_the_same_rows_in_however_many_pieces_it_comes(window):
    whole, *others = (
        full_batches(LengthWindowSampler(LENGTHS, 16, pieces, window, seed=1)) for pieces in (1, 2, 4, 16)
    )
    assert all(other == whole for other in others)


def test_batches_depend_on_seed_and_epoch_alone():
    def draw(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthWindowSampler(LENGTHS, 16, 2, 8, seed)
        sampler.epoch = epoch
        return list(sampler)

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 3) == draw(1, 3)
    assert len({json.dumps(draw(seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (2, 0), (2, 1)]}) == 4


def test_rows_left_out_of_one_epoch_come_in_another():
    sampler = LengthWindowSampler(LENGTHS, 16, 1, 8, seed=1)
    seen = set()
    for sampler.epoch in range(5):
        seen |= set(rows_of(sampler))
    assert seen == set(range(1003))


def test_a_window_of_one_batch_is_a_plain_shuffle():
    batches = full_batches(LengthWindowSampler(LENGTHS, 16, 1, window=1, seed=1))
    assert not any((np.diff(LENGTHS[batch]) >= 0).all() for batch in batches)
    spread = np.mean([np.ptp(LENGTHS[batch]) for batch in batches])
    random = np.mean([np.ptp(np.random.default_rng(i).choice(LENGTHS, 16)) for i in range(200)])
    assert spread == pytest.approx(random, rel=0.05)


def test_batches_of_a_window_are_of_similar_length_and_in_random_order():
    # One window over everything: sorted by length and cut, so that each batch holds rows that follow one another.
    lengths = np.random.default_rng(1).permutation(64)
    batches = full_batches(LengthWindowSampler(lengths, 4, 1, window=16, seed=1))
    starts = [lengths[batch].min() for batch in batches]
    assert all(
        sorted(lengths[batch]) == list(range(start, start + 4)) for batch, start in zip(batches, starts, strict=True)
    )
    assert starts != sorted(starts)


def test_wider_windows_save_padding():
    padding = [
        padded_tokens(full_batches(LengthWindowSampler(LENGTHS, 16, 1, window, seed=1))) for window in (1, 4, 32)
    ]
    assert padding[1] < 0.5 * padding[0]
    assert padding[2] < 0.5 * padding[1]


def test_the_loader_gives_whole_padded_batches(tokenizer):
    rows = DropoutViews(sentences_table(*random_sentences(20)), tokenizer, 64)
    sampler = LengthWindowSampler(rows.lengths, 8, 2, 4, seed=1)
    batches = [batch["inputs"] for batch in make_loader(rows, sampler)]
    assert [batch["input_ids"].shape[0] for batch in batches] == [
        8,
        8,
        8,
        8,
    ]  # four pieces of four, each sentence twice
    for batch, indices in zip(batches, sampler, strict=True):
        assert batch["attention_mask"].sum(1).tolist() == rows.lengths[indices + indices].tolist()


# --- views -----------------------------------------------------------------------------------------------------------


def decoded(tokenizer, batch: dict) -> list[str]:
    return tokenizer.batch_decode(batch["inputs"]["input_ids"], skip_special_tokens=True)


def test_dropout_views_hold_every_sentence_twice(tokenizer):
    rows = DropoutViews(sentences_table("how do i", "late app", "pay"), tokenizer, 16)
    assert decoded(tokenizer, rows.__getitems__([2, 0])) == ["pay", "how do i"] * 2


def test_swap_gives_every_pair_in_both_orders_with_its_score(tokenizer):
    rows = [
        {"sentence1": "my card", "sentence2": "late", "score": 0.25},
        {"sentence1": "pay", "sentence2": "how do i", "score": 0.75},
    ]
    swapped = PairInputs(pairs_table(rows), tokenizer, 16, swap=True)
    batch = swapped.__getitems__([0, 1, 2, 3])
    assert decoded(tokenizer, batch) == ["my card late", "pay how do i", "late my card", "how do i pay"]
    assert batch["scores"].tolist() == [0.25, 0.75, 0.25, 0.75]
    assert swapped.lengths.tolist() == [6, 7, 6, 7]
    plain = PairInputs(pairs_table(rows), tokenizer, 16, swap=False)
    assert decoded(tokenizer, plain.__getitems__([1, 0])) == ["pay how do i", "my card late"]
    assert plain.__getitems__([1, 0])["scores"].tolist() == [0.75, 0.25]
    assert len(plain.lengths) == 2


def test_sentence_pairs_stay_aligned_with_each_other_and_their_scores(tokenizer):
    rows = random_pairs(30)
    pairs = SentencePairs(pairs_table(rows), tokenizer, 64)
    for indices in ([4, 0, 17], [29, 3]):
        batch = pairs.__getitems__(indices)
        texts = decoded(tokenizer, batch)
        assert texts[: len(indices)] == [rows[i]["sentence1"] for i in indices]
        assert texts[len(indices) :] == [rows[i]["sentence2"] for i in indices]
        assert batch["scores"].tolist() == pytest.approx([rows[i]["score"] for i in indices])
    # A pair is as long as its longer sentence, with two special tokens.
    assert pairs.lengths.tolist() == [max(len(row[name].split()) for name in PAIRS) + 2 for row in rows]


ALPHABET = "abcdefghijklmnopqrstuvwxyz0123"  # 30 different characters


def masked(tokenizer, span: int = 5, seed: int = 1) -> MaskedViews:
    return MaskedViews(sentences_table(ALPHABET, "late app"), tokenizer, 64, span, seed)


@pytest.mark.parametrize("span", [1, 5, 30])
def test_exactly_the_span_is_replaced_by_the_mask_token(tokenizer, span):
    views, starts = masked(tokenizer, span), set()
    for index in range(400):
        before, after = views.mask_span(ALPHABET, index).split("[MASK]")
        assert before + ALPHABET[len(before) : len(before) + span] + after == ALPHABET
        starts.add(len(before))
    assert starts == set(range(30 - span + 1))  # the first and the last place included


def test_the_mask_is_the_tokenizers_own(tokenizer):
    tokenizer.mask_token = "<mask>"
    assert "<mask>" in masked(tokenizer).mask_span(ALPHABET, 0)


def test_a_sentence_under_30_characters_stays_whole(tokenizer):
    assert masked(tokenizer).mask_span(ALPHABET[:-1], 0) == ALPHABET[:-1]


def test_a_span_longer_than_a_sentence_masks_all_of_it(tokenizer):
    assert masked(tokenizer, span=40).mask_span(ALPHABET, 0) == "[MASK]"


def test_spans_depend_on_seed_epoch_and_row_alone(tokenizer):
    def draw(seed: int, epoch: int) -> list[str]:
        views = masked(tokenizer, seed=seed)
        views.epoch = epoch
        return [views.mask_span(ALPHABET, index) for index in range(20)]

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (2, 0)]}) == 3
    assert len(set(draw(1, 0))) > 5  # rows differ


def test_masked_views_hold_the_sentences_as_they_are_and_then_masked(tokenizer):
    sentences = ["how do i change my password app", "late app"]
    views = MaskedViews(sentences_table(*sentences), tokenizer, 64, 5, 1)
    batch = views.__getitems__([1, 0])["inputs"]
    assert tokenizer.batch_decode(batch["input_ids"][:2], skip_special_tokens=True) == sentences[::-1]
    masks = (batch["input_ids"] == tokenizer.mask_token_id).sum(1).tolist()
    assert masks == [0, 0, 0, 1]  # the short sentence stays whole in the second half as well
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_tokenizer_without_mask_token_is_refused(tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token; use --method simcse"):
        masked(tokenizer)

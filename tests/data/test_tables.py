"""Files -> checked tables."""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_sentences, write_jsonl

from transencoder.config.options import Reading
from transencoder.data import cache, tables
from transencoder.data import formats as table_files
from transencoder.data.bad_rows import GRADED, SKIP
from transencoder.data.formats import write_rows
from transencoder.data.tables import PAIRS, blocks, is_hub_id, numbers, read_pairs, read_rows, read_sentences, sample
from transencoder.errors import BrokenRun, InputError, printable, report_and_exit
from transencoder.runtime.accelerator import log

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


def kept_files() -> list[Path]:
    with cache.cache_folder() as folder:
        return sorted(folder.iterdir())


def pairs_of(table: datasets.Dataset) -> list[tuple[str, str]]:
    return [(row["sentence1"], row["sentence2"]) for row in table]


@pytest.fixture
def small_blocks(monkeypatch):
    """Files are read three rows at a time."""
    monkeypatch.setattr(table_files, "BLOCK_ROWS", 3)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [s + gz for s in WITH_SCORES for gz in ("", ".gz")])
def test_text_formats_plain_and_gzipped_give_the_pairs_and_scores_in_order(tmp_path, suffix):
    source = write(tmp_path / f"pairs{suffix}", WITH_SCORES[suffix.removesuffix(".gz")])
    table = read_pairs([source], "score")
    assert pairs_of(table) == ROWS
    assert table["score"][:] == SCORES
    assert table.features["score"] == datasets.Value("float64")


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


@pytest.mark.parametrize("mark", ";\t|,")
def test_a_csv_may_have_other_separators(tmp_path, mark):
    content = f'id{mark}sentence1{mark}"sentence2"\n1{mark}"a, b{mark} c"{mark}d\n2{mark}e{mark}f\n'
    assert pairs_of(read_pairs([write(tmp_path / "pairs.csv", content)])) == [(f"a, b{mark} c", "d"), ("e", "f")]


def test_one_column_of_a_csv_may_hold_semicolons_in_its_text_and_a_comma_separates_where_both_do(tmp_path):
    assert read_sentences([write(tmp_path / "s.csv", "sentence\na; b\nc\n")])["sentence"][:] == ["a; b", "c"]
    source = write(tmp_path / "t.csv", '"sentence","note; by"\na; b,c\nd,e\n')
    assert read_sentences([source])["sentence"][:] == ["a; b", "d"]


def test_a_tsv_without_tabs_says_so(tmp_path):
    message = refusal(write(tmp_path / "pairs.tsv", "sentence1;sentence2\na;b\n"))
    said = "a .tsv has tabs between its columns; call a file with commas or semicolons .csv"
    assert message == f"no column 'sentence1'; it has: sentence1;sentence2 ({said})"


def test_a_quoted_line_end_may_stand_anywhere_in_a_file(tmp_path, small_blocks):
    rows = [(f"{'a' * i}\nb", f"c\n{i}") for i in range(1, 12)]
    content = "sentence1,sentence2\n" + "".join(f'"{a}","{b}"\n' for a, b in rows)
    assert pairs_of(read_pairs([write(tmp_path / "pairs.csv", content)])) == rows


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
    table = read_pairs([source], "label", Reading(columns=["sentence1=q2", "sentence2=q1", "label=gold"]))
    assert pairs_of(table) == [("b", "a"), ("d", "c")]
    assert table["label"][:] == [0.0, 1.0]
    # The cache knows the renaming: the same file, the columns the other way round.
    again = read_pairs([source], "label", Reading(columns=["sentence1=q1", "sentence2=q2", "label=gold"]))
    assert pairs_of(again) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_have_their_numbers_and_the_columns_that_are_kept(tmp_path, suffix):
    rows = pd.DataFrame({"id": [7, 8, 9, 10], "sentence": ["a", "", "a", "b"], "label": ["urgent", None, "", "no"]})
    path = tmp_path / f"t{suffix}"
    writers = {".csv": pd.DataFrame.to_csv, ".jsonl": pd.DataFrame.to_json, ".parquet": pd.DataFrame.to_parquet}
    how = {".csv": {"index": False}, ".jsonl": {"orient": "records", "lines": True}, ".parquet": {}}
    writers[suffix](rows, path, **how[suffix])
    found = read_rows([str(path)], Reading(skip_bad_rows=True), ["label", "id"]).to_dict()
    assert found == {
        "sentence": ["a", "a", "b"],
        "label": ["urgent", "", "no"],
        "id": ["7", "9", "10"],
        "row": [1, 3, 4],
    }


def test_a_pair_gives_two_rows_and_several_sources_are_named(tmp_path):
    pairs, text = write(tmp_path / "p.tsv", "sentence1\tsentence2\na\tb\n"), write(tmp_path / "t.txt", "c\n")
    assert read_rows([pairs, text], Reading(), []).to_dict() == {
        "sentence": ["a", "b", "c"], "row": [1, 1, 1], "file": [pairs, pairs, text],
    }  # fmt: skip
    with pytest.raises(InputError, match=r"--keep id: .*t.txt has no columns"):
        read_rows([text], Reading(), ["id"])
    with pytest.raises(InputError, match="no column 'id'"):
        read_rows([pairs], Reading(), ["id"])


def test_pairs_keep_columns_and_repeats_are_told_without_them(tmp_path):
    path = write(tmp_path / "p.csv", "sentence1,sentence2,id\na,b,1\nc,d,2\na,b,3\n")
    found = read_pairs([path], drop_duplicates=True, keep=["id"])
    assert found.to_dict() == {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "id": ["1", "2"], "row": [1, 2]}


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


def write_columns(path: Path, table: dict[str, list]) -> None:
    """Write plain columns in the format of the path's suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(table), path)
    elif path.suffix == ".jsonl":
        write_jsonl(path, [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)])
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [table, *zip(*table.values(), strict=True)]
        write(path, "".join(separator.join(map(str, line)) + "\n" for line in lines))


def test_sentences_come_once_each_in_order_of_first_appearance(tmp_path):
    source = write(tmp_path / "sentences.txt", "late || parcel\npay\nlate || parcel\ncard\npay\n")
    assert read_sentences([source])["sentence"][:] == ["late || parcel", "pay", "card"]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_a_pairs_file_gives_the_sentences_of_both_sides_once_each(tmp_path, suffix):
    table = {"sentence1": ["a", "c", "a"], "sentence2": ["b", "a", "d"], "score": [1.0, 2.0, 3.0]}
    path = tmp_path / f"pairs{suffix}"
    write_columns(path, table)
    sentences = read_sentences([str(path)])["sentence"][:]
    assert sorted(sentences) == ["a", "b", "c", "d"]
    assert sentences[0] == "a"


def test_sentences_of_text_and_pairs_files_mix_without_repeats(tmp_path):
    sources = [write(tmp_path / "s.txt", "x\na\n"), write(tmp_path / "p.tsv", "sentence1\tsentence2\na\tb\nb\tx\n")]
    assert read_sentences(sources)["sentence"][:] == ["x", "a", "b"]


def test_a_sentence_column_can_be_named(tmp_path):
    source = write(tmp_path / "s.csv", "text,sentence1,sentence2\nt,a,b\nu,c,d\n")
    assert read_sentences([source], Reading(columns=["sentence=text"]))["sentence"][:] == ["t", "u"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_pairs_file_with_other_names_gives_the_sentences_of_both_sides(tmp_path, suffix):
    table = {"q1": ["a", "c"], "q2": ["b", "a"], "id": ["1", "2"]}
    path = tmp_path / f"pairs{suffix}"
    write_columns(path, table)
    reading = Reading(columns=["sentence1=q1", "sentence2=q2", "score=gold"])
    assert sorted(read_sentences([str(path)], reading)["sentence"][:]) == ["a", "b", "c"]
    with pytest.raises(InputError, match="no column 'sentence'"):
        read_sentences([str(path)])


def test_one_renaming_serves_several_files(tmp_path):
    sources = [
        write(tmp_path / "theirs.csv", "q1,q2,gold\na,b,0.5\n"),
        write(tmp_path / "ours.tsv", "sentence2\tsentence1\tscore\nd\tc\t1\n"),
        write(tmp_path / "mixed.jsonl", '{"q1": "e", "sentence2": "f", "score": 2}\n'),
        write(tmp_path / "plain.txt", "g||h||3\n"),
    ]
    reading = Reading(columns=["sentence1=q1", "sentence2=q2", "score=gold"])
    table = read_pairs(sources, "score", reading)
    assert pairs_of(table) == [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]
    assert table["score"][:] == [0.5, 1, 2, 3]
    assert sorted(read_sentences(sources[:3], reading)["sentence"][:]) == list("abcdef")


def test_a_file_with_both_names_is_read_by_the_given_one(tmp_path):
    source = write(tmp_path / "pairs.csv", "sentence1,sentence2,q2\na,b,c\n")
    assert pairs_of(read_pairs([source], reading=Reading(columns=["sentence2=q2"]))) == [("a", "c")]


def test_a_renaming_of_pairs_leaves_files_of_sentences_alone(tmp_path):
    sources = [write(tmp_path / "s.csv", "sentence,id\na,1\n"), write(tmp_path / "p.csv", "q1,q2\nb,c\n")]
    assert read_sentences(sources, Reading(columns=["sentence1=q1", "sentence2=q2"]))["sentence"][:] == ["a", "b", "c"]


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
    before = kept_files()
    with pytest.raises(InputError):
        read_pairs([write(tmp_path / "bad.txt", "a||b\nc||\n")])
    assert kept_files() == before


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
    """What `read_pairs` says of a source that it refuses; the file is always named first, how to skip a row last."""
    with pytest.raises(InputError) as caught:
        read_pairs([str(source)], gold, Reading(columns=columns))
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    return message.removeprefix(f"{source}: ").removesuffix(f" ({SKIP})")


def test_missing_file_folder_unknown_suffix_and_empty_file_are_refused(tmp_path):
    assert refusal(tmp_path / "no.tsv") == "no such file"
    (tmp_path / "folder.tsv").mkdir()
    assert refusal(tmp_path / "folder.tsv") == "not a file"
    assert refusal(write(tmp_path / "pairs.xlsx", "a")).startswith("unknown format; known: .txt, .tsv")
    for suffix in table_files.FORMATS:
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


def test_a_column_must_exist_by_the_given_or_by_our_name(tmp_path):
    source = write(tmp_path / "pairs.tsv", "sentence1\tsentence2\na\tb\n")
    assert pairs_of(read_pairs([source], reading=Reading(columns=["sentence2=q2"]))) == [
        ("a", "b")
    ]  # a renaming for other files
    source = write(tmp_path / "other.tsv", "sentence1\tq\na\tb\n")
    assert refusal(source, columns=["sentence2=q2"]).startswith("no column 'sentence2'; it has: sentence1, q ")
    assert refusal(source, "score", ["sentence2=q"]).startswith("no column 'score'; it has: sentence1, q ")


@pytest.mark.parametrize("columns", [["sentence1"], ["sentence1=a=b"], ["sentence2=b", "q1"]])
def test_columns_that_are_not_ours_equals_theirs_are_refused(tmp_path, columns):
    source = write(tmp_path / "pairs.tsv", "sentence1\tsentence2\na\tb\n")
    with pytest.raises(InputError, match=r"^--columns (sentence1|sentence1=a=b|q1): expected ours=theirs"):
        read_pairs([source], reading=Reading(columns=columns))


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
    with pytest.raises(InputError, match=r"sentences\.txt: row 2: sentence is empty \(--skip_bad_rows"):
        read_sentences([write(tmp_path / "sentences.txt", "a\n\nb\n")])


@pytest.mark.parametrize(("line", "fields"), [("c", 1), ("c||d||e", 3), ("", 1)])
def test_a_text_line_with_another_number_of_fields_is_refused_with_its_row(tmp_path, line, fields):
    message = refusal(write(tmp_path / "pairs.txt", f"a||b\n{line}\ne||f\n"))
    assert message == f"row 2: expected sentence1||sentence2, found {fields} field(s)"


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("fields", [["c"], ["c", "d", "e"]])
def test_a_table_row_with_another_number_of_fields_is_refused_with_its_row(tmp_path, suffix, separator, fields):
    lines = [separator.join(row) for row in (PAIRS, ["a", "b"], fields)]
    message = refusal(write(tmp_path / f"pairs{suffix}", "\n".join(lines) + "\n"))
    assert message == f"row 2: expected 2 columns, found {len(fields)}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence1": "c"}', "row 2: sentence2 is missing"),
        ('{"sentence1": "c", "sentence2": null}', "row 2: sentence2 is missing"),
        ('{"sentence1": "c", "sentence2": 3}', "row 2: sentence2 is not a string"),
        ('["c", "d"]', "row 2: not a JSON object"),
    ],
)
def test_a_json_line_without_both_strings_is_refused_with_its_number(tmp_path, line, message):
    good = '{"sentence1": "a", "sentence2": "b"}\n'
    assert refusal(write(tmp_path / "pairs.jsonl", f"{good}{line}\n{good}")) == message


def test_a_broken_json_line_is_refused_with_its_number_in_the_file(tmp_path):
    good = '{"sentence1": "a", "sentence2": "b"}\n'
    message = refusal(write(tmp_path / "pairs.jsonl", f'{good}\n{good}{{"sentence1": "c", "sentence2": \n'))
    assert message.startswith("row 4: not JSON: ")


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
        ("1e999", "row 2: score is not a finite number"),
        ('"3"', "row 2: score '3' is not a number"),
        ("true", "row 2: score True is not a number"),
        ("[1]", "row 2: score [1] is not a number"),
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
    assert refusal(source, "label") == f"row 3: label is neither 0 nor 1; {GRADED}"


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
    assert refusal(write(tmp_path / f"pairs{suffix}", content)).endswith("not UTF-8 text: save the file as UTF-8")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])  # the first one with a byte order mark
@pytest.mark.parametrize("suffix", WITH_SCORES)
def test_utf_16_is_named(tmp_path, suffix, encoding):
    source = write(tmp_path / f"pairs{suffix}", WITH_SCORES[suffix].encode(encoding))
    assert refusal(source) == "UTF-16, which is not UTF-8 text: save the file as UTF-8"


def test_fewer_than_two_distinct_sentences_are_refused(tmp_path):
    assert refusal(write(tmp_path / "pairs.txt", "a||a\na||a\n")) == "fewer than two distinct sentences"
    with pytest.raises(InputError, match=r"s\.txt: fewer than two distinct sentences$"):
        read_sentences([write(tmp_path / "s.txt", "a\na\n")])


def test_a_hub_data_set_that_cannot_be_loaded_is_refused():
    assert datasets.config.HF_HUB_OFFLINE  # else this would ask the network
    with pytest.raises(
        InputError, match=r"^nobody/no-such-pairs, revision v1, split dev: cannot be loaded from the Hub \("
    ):
        read_pairs(["nobody/no-such-pairs:dev@v1"])


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz"])
def test_row_numbers_count_on_from_block_to_block(tmp_path, small_blocks, suffix):
    def content(sentence: str, score: str) -> str:
        """300 rows, with these in rows 257 and 291."""
        rows = [[f"a{i}", sentence if i == 257 else "b", score if i == 291 else f"{i}"] for i in range(1, 301)]
        if suffix.startswith(".jsonl"):
            return "".join(f'{{"sentence1":"{a}","sentence2":"{b}","score":{score}}}\n' for a, b, score in rows)
        separator = "\t" if suffix == ".tsv" else ","
        return "".join(separator.join(row) + "\n" for row in [["sentence1", "sentence2", "score"], *rows])

    assert refusal(write(tmp_path / f"a{suffix}", content(" ", "1")), "score") == "row 257: sentence2 is empty"
    bad, what = ("null", "is missing") if suffix.startswith(".jsonl") else ("x", "'x' is not a number")
    assert refusal(write(tmp_path / f"b{suffix}", content("b", bad)), "score") == f"row 291: score {what}"


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_the_row_with_a_missing_field_is_named_beyond_the_first_block(tmp_path, small_blocks, suffix, separator):
    lines = [separator.join(PAIRS), *(f"a{i}{separator}b" for i in range(1, 300))]
    lines[200] = "a200"
    message = refusal(write(tmp_path / f"pairs{suffix}", "\n".join(lines)))
    assert message == "row 200: expected 2 columns, found 1"


def test_row_numbers_of_a_long_text_file_are_right(tmp_path):
    lines = [f"{i}" for i in range(100_003)]
    lines[100_001] = ""
    with pytest.raises(InputError, match=r"long\.txt: row 100002: sentence is empty \("):
        read_sentences([write(tmp_path / "long.txt", "\n".join(lines) + "\n")])


def test_row_numbers_of_a_parquet_file_are_right_beyond_the_first_batch(tmp_path):
    names = [f"{i}" for i in range(70_000)]
    table = pa.table({"sentence1": names, "sentence2": [*names[:-2], None, "x"]})
    pq.write_table(table, tmp_path / "long.parquet", row_group_size=30_000)
    assert refusal(tmp_path / "long.parquet") == "row 69999: sentence2 is missing"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read_again_and_no_cell_is_a_formula(tmp_path):
    texts = ["a\rb", "c\r\nd\ne", 'f "g", h', "=cmd|' /C calc'!A0", "+1", "-1", "@x", "\tt", "\n=1", "i=j", "é\u2028"]
    write_rows(tmp_path / "a.csv", ["sentence1", "sentence2", "score"], [["x", text, -0.5] for text in texts])
    inert = [f"'{text}" if text[0] in "=+-@\t\n" else text for text in texts]
    assert pairs_of(read_pairs([str(tmp_path / "a.csv")])) == [("x", text) for text in inert]
    with (tmp_path / "a.csv").open(newline="") as stream:
        assert [(row["sentence2"], row["score"]) for row in csv.DictReader(stream)] == [(t, "-0.5") for t in inert]
    assert pd.read_csv(tmp_path / "a.csv").to_numpy().tolist() == [["x", text, -0.5] for text in inert]
    write_rows(tmp_path / "b.csv", ["=1+1"], [])  # a column of the input that is kept
    assert (tmp_path / "b.csv").read_text() == '"\'=1+1"\n'
    write_rows(tmp_path / "a.jsonl", list(PAIRS), (["x", text] for text in texts))
    assert pairs_of(read_pairs([str(tmp_path / "a.jsonl")])) == [("x", text) for text in texts]


def test_no_character_that_a_terminal_obeys_is_printed(capsys):
    assert printable("\x1b[2Ja\x9b\x07\r\0\x7f") == r"\x1b[2Ja\x9b\x07\x0d\x00\x7f"
    assert printable("é\tहिन्दी\u200d 日本\n") == "é\tहिन्दी\u200d 日本\n"
    log("\x1b]0;title\x07")
    with pytest.raises(SystemExit):
        report_and_exit("a\x1b.csv: no rows")
    assert "\x1b" not in capsys.readouterr().err


# --- files as other programs write them ------------------------------------------------------------------------------


def test_a_quote_that_is_not_closed_is_refused_with_its_row(tmp_path):
    lines = ["sentence", "the first one", '"unfinished quote here', "third one", 'fifth "one"', "sixth one"]
    for content in ("\n".join(lines), "\n".join(lines[:4])):
        with pytest.raises(InputError, match=r"s\.csv: row 2: a quote that is not closed, or that should be doubled"):
            read_sentences([write(tmp_path / "s.csv", content)])
    inside = 'sentence\nfifth "one"\nsixth\n'  # a quote inside a cell that does not begin with one
    assert read_sentences([write(tmp_path / "s.csv", inside)])["sentence"][:] == ['fifth "one"', "sixth"]


def test_a_tsv_with_quotes_as_pandas_writes_them_is_refused_with_what_to_do(tmp_path):
    frame = pd.DataFrame({"sentence1": ["plain", 'He said "no", twice'], "sentence2": ["simple", "She said no"]})
    frame.to_csv(tmp_path / "p.tsv", sep="\t", index=False)
    assert refusal(tmp_path / "p.tsv") == (
        "row 2: sentence1 is in quotes, as in a .csv; a .tsv has none: save it as .csv, .jsonl or .parquet"
    )
    frame.to_csv(tmp_path / "p.csv", index=False)
    assert pairs_of(read_pairs([str(tmp_path / "p.csv")])) == [tuple(row) for row in frame.to_numpy()]


def test_a_line_end_in_a_header_and_the_line_that_names_a_separator_are_read(tmp_path):
    header = write(tmp_path / "h.csv", '"note\nof agent","sentence1","sentence2"\n1,a,b\n2,c,d\n')
    assert pairs_of(read_pairs([header])) == [("a", "b"), ("c", "d")]
    for end, mark, quote in (("\n", ",", ""), ("\r\n", ";", '"')):
        lines = [f"{quote}sep={mark}{quote}", f"sentence1{mark}sentence2", f'"a{mark}"{mark}b', f"c{mark}d"]
        assert pairs_of(read_pairs([write(tmp_path / "e.csv", end.join(lines))])) == [(f"a{mark}", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('[{"sentence1": "a", "sentence2": "b"}, {"sentence1": "c", "sentence2": "d"}]', "a JSON array; make it one"),
        ('[\n{"sentence1": "a", "sentence2": "b"}\n]', "JSON over several lines; make it one object a line"),
        ('{\n  "sentence1": "a",\n  "sentence2": "b"\n}\n', "JSON over several lines; make it one object a line"),
        ("null\n", "its first line is not a JSON object"),
        ('["a", "b"]\n', "a JSON array; make it one"),
    ],
)
def test_json_that_is_not_one_object_a_line_is_refused_with_what_to_do(tmp_path, content, what):
    assert refusal(write(tmp_path / "a.jsonl", content)).startswith(f"cannot be read: {what}")


def test_blank_lines_at_the_end_are_no_sentences(tmp_path):
    assert read_sentences([write(tmp_path / "s.txt", "one\ntwo\n\n \r\n")])["sentence"][:] == ["one", "two"]
    assert pairs_of(read_pairs([write(tmp_path / "p.txt", "a||b\n\n")])) == [("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "first", "rows"),
    [
        ("a.txt", "a||b||1\n\nc||d||x\n||e||2\nf||g||3\n", "2: expected sentence1||sentence2||score, found 1", 5),
        ("a.tsv", "sentence1\tsentence2\tscore\na\tb\t1\nc\td\nf\tg\t3\n", "2: expected 3 columns, found 2", 3),
        ("a.csv", "sentence1,sentence2,score\na,b,1\nc,,2\n\xff,d,2\nf,g,3\n", "2: sentence2 is empty", 4),
        ("a.jsonl", "{A}\n{B}\n[]\nnot\n{C}\n", "2: score is missing", 5),
        ("a.parquet", "", "2: sentence2 is missing", 3),
    ],
)
def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path, capsys, name, content, first, rows):
    objects = ("a", "b", 1), ("c", "d", None), ("f", "g", 3)
    for letter, values in zip("ABC", objects, strict=True):
        content = content.replace(f"{{{letter}}}", json.dumps(dict(zip([*PAIRS, "score"], values, strict=True))))
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"sentence1": list("acf"), "sentence2": ["b", None, "g"], "score": [1, 2, 3]}), path)
    else:
        path.write_bytes(content.encode("latin-1"))
    for _ in range(2):  # from the cache, too
        table = read_pairs([str(path)], "score", Reading(skip_bad_rows=True))
        assert pairs_of(table) == [("a", "b"), ("f", "g")] and table["score"][:] == [1, 3]
        line = f"{path}: {rows - 2} of {rows} rows left out, first row {first}"
        assert capsys.readouterr().err.startswith(line)
    assert refusal(path, "score").startswith(f"row {first}")


def test_a_file_without_a_good_row_is_refused_however_it_is_read(tmp_path):
    with pytest.raises(InputError, match=r"a\.txt: no rows are good; row 1: expected sentence1||sentence2"):
        read_pairs([write(tmp_path / "a.txt", "a\nb\n")], reading=Reading(skip_bad_rows=True))


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_file_of_the_same_size_and_time_with_other_text_is_read_again(tmp_path):
    source = write(tmp_path / "pairs.txt", "a||b\n")
    stat = os.stat(source)
    assert pairs_of(read_pairs([source])) == [("a", "b")]
    write(tmp_path / "pairs.txt", "a||c\n")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert pairs_of(read_pairs([source])) == [("a", "c")]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = write(tmp_path / "pairs.txt", "a||changes\n")

    def read_slowly(*words):
        yield from table_files.read_blocks(*words)
        write(tmp_path / "pairs.txt", "a||c\n")

    monkeypatch.setattr(tables, "read_blocks", read_slowly)
    assert refusal(source) == "has changed while it was read; run the same command again"


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "empty", "no seal", "bad seal", "seal's key", "seal's line", "sentences"]
)
def test_a_damaged_cache_file_is_made_again(tmp_path, damage, capsys):
    source = write(tmp_path / "pairs.txt", "".join(f"a{i}||b{i}\n" for i in range(50)))
    path = Path(read_pairs([source]).cache_files[0]["filename"])
    whole = path.read_bytes()
    changed = {
        "cut": whole[:-40],
        "flip": whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        "empty": b"",
        "sentences": whole.replace(b"a1", b"z1"),
    }
    if damage in changed:
        path.write_bytes(changed[damage])
    elif damage == "no seal":
        path.with_suffix(".json").unlink()
    elif damage.startswith("seal's"):
        old, new = ('"log"', '"lof"') if damage == "seal's key" else ("null", '"50 rows left out"')
        seal = path.with_suffix(".json")
        seal.write_text(seal.read_text().replace(old, new))
    else:
        path.with_suffix(".json").write_bytes(b"\xff{")
    assert pairs_of(read_pairs([source])) == [(f"a{i}", f"b{i}") for i in range(50)]
    assert path.read_bytes() == whole and "left out" not in capsys.readouterr().err


def test_a_cache_that_is_deleted_while_it_is_used_is_one_line(tmp_path):
    def load(path):
        path.unlink()
        return datasets.Dataset.from_file(str(path))

    with pytest.raises(BrokenRun, match=r"a file is gone from the cache; the same command makes it again$"):
        cache.cached(["a.arrow"], lambda path: path.write_bytes(b"x") and None, load)


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


# --- block by block --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [None, [3, 4, 9], [9, 0, 4, 4, 2, 7, 1, 3]])
def test_blocks_give_the_rows_of_a_table_or_of_a_selection_in_order(chosen):
    halves = [datasets.Dataset.from_dict({"id": range(start, start + 5)}) for start in (0, 5)]
    table = datasets.concatenate_datasets(halves)
    table = table if chosen is None else table.select(chosen)
    found = list(blocks(table, 3))
    assert [start for start, _ in found] == list(range(0, len(table), 3))
    assert [row for _, block in found for row in block["id"].to_pylist()] == table["id"][:]
    assert numbers(table, "id", np.float32).tolist() == table["id"][:]


def test_repeats_are_found_in_other_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 2)
    source = write(tmp_path / "pairs.txt", "a||b\nb||c\nb||a\nc||d\na||b\nb||c\nd||c\n")
    assert pairs_of(read_pairs([source], drop_duplicates=True)) == [
        ("a", "b"),
        ("b", "c"),
        ("b", "a"),
        ("c", "d"),
        ("d", "c"),
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_pages_that_are_given_back_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAPPED_BYTES", 0)
    source = write(tmp_path / "pairs.txt", "".join(f"{i} {'a' * 90}||{i} {'b' * 90}\n" for i in range(20_000)))
    table, process = read_pairs([source]), psutil.Process()
    texts, held = pairs_of(table), process.memory_info().shared
    tables.release_pages()
    assert held - process.memory_info().shared > 3_000_000
    assert pairs_of(table) == texts

    vectors = np.lib.format.open_memmap(tmp_path / "a.vec", mode="w+", dtype=np.float32, shape=(1000, 64))
    vectors[:] = np.arange(64_000).reshape(1000, 64)
    tables.release_pages()  # what is not on disk yet is not lost either
    assert np.array_equal(vectors, np.arange(64_000).reshape(1000, 64))
    assert np.array_equal(np.load(tmp_path / "a.vec"), vectors)

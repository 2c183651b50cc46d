"""Pairs from sentences: the mix, the draws, what is kept of them, and the script."""

from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import launch, random_sentences, save_telling_encoders

from transencoder.config.parsing import parse_stage
from transencoder.data.tables import read_pairs
from transencoder.errors import InputError
from transencoder.runtime.shards import Shards
from transencoder.search import mining
from transencoder.search.mining import Miner, draw, spread_evenly, texts_of, without_self
from transencoder.search.mix import Sides, Source, parse_mix, wanted_pairs


def table(sentences):
    return datasets.Dataset.from_dict({"sentence": list(sentences)})


def one_side(sentences):
    both = table(sentences)
    return Sides(both, both)


# --- the mix ---------------------------------------------------------------------------------------------------------


def test_a_mix_is_sources_with_shares():
    assert parse_mix(["lexical=1", "nearest:4-20=0.5", "random=2"]) == [
        Source("lexical", 1, 10, 1.0),
        Source("nearest", 4, 20, 0.5),
        Source("random", 1, 10, 2.0),
    ]
    assert [source.name for source in parse_mix(None)] == [
        "lexical:1-10",
        "nearest:1-3",
        "nearest:4-20",
        "nearest:21-100",
        "random",
    ]


@pytest.mark.parametrize(
    "words",
    [["near=1"], ["lexical"], ["lexical=0"], ["lexical=-1"], ["random=inf"], ["random:1-2=1"], ["nearest:3=1"],
     ["nearest:4-3=1"], ["nearest:0-3=1"], ["nearest:1-99999999999999999999=1"], ["random=1e308"],
     ["random=1", "random=2"], ["lexical=1", "lexical:1-10=1"]],
)  # fmt: skip
def test_what_is_no_mix_is_refused(words):
    with pytest.raises(InputError, match="--mix"):
        parse_mix(words)


def test_each_source_gets_its_share_of_the_pairs():
    sides = one_side("abcdefghij")
    assert wanted_pairs(parse_mix(["lexical=1", "random=3"]), 10, sides) == [2, 8]
    assert wanted_pairs(parse_mix(["lexical=1", "nearest=1", "random=1"]), 100, sides) == [33, 34, 33]
    assert sum(wanted_pairs(parse_mix(["lexical=1", "nearest=1", "random=1"]), None, sides)) == 40
    assert wanted_pairs(parse_mix(["nearest:9-12=1"]), 5, sides) == [5]  # the tenth of ten is there no more: cut off
    with pytest.raises(InputError, match=r"nearest:10-12: there is no neighbour of rank 10 among 9 sentences"):
        wanted_pairs(parse_mix(["nearest:10-12=1"]), 5, sides)
    assert wanted_pairs(parse_mix(["nearest:10-12=1"]), 5, Sides(table("ab"), table("abcdefghij"))) == [5]


# --- the draws -------------------------------------------------------------------------------------------------------


def test_draws_come_from_the_band_and_each_neighbour_once():
    ranked = np.arange(100, 120)[None].repeat(400, axis=0)
    counts = np.arange(400) % 5
    drawn = draw(ranked, Source("nearest", 3, 5, 1.0), counts, np.random.default_rng(0))
    assert drawn.shape == (400, 3)  # there are three to draw from
    for row, count in zip(drawn, counts, strict=True):
        there = row[row >= 0]
        assert len(there) == min(count, 3) == len(set(there)) and set(there) <= {102, 103, 104}
    assert {102, 103, 104} == set(drawn[counts == 1, 0])


def test_missing_neighbours_are_not_drawn():
    ranked = np.asarray([[5, -1, -1], [-1, -1, -1], [7, 8, -1]])
    drawn = draw(ranked, Source("lexical", 1, 3, 1.0), np.asarray([3, 3, 3]), np.random.default_rng(0))
    assert [sorted(set(row) - {-1}) for row in drawn.tolist()] == [[5], [], [7, 8]]
    assert draw(ranked, Source("lexical", 1, 3, 1.0), np.zeros(3, dtype=int), np.random.default_rng(0)).shape == (3, 0)


def test_a_sentence_is_not_its_own_neighbour():
    found = np.asarray([[0, 4, 5], [6, 1, 7], [8, 9, 3]])
    assert without_self(found, np.asarray([0, 1, 2])).tolist() == [[4, 5], [6, 7], [8, 9]]


def test_a_key_names_a_pair_in_either_order_where_there_is_one_side():
    sides = one_side("abcd")
    rows, others = np.asarray([1, 3]), np.asarray([3, 1])
    assert sides.keys(rows, others).tolist() == [7, 7]
    first, second = texts_of(sides, np.full(50, 7), np.random.default_rng(0))
    assert set(zip(first, second, strict=True)) == {("b", "d"), ("d", "b")}
    two = Sides(table("abcd"), table("wxyz"))
    assert two.keys(rows, others).tolist() == [7, 13]
    assert texts_of(two, np.asarray([7, 13]), np.random.default_rng(0)) == (["b", "d"], ["z", "x"])


def test_pairs_are_spread_evenly_over_the_cosine():
    similarities = np.float32([-0.5] * 10 + [0.05] * 30 + [0.15] * 2 + [0.95] * 40 + [1.0] * 8)
    kept = spread_evenly(similarities, 32, np.random.default_rng(0))
    assert (np.diff(kept) > 0).all()
    # Two where there are no more; half of the rest each, below 0.1 and above 0.9.
    assert [(kept < 40).sum(), ((kept >= 40) & (kept < 42)).sum(), (kept >= 42).sum()] == [15, 2, 15]
    assert len(spread_evenly(similarities, 90, np.random.default_rng(0))) == 90
    assert not np.array_equal(kept, spread_evenly(similarities, 32, np.random.default_rng(1)))


# --- the miner -------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    return SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def circle(count):
    """Vectors on a circle: the neighbours of i are i - 1 and i + 1, then i - 2 and i + 2, ..."""
    angles = 2 * np.pi * np.arange(count) / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def mine(folder, accelerator, sides, vectors, mix, wanted, seed=3):
    parts = Shards(folder / "pairs.parquet", {"seed": seed}, 10, accelerator)
    return Miner(sides, vectors, parse_mix(mix), wanted, seed, parts, accelerator)


def distances(keys, count):
    rows, others = np.divmod(keys, count)
    apart = np.abs(rows - others)
    return np.minimum(apart, count - apart)


def test_bands_hold_pairs_of_their_ranks_and_no_pair_is_there_twice(tmp_path, accelerator, monkeypatch, capsys):
    monkeypatch.setattr(mining, "QUERIES", 16)  # several blocks
    sides, points = one_side(f"s{i}" for i in range(50)), circle(50)
    mix = ["nearest:1-2=1", "nearest:3-6=1", "random=1"]
    keys, origins = mine(tmp_path, accelerator, sides, (points, points), mix, [40, 60, 80]).mine()
    assert len(set(keys)) == len(keys) == 180 and (np.diff(keys) > 0).all()
    assert np.bincount(origins).tolist() == [40, 60, 80]
    assert set(distances(keys[origins == 0], 50)) == {1} and set(distances(keys[origins == 1], 50)) == {2, 3}
    assert 0 not in distances(keys, 50) and max(distances(keys, 50)) > 10
    assert "nearest:1-2: 40 pairs\n" in capsys.readouterr().err


def test_a_band_that_is_used_up_says_so(tmp_path, accelerator, capsys):
    sides, points = one_side(f"s{i}" for i in range(20)), circle(20)
    keys, _ = mine(tmp_path, accelerator, sides, (points, points), ["nearest:1-2=1"], [100]).mine()
    assert len(keys) == 20  # the edges of the circle
    assert "nearest:1-2: 20 pairs of 100 that were asked for" in capsys.readouterr().err


def test_lexical_pairs_share_words_within_their_part(tmp_path, accelerator, monkeypatch):
    words = ["red", "green", "blue", "pink"]
    sides, points = one_side(f"{words[i % 4]} {i}" for i in range(40)), circle(40)
    for limit in (100, 12):
        monkeypatch.setattr(mining, "LEXICAL_ROWS", limit)
        keys, _ = mine(tmp_path / str(limit), accelerator, sides, (points, points), ["lexical:1-3=1"], [20]).mine()
        rows, others = np.divmod(keys, 40)
        assert len(keys) == 20 and (rows % 4 == others % 4).all()
    with pytest.raises(InputError, match="none of these sources has found a pair"):
        alone = one_side(["a", "b", "c"])
        mine(tmp_path / "none", accelerator, alone, (circle(3),) * 2, ["lexical=1"], [5]).mine()


def test_sentences_of_a_script_without_spaces_have_lexical_pairs(tmp_path, accelerator):
    """As many as are wanted, each of two sentences that begin or end alike."""
    subjects, verbs = (
        ["账号密码", "退款申请", "会员订阅", "我的包裹", "信用卡", "应用程序"],
        ["还没有收到", "怎么取消", "打不开了", "如何修改", "为什么失败"],
    )
    ends = ["请帮忙", "谢谢", "上个月", "昨天下午", "急"]
    sides, points = one_side(a + b + c for a in subjects for b in verbs for c in ends), circle(150)
    keys, _ = mine(tmp_path, accelerator, sides, (points, points), ["lexical:1-5=1"], [120]).mine()
    first, second = texts_of(sides, keys, np.random.default_rng(0))
    assert len(keys) == 120
    assert all(one[:2] == other[:2] or one[-1] == other[-1] for one, other in zip(first, second, strict=True))


def test_what_was_drawn_before_a_crash_is_not_looked_for_again(tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(mining, "QUERIES", 8)
    sides, points = one_side(f"s{i}" for i in range(30)), circle(30)
    mix, wanted = ["nearest:1-4=1", "random=1"], [30, 30]
    whole = mine(tmp_path / "whole", accelerator, sides, (points, points), mix, wanted).mine()
    asked, search = [], mining.search_vectors

    def failing(index, queries, k):
        asked.append(len(queries))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return search(index, queries, k)

    monkeypatch.setattr(mining, "search_vectors", failing)
    with pytest.raises(KeyboardInterrupt):
        mine(tmp_path / "cut", accelerator, sides, (points, points), mix, wanted).mine()
    resumed = mine(tmp_path / "cut", accelerator, sides, (points, points), mix, wanted).mine()
    assert len(asked) == 5  # four blocks, of which the third was asked for twice
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    path = tmp_path_factory.mktemp("mining") / "sentences.txt"
    path.write_text("\n".join(random_sentences(60)) + "\n")
    return path


def test_the_script_writes_pairs_a_picture_and_counts(bi_encoder, sentences, tmp_path, run_script):
    output = tmp_path / "pairs.parquet"
    words = ["--encoders", bi_encoder, "--sentences", sentences, "--output", output, "--num_pairs", 90]
    result = run_script("mine_pairs.py", *words, "--mix", "lexical=1", "nearest:1-3=1", "random=1")
    assert result.returncode == 0, result.stderr
    assert "60 sentences, 90 pairs wanted" in result.stderr and "lexical:1-10: 30 pairs" in result.stderr
    rows = pq.read_table(output).to_pandas()
    known = set(sentences.read_text().split("\n"))
    assert set(rows.sentence1) | set(rows.sentence2) <= known and (rows.sentence1 != rows.sentence2).all()
    assert len({frozenset(pair) for pair in zip(rows.sentence1, rows.sentence2, strict=True)}) == len(rows) == 90
    assert rows.source.value_counts().to_dict() == {"lexical:1-10": 30, "nearest:1-3": 30, "random": 30}
    means = rows.groupby("source").similarity.mean()
    assert means["nearest:1-3"] > means["random"] and rows.similarity.between(-1.001, 1.001).all()
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))  # nothing of the work is left
    assert len(read_pairs([str(output)])) == 90

    # The same again is there already; another mix is another file's.
    again = run_script("mine_pairs.py", *words, "--mix", "lexical=1", "nearest:1-3=1", "random=1")
    assert again.returncode == 0 and "complete already" in again.stderr
    other = run_script("mine_pairs.py", *words)
    assert other.returncode == 2 and "holds other pairs (mix is" in other.stderr
    # The same seed gives the same pairs, and another one does not.
    found = {}
    for seed in (2021, 5):
        path = tmp_path / f"{seed}.parquet"
        mix = ["--mix", "lexical=1", "nearest:1-3=1", "random=1", "--histogram", tmp_path / "h.png"]
        assert run_script("mine_pairs.py", *words, *mix, "--output", path, "--seed", seed).returncode == 0
        found[seed] = pq.read_table(path).to_pydict()
    assert found[2021] == pq.read_table(output).to_pydict() != found[5]


def test_of_more_pairs_those_are_kept_that_are_spread_evenly(tiny_bert, sentences, tmp_path, run_script):
    save_telling_encoders(tmp_path, tiny_bert)
    words = ["--encoders", tmp_path / "bi", "--sentences", sentences, "--num_pairs", 100]
    widths = {}
    for spread in (1, 5):
        output = tmp_path / f"{spread}.parquet"
        result = run_script("mine_pairs.py", *words, "--output", output, "--spread", spread)
        assert result.returncode == 0, result.stderr
        rows = pq.read_table(output).to_pandas()
        assert len(rows) == 100 and ("spread evenly" in result.stderr) == (spread > 1)
        widths[spread] = np.histogram(rows.similarity.clip(0, 1), 10, (0, 1))[0].std()
    assert widths[5] < widths[1]


def test_pairs_are_spread_over_a_cross_encoders_scores(tiny_bert, sentences, tmp_path, run_script):
    save_telling_encoders(tmp_path, tiny_bert)
    cross, by_cross = tmp_path / "cross", ["--spread", 5, "--spread_by", tmp_path / "cross"]
    words = ["--encoders", tmp_path / "bi", "--sentences", sentences, "--num_pairs", 100]
    widths = {}
    for name, more in (("cosine", ["--spread", 5]), ("cross", by_cross)):
        output, scores = tmp_path / f"{name}.parquet", tmp_path / f"{name}-scores.parquet"
        result = run_script("mine_pairs.py", *words, "--output", output, *more)
        assert result.returncode == 0, result.stderr
        assert (f"spread evenly over the scores of {cross}" in result.stderr) == (name == "cross")
        assert pq.read_table(output).num_rows == 100
        assert not list(tmp_path.glob(".*.parts"))
        scored = run_script("score_pairs.py", "--encoders", cross, "--pairs", output, "--output", scores)
        assert scored.returncode == 0, scored.stderr
        values = pq.read_table(scores)["score"].to_numpy()
        widths[name] = np.histogram(values, 10, (values.min(), values.max()))[0].std()
    assert widths["cross"] < widths["cosine"] / 2


def test_two_sides_pair_a_sentence_of_each(bi_encoder, tmp_path, run_script):
    questions, answers = random_sentences(30, seed=1), random_sentences(25, seed=2)
    shared = "how do i pay"
    (tmp_path / "q.txt").write_text("\n".join([*questions, shared]) + "\n")
    (tmp_path / "a.txt").write_text("\n".join([*answers, shared]) + "\n")
    words = [
        "--encoders",
        bi_encoder,
        bi_encoder,
        "--sentences",
        tmp_path / "q.txt",
        "--sentences_b",
        tmp_path / "a.txt",
    ]
    result = run_script("mine_pairs.py", *words, "--output", tmp_path / "out.parquet", "--num_pairs", 200)
    assert result.returncode == 0, result.stderr
    rows = pq.read_table(tmp_path / "out.parquet").to_pandas()
    assert set(rows.sentence1) <= {*questions, shared} and set(rows.sentence2) <= {*answers, shared}
    assert not ((rows.sentence1 == shared) & (rows.sentence2 == shared)).any()  # no sentence with itself
    assert len(set(zip(rows.sentence1, rows.sentence2, strict=True))) == len(rows) > 150


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("", [], "the file is empty"),
        ("only one\n", [], "fewer than two distinct sentences"),
        ("one\none\n", [], "fewer than two distinct sentences"),
        ("one\ntwo\nthree\n", [], "there is no neighbour of rank 4 among 2 sentences"),
        ("one\ntwo\n", ["--mix", "nearby=1"], "--mix nearby=1"),
        ("one\ntwo\n", ["--num_pairs", "0"], "--num_pairs 0"),
        ("one\ntwo\n", ["--spread_by", "cross"], "--spread_by: needs more pairs to choose from"),
        ("one\ntwo\n", ["--spread", "2", "--spread_by", "no/model"], "no/model"),
        ("one\ntwo\n", ["--mix", "random=1", "--histogram", __file__], "exists and is no PNG"),
        ("one\ntwo\n", ["--mix", "random=1", "--histogram", "/dev"], "--histogram /dev: a folder"),
        ("one\ntwo\n", ["--mix", "random=1", "--histogram", f"{__file__}/a.png"], "--histogram"),
        ("one\ntwo\n", ["--output", "out.txt"], "out.txt: must be the name of a .parquet file"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_encoded(
    bi_encoder, tmp_path, run_script, monkeypatch, text, words, said
):
    monkeypatch.setattr("transencoder.search.mining.embed", None)
    path = tmp_path / "sentences.txt"
    path.write_text(text)
    all_words = ["--encoders", bi_encoder, "--sentences", path, "--output", tmp_path / "out.parquet", *words]
    result = run_script("mine_pairs.py", *all_words)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert said in result.stderr and not (tmp_path / "out.parquet").exists()


def test_a_cross_encoder_or_a_plain_model_cannot_say_what_is_near(tiny_bert, sentences, tmp_path, run_script):
    words = ["--sentences", sentences, "--output", tmp_path / "out.parquet"]
    result = run_script("mine_pairs.py", "--encoders", tiny_bert, *words)
    assert result.returncode == 2 and "--pooling" in result.stderr
    assert run_script("mine_pairs.py", "--encoders", tiny_bert, "--pooling", "mean", *words).returncode == 0


@pytest.mark.slow
def test_two_processes_find_the_same_pairs(bi_encoder, cross_encoder, sentences, tmp_path):
    found = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.parquet"
        words = ["--encoders", bi_encoder, "--sentences", sentences, "--output", output, "--mixed_precision", "no"]
        words += ["--num_pairs", 100, "--spread", 3, "--spread_by", cross_encoder]
        result = launch("mine_pairs.py", *words, "--shard_rows", 25, processes=processes)
        assert result.returncode == 0, result.stderr[-2000:]
        found.append(pq.read_table(output).select(["sentence1", "sentence2", "source"]).to_pydict())
    assert found[0] == found[1]


def test_the_default_mix_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_stage("mine_pairs", argv=["--help"])
    assert "nearest:21-100=1" in capsys.readouterr().out.replace("\n", "")

"""Searching: the index, what it is refused for, and results against all scores computed one by one."""

import csv
import json
import re
import shutil

import faiss
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import random_sentences
from datasets import Dataset

from transencoder.data.tables import read_pairs
from transencoder.embeddings import embed_texts
from transencoder.encoders import load_encoder
from transencoder.inference import Inference
from transencoder.search import index, neighbours
from transencoder.search.clusters import candidate_pairs, communities, sweep
from transencoder.search.index import Hit, grown, load_index, partners, recall, reciprocal_ranks


@pytest.fixture
def words(bi_encoder, cross_encoder, tmp_path):
    """Options of search.py for an index of 40 sentences."""
    (tmp_path / "sentences.txt").write_text("\n".join(random_sentences(40)) + "\n")
    models = ["--bi_encoder", bi_encoder, "--cross_encoder", cross_encoder, "--mixed_precision", "no"]
    return [*models, "--index", tmp_path / "index"]


def test_results_are_those_of_scoring_everything(words, bi_encoder, cross_encoder, tmp_path, run_script):
    sentences, query = random_sentences(40), "how do i change my card"
    given = [*words, "--sentences", tmp_path / "sentences.txt", "--query", query, "--top_k", 5, "--candidates", 12]
    result = run_script("search.py", *given, "--output", tmp_path / "found.jsonl")
    assert result.returncode == 0, result.stderr
    (line,) = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert line["query"] == query and line["retrieve_ms"] > 0 and line["rerank_ms"] > 0

    inference = Inference(Accelerator(cpu=True))
    bi, cross = (load_encoder(str(folder)).eval() for folder in (bi_encoder, cross_encoder))
    cosines = embed_texts(bi, sentences, inference) @ embed_texts(bi, [query], inference)[0]
    queries = [query] * len(sentences)
    orders = [inference.run_texts(cross, *pair).sigmoid() for pair in ((queries, sentences), (sentences, queries))]
    scores = torch.stack(orders).mean(dim=0).numpy()
    candidates = np.argsort(-cosines)[:12]
    best = sorted(candidates, key=lambda row: -scores[row] - cosines[row])[:5]
    assert [hit["sentence"] for hit in line["hits"]] == [sentences[row] for row in best]
    np.testing.assert_allclose([hit["bi_encoder"] for hit in line["hits"]], cosines[best], atol=1e-5)
    np.testing.assert_allclose([hit["cross_encoder"] for hit in line["hits"]], scores[best], atol=1e-5)
    means = (scores[best] + cosines[best]) / 2  # what explains the order
    np.testing.assert_allclose([hit["score"] for hit in line["hits"]], means, atol=1e-5)
    assert [hit["row"] for hit in line["hits"]] == [row + 1 for row in best]


def test_the_order_is_by_what_a_run_measured_to_be_best_unless_asked(words, cross_encoder, tmp_path, run_script):
    best = tmp_path / "best"
    shutil.copytree(cross_encoder, best / "cross-encoder")
    given = [*words, "--cross_encoder", best / "cross-encoder", "--query", "change my card", "--top_k", 8]

    def search(*more):
        result = run_script("search.py", *given, *more, "--output", tmp_path / "found.jsonl")
        if result.returncode:
            return result.stderr
        (line,) = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
        return (
            [hit["score"] for hit in line["hits"]],
            [hit.get("cross_encoder") for hit in line["hits"]],
            result.stderr,
        )

    score, cross, _ = search("--sentences", tmp_path / "sentences.txt")
    assert score != cross and None not in cross  # the mean
    (best / "search.json").write_text(json.dumps({"rank_by": "bi", "why": "re-ranking was not better"}))
    _, cross, said = search()
    assert cross == [None] * 8 and "Ranked by bi, as " in said and "re-ranking was not better" in said
    assert search("--rank_by", "mean")[:2][0] == score
    (best / "search.json").write_text(json.dumps({"rank_by": "cross", "why": "it was better"}))
    score, cross, _ = search()
    assert score == cross == sorted(cross, reverse=True)
    assert search("--relevant", tmp_path / "none.tsv").startswith("search.py: error: ")  # which is read before
    (best / "search.json").write_text("[]")
    assert "search.json: not what summarize_run.py writes" in search()
    alone = [word for word in words if word not in ("--cross_encoder", cross_encoder)]
    result = run_script("search.py", *alone, "--query", "q", "--rank_by", "mean")
    assert result.returncode == 2 and "--rank_by mean: needs --cross_encoder" in result.stderr


def test_an_index_is_made_once_and_gets_what_is_new(words, tmp_path, run_script, monkeypatch):
    made = run_script("search.py", *words, "--sentences", tmp_path / "sentences.txt", "--query", "cancel my plan")
    assert made.returncode == 0 and "40 sentences, 40 of them new" in made.stderr
    assert "cancel my plan" in made.stdout and "retrieve" in made.stdout and "rerank" in made.stdout
    (tmp_path / "more.txt").write_text("a parcel from the moon\n" + random_sentences(40)[3] + "\nanother one\n")
    added = run_script("search.py", *words, "--sentences", tmp_path / "more.txt", "--query", "a parcel from the moon")
    assert "42 sentences, 2 of them new" in added.stderr
    rows = load_index(tmp_path / "index").rows(np.asarray([40, 41]))
    assert rows == [{"sentence": "a parcel from the moon", "row": 1}, {"sentence": "another one", "row": 3}]
    monkeypatch.setattr("transencoder.search.index.embed", None)  # nothing is encoded again
    for sentences in ([], ["--sentences", tmp_path / "more.txt"]):
        again = run_script("search.py", *words, *sentences, "--query", "a parcel from the moon", "--top_k", 3)
        assert again.returncode == 0 and "of them new" not in again.stderr, again.stderr
    assert not list(tmp_path.glob(".*"))


def test_queries_from_a_file_and_from_the_prompt(words, tmp_path, run_script, monkeypatch):
    (tmp_path / "queries.txt").write_text("cancel my plan\npay the order\n")
    given = [*words, "--sentences", tmp_path / "sentences.txt"]
    result = run_script("search.py", *given, "--queries", tmp_path / "queries.txt", "--top_k", 2)
    assert result.returncode == 0 and result.stdout.count("rerank") == 2
    lines = iter(["is my parcel late", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    prompt = run_script("search.py", *words)
    assert prompt.returncode == 0 and prompt.stdout.startswith("is my parcel late\n")
    assert prompt.stdout.count("rerank") == 1


def test_recall_counts_partners_and_not_the_query(words, cross_encoder, tmp_path, run_script):
    hits = [Hit([{"sentence": text}], 0.0, 0.0) for text in ("q", "a", "x", "b")]
    assert recall(hits, {"a", "b"}, "q", 2) == 0.5 and recall(hits, {"a", "b"}, "q", 3) == 1.0
    sentences = random_sentences(40)
    (tmp_path / "pairs.tsv").write_text(
        "sentence1\tsentence2\tlabel\n"
        + "".join(f"{sentences[i]}\t{sentences[i + 1]}\t{int(i % 2 == 0)}\n" for i in range(0, 20))
    )
    found = partners(read_pairs([str(tmp_path / "pairs.tsv")], "label"))
    assert len(found) == 20 and found[sentences[0]] == {sentences[1]} and found[sentences[1]] == {sentences[0]}
    given = [*words, "--sentences", tmp_path / "sentences.txt", "--relevant", tmp_path / "pairs.tsv"]
    result = run_script("search.py", *given, "--top_k", 39, "--candidates", 40)
    assert result.stdout == "recall@39 of 20 queries: 100.00, re-ranked 100.00\n"
    alone = [word for word in given if word not in ("--cross_encoder", cross_encoder)]
    assert run_script("search.py", *alone, "--top_k", 39).stdout == "recall@39 of 20 queries: 100.00\n"


@pytest.mark.parametrize(
    ("text", "extra", "said"),
    [
        ("", [], "the file is empty"),
        ("one\ntwo\n", ["--output", "hits.txt"], "--output hits.txt: must be the name of a .jsonl file"),
        ("one\ntwo\n", ["--keep", "id"], "text.txt has no columns"),
        ("one\ntwo\n", ["--keep", "row"], "--keep row: the results have such a column anyway"),
        ("one\ntwo\n", ["--candidates", "1"], "--candidates 1: fewer than --top_k 2"),
        (None, [], "there is none yet; give --sentences FILE"),
    ],
)
def test_bad_input_is_refused_before_any_model_is_loaded(words, text, extra, said, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("transencoder.encoders.load_encoder", None)
    given = ["--top_k", "2"]
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
        given += ["--sentences", tmp_path / "text.txt"]
    result = run_script("search.py", *words, *given, *extra, "--query", "q")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and said in result.stderr, result.stderr


def test_a_bi_encoder_cannot_rerank(words, bi_encoder, tmp_path, run_script):
    given = [*words, "--sentences", tmp_path / "sentences.txt", "--cross_encoder", bi_encoder, "--query", "q"]
    result = run_script("search.py", *given)
    assert result.returncode == 2 and f"--cross_encoder: {bi_encoder} is not a cross-encoder" in result.stderr


def test_an_index_of_another_model_and_a_damaged_one_are_refused(words, bi_encoder, tmp_path, run_script):
    given = [*words, "--sentences", tmp_path / "sentences.txt", "--query", "q"]
    assert run_script("search.py", *given).returncode == 0
    facts = json.loads((tmp_path / "index" / "index.json").read_text())
    facts["model"]["weights"], facts["name"] = "0" * 64, "other/model"
    (tmp_path / "index" / "index.json").write_text(json.dumps(facts))
    other = run_script("search.py", *given)
    assert other.returncode == 2 and f"made with other/model, not with {bi_encoder}" in other.stderr
    (tmp_path / "index" / "index.json").write_text("{")
    assert "not an index that search.py made" in run_script("search.py", *given).stderr
    shutil.rmtree(tmp_path / "index")
    assert run_script("search.py", *given).returncode == 0
    for name in ("index.faiss", "sentences.arrow"):
        whole = bytearray((tmp_path / "index" / name).read_bytes())
        whole[-200] ^= 1
        (tmp_path / "index" / name).write_bytes(whole)
        flipped = run_script("search.py", *given[:-4], "--query", "q")
        assert flipped.returncode == 2 and "damaged; delete it" in flipped.stderr
        whole[-200] ^= 1
        (tmp_path / "index" / name).write_bytes(whole)
    assert run_script("search.py", *given[:-4], "--query", "q").returncode == 0
    (tmp_path / "index" / "index.faiss").write_bytes(b"IxFI")
    damaged = run_script("search.py", *given)
    assert damaged.returncode == 2 and "damaged; delete it" in damaged.stderr


def test_vectors_of_other_sentences_are_not_reused_after_a_kill(words, bi_encoder, tmp_path, run_script, monkeypatch):
    """As many sentences as before, so that only their content tells them apart."""
    for name, seed in (("first", 1), ("second", 2)):
        (tmp_path / f"{name}.txt").write_text("\n".join(random_sentences(30, seed)) + "\n")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transencoder.search.index.grown", die)
        run_script("search.py", *words, "--sentences", tmp_path / "first.txt", "--query", "q")
    query = random_sentences(30, 2)[7]
    given = [*words[:2], *words[4:], "--sentences", tmp_path / "second.txt", "--query", query]
    assert run_script("search.py", *given, "--output", tmp_path / "found.jsonl").returncode == 0
    best = json.loads((tmp_path / "found.jsonl").read_text())["hits"][0]
    assert best["sentence"] == query and best["score"] == pytest.approx(1, abs=1e-4)

    pairs = [
        (name, ["--sentences", tmp_path / f"{name}.txt", "--output", tmp_path / "out.csv"])
        for name in ("first", "second")
    ]
    models = [*words[:4], "--mixed_precision", "no", "--threshold", 0.5]
    seen = []
    monkeypatch.setattr(
        "transencoder.search.clusters.candidate_pairs", lambda index, vectors, k: seen.append(vectors) or die()
    )
    for _, given in pairs:
        with pytest.raises(KeyboardInterrupt):
            run_script("find_duplicates.py", *models, *given)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(*map(np.array, seen))


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_again(words, tmp_path, run_script, monkeypatch):
    for text, kept in (("one\ntwo\n", "old"), ("one\ntwo\nthree\n", "new")):
        (tmp_path / "text.txt").write_text(text)
        given = [*words[:4], "--index", tmp_path / kept, "--sentences", tmp_path / "text.txt", "--query", "q"]
        assert run_script("search.py", *given).returncode == 0
    checksum, done = index._checksum, []

    def replaced(folder):
        if not done:
            done.append((tmp_path / "old").rename(tmp_path / "older"))
            (tmp_path / "new").rename(tmp_path / "old")
        return checksum(folder)

    monkeypatch.setattr(index, "_checksum", replaced)
    assert len(load_index(tmp_path / "old")) == 3 and done


def test_one_sentence_is_added_and_more_results_than_there_are_are_all(words, tmp_path, run_script):
    for number, text in enumerate(["only this\n", "one more\n"]):
        (tmp_path / "one.txt").write_text(text)
        given = [*words, "--sentences", tmp_path / "one.txt", "--query", text.strip(), "--top_k", 70]
        result = run_script("search.py", *given, "--output", tmp_path / "found.jsonl")
        assert result.returncode == 0 and f"{number + 1} sentences, 1 of them new" in result.stderr, result.stderr
        assert f"--top_k 70: the index holds {number + 1} sentences" in result.stderr
        assert len(json.loads((tmp_path / "found.jsonl").read_text())["hits"]) == number + 1


TICKETS = "id,sentence\nt1,My parcel is late\nt2,cancel the plan\nt3,My parcel is late\nt4,my parcel is late!\n"


def test_rows_that_are_alike_are_one_result_with_all_their_ids(words, bi_encoder, tmp_path, run_script):
    (tmp_path / "tickets.csv").write_text(TICKETS)
    given = ["--index", tmp_path / "index", "--bi_encoder", bi_encoder, "--sentences", tmp_path / "tickets.csv"]
    query = ["--query", "my parcel is late", "--candidates", 2, "--top_k", 2]
    assert (
        run_script("search.py", *given, "--keep", "id", *query, "--output", tmp_path / "found.jsonl").returncode == 0
    )
    first, second = json.loads((tmp_path / "found.jsonl").read_text())["hits"]
    assert [first["id"], first["row"]] == ["t1", 1] and [second["id"], second["row"]] == ["t2", 2]
    assert [(hit["id"], hit["row"]) for hit in first["alike"]] == [("t3", 3), ("t4", 4)] and "alike" not in second
    shown = run_script("search.py", *given, "--keep", "id", *query).stdout.splitlines()
    assert shown[1].split() == ["score", "id", "row", "sentence"]
    assert shown[2].endswith("t1    1  My parcel is late  (and 2 alike)") and len(shown) == 5
    other = run_script("search.py", *given, *query)
    assert other.returncode == 2 and "made with --keep id; give the same" in other.stderr
    assert run_script("search.py", *given[:4], *query).returncode == 0  # nothing is added


def test_words_find_what_vectors_do_not(bi_encoder, tmp_path, run_script):
    code = "zq 4711"
    (tmp_path / "sentences.txt").write_text("\n".join([*random_sentences(60), f"the order {code} is late"]) + "\n")
    given = ["--index", tmp_path / "index", "--bi_encoder", bi_encoder, "--sentences", tmp_path / "sentences.txt"]
    found = {}
    for switch in ([], ["--hybrid"]):
        query = ["--query", f"how do i pay my {code}", "--candidates", 5, "--top_k", 5, *switch]
        assert run_script("search.py", *given, *query, "--output", tmp_path / "found.jsonl").returncode == 0
        found[len(switch)] = json.loads((tmp_path / "found.jsonl").read_text())["hits"]
    assert not any(code in hit["sentence"] for hit in found[0])
    assert any(code in hit["sentence"] for hit in found[1])
    assert [hit["score"] for hit in found[1]] == sorted((hit["score"] for hit in found[1]), reverse=True)


def test_ranks_are_fused_by_their_reciprocals():
    fused = reciprocal_ranks(np.array([7, 8, 9]), [np.array([7, 8, 9]), np.array([7, 9])])
    np.testing.assert_allclose(fused, [1, 61 / 62 / 2, (61 / 63 + 61 / 62) / 2])


def test_columns_are_renamed_in_queries_and_in_relevant_pairs(words, tmp_path, run_script):
    given = [*words, "--sentences", tmp_path / "sentences.txt"]
    (tmp_path / "q.csv").write_text('qid,question\n1,"cancel my plan, please"\n')
    result = run_script("search.py", *given, "--queries", tmp_path / "q.csv", "--columns", "sentence=question")
    assert result.returncode == 0 and result.stdout.startswith("cancel my plan, please\n"), result.stderr
    one, other = random_sentences(40)[:2]
    (tmp_path / "pairs.tsv").write_text(f"question1\tquestion2\tis_duplicate\n{one}\t{other}\t1\n")
    columns = ["--columns", "sentence1=question1", "sentence2=question2", "label=is_duplicate"]
    result = run_script("search.py", *given, "--relevant", tmp_path / "pairs.tsv", *columns)
    assert result.returncode == 0 and "of 2 queries" in result.stdout, result.stderr
    assert "not in the index" not in result.stderr
    with (tmp_path / "pairs.tsv").open("a") as stream:
        stream.write(f"{one}\tnowhere\t1\n")
    result = run_script("search.py", *given, "--relevant", tmp_path / "pairs.tsv", *columns)
    assert result.returncode == 0 and "1 of 3 partners are not in the index" in result.stderr, result.stderr


@pytest.mark.parametrize("read", ["bytes", "closed"])
def test_queries_that_cannot_be_read_are_one_line(words, tmp_path, run_script, monkeypatch, read):
    given = [*words, "--sentences", tmp_path / "sentences.txt"]
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 password\n".encode("latin-1"))
    monkeypatch.setattr("sys.stdin", None if read == "closed" else (tmp_path / "latin1.txt").open(encoding="utf-8"))
    result = run_script("search.py", *given)
    said = "nothing to read queries from" if read == "closed" else "a query is not UTF-8 text"
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_a_file_that_is_not_ours_is_not_overwritten(words, tmp_path, run_script):
    (tmp_path / "mine.csv").write_text("sentence\none\ntwo\n")
    for script, name in (("find_duplicates.py", "mine.csv"), ("search.py", "mine.jsonl")):
        (tmp_path / name).write_text("sentence\none\ntwo\n")
        index = words[-2:] if script == "search.py" else []
        given = [*words[:4], *index, "--sentences", tmp_path / "mine.csv", "--output", tmp_path / name]
        result = run_script(script, *given)
        assert result.returncode == 2 and "exists and was not written by this tool" in result.stderr, result.stderr
        assert (tmp_path / name).read_text() == "sentence\none\ntwo\n"
    before = '{"query": "one"}\n{"query": "two"}\n'  # results of an earlier call may be the queries of this one
    (tmp_path / "mine.jsonl").write_text(before)
    queries = ["--queries", tmp_path / "mine.jsonl", "--columns", "sentence=query"]
    given = [*words, "--sentences", tmp_path / "sentences.txt", *queries, "--output", tmp_path / "mine.jsonl"]
    result = run_script("search.py", *given)
    assert result.returncode == 2 and "--output" in result.stderr and (tmp_path / "mine.jsonl").read_text() == before


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_a_growing_index_finds_what_one_of_all_rows_finds(similarity, monkeypatch):
    """Exact, then from exact to clusters, then clusters that grow."""
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 600)
    vectors = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    made = None
    for start, end, kind in (
        (0, 300, faiss.IndexFlat),
        (300, 500, faiss.IndexFlat),
        (500, 1500, faiss.IndexIVF),
        (1500, 2000, faiss.IndexIVF),
    ):
        made = grown(made, vectors[start:end], similarity, seed=0)
        assert made.ntotal == end and isinstance(faiss.downcast_index(made), kind)
        rows = made.search(vectors[:end:50], 1)[1][:, 0]
        assert np.mean(rows == np.arange(0, end, 50)) > 0.95


# --- duplicates ------------------------------------------------------------------------------------------------------


def test_candidates_are_neighbours_and_each_pair_is_there_once():
    angles = np.radians([0, 1, 90, 91, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    flat = faiss.IndexFlatIP(2)
    flat.add(vectors)
    found = candidate_pairs(flat, vectors, 1, rows_at_once=2)
    assert found.tolist() == [[0, 1], [2, 3], [3, 4]]


def test_communities_are_not_joined_by_one_near_miss():
    one, other = [(0, 1), (0, 2), (1, 2)], [(3, 4), (3, 5), (4, 5)]
    pairs = np.asarray([*one, *other, (2, 3), (6, 7), (8, 9)])
    scores = np.asarray([0.9, 0.95, 0.9, 0.9, 0.9, 0.99, 0.81, 0.8, 0.5], dtype=np.float32)
    groups = communities(pairs, scores, 0.8, seed=0)
    assert [sorted(row for row, _ in group) for group in groups] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert groups[0][0][0] == 0 and groups[0][0][1] == pytest.approx(0.925)  # the most central first
    assert communities(pairs, scores, 1.0, seed=0) == []


def test_the_script_writes_groups_of_sentences(bi_encoder, cross_encoder, tmp_path, run_script):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(random_sentences(30)) + "\n")
    models = ["--bi_encoder", bi_encoder, "--cross_encoder", cross_encoder]
    words = [*models, "--sentences", path, "--output", tmp_path / "out.csv"]
    result = run_script("find_duplicates.py", *words, "--threshold", 0.0)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "out.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["sentence"] for row in rows} == set(random_sentences(30)) and len(rows) == 30  # everything is joined
    assert all(random_sentences(30)[int(row["row"]) - 1] == row["sentence"] for row in rows)
    sizes = {row["cluster"]: int(row["size"]) for row in rows}
    assert sum(sizes.values()) == 30 and all(0 <= float(row["score"]) <= 1 for row in rows)
    none = run_script("find_duplicates.py", *words, "--threshold", 1.0)
    assert none.returncode == 0 and "0 groups of similar sentences" in none.stderr
    assert "no pair reaches --threshold 1.0" in none.stderr
    for wrong, said in (
        (["--output", "x.txt"], "must be the name of a .csv or .jsonl file"),
        (["--threshold", "2"], "--threshold"),
    ):
        bad = run_script("find_duplicates.py", *words, *wrong)
        assert bad.returncode == 2 and said in bad.stderr and len(bad.stderr.splitlines()) == 1
    assert not list(tmp_path.glob(".*"))


def test_exact_repeats_come_first_with_rows_and_ids_by_a_bi_encoder_alone(bi_encoder, tmp_path, run_script):
    (tmp_path / "tickets.csv").write_text(TICKETS + "t5,cancel the plan\nt6,the app is not late\n")
    given = ["--bi_encoder", bi_encoder, "--sentences", tmp_path / "tickets.csv", "--keep", "id"]
    result = run_script("find_duplicates.py", *given, "--output", tmp_path / "out.jsonl", "--threshold", 0.999)
    assert result.returncode == 0, result.stderr
    # The random model's tokens have no case, and a sign of its own for "!".
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["cluster"], row["kind"], row["size"], row["row"], row["id"]) for row in rows] == [
        (1, "exact", 2, 1, "t1"), (1, "exact", 2, 3, "t3"), (2, "exact", 2, 2, "t2"), (2, "exact", 2, 5, "t5"),
    ]  # fmt: skip
    assert "2 groups of exact repeats with 4 rows, 0 groups of similar" in result.stderr
    result = run_script("find_duplicates.py", *given, "--output", tmp_path / "out.jsonl", "--threshold", 0, "--sweep")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    kinds = {row["row"]: row["kind"] for row in rows}
    assert [kinds[row] for row in range(1, 7)] == ["exact"] * 3 + ["similar", "exact", "similar"]
    assert "(4 of them exact repeats), of 6 rows" in result.stderr
    assert result.stdout.startswith("threshold  groups  sentences  just above it\n     0.95")


def test_how_many_sentences_are_cut_is_said(bi_encoder, cross_encoder, tmp_path, run_script):
    """Mails with one introduction, longer than the 64 tokens that the model reads."""
    (tmp_path / "mails.txt").write_text(
        "".join(f"{'how do i pay ' * 20}{end}\n" for end in ("refund", "plan", "")) + "a\n"
    )
    words = ["--bi_encoder", bi_encoder, "--cross_encoder", cross_encoder, "--sentences", tmp_path / "mails.txt"]
    result = run_script("find_duplicates.py", *words, "--output", tmp_path / "out.csv", "--threshold", 0.5)
    assert "3 of 4 sentences are cut: longer than 64 tokens" in result.stderr, result.stderr
    assert re.search(r"\d of \d pairs are cut: longer than 64 tokens", result.stderr)
    result = run_script("search.py", *words, "--index", tmp_path / "index", "--query", "how do i pay " * 20)
    assert "3 of 4 sentences are cut: longer than 64 tokens" in result.stderr
    assert "what is longer than 64 tokens is cut, as some of these texts are" in result.stderr


def test_scores_of_a_cross_encoder_are_kept_until_the_output_is_there(
    bi_encoder, cross_encoder, tmp_path, run_script, monkeypatch
):
    (tmp_path / "sentences.txt").write_text("\n".join(random_sentences(30)) + "\n")
    words = ["--bi_encoder", bi_encoder, "--cross_encoder", cross_encoder, "--sentences", tmp_path / "sentences.txt"]
    words += ["--output", tmp_path / "out.csv", "--threshold", 0.5]

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transencoder.search.clusters.communities", die)
        run_script("find_duplicates.py", *words)
    with monkeypatch.context() as patch:
        patch.setattr("transencoder.inference.Inference.run", None)  # nothing is computed again
        resumed = run_script("find_duplicates.py", *words)
    assert resumed.returncode == 0 and "going on from" in resumed.stderr, resumed.stderr
    again = (tmp_path / "out.csv").read_text()
    assert run_script("find_duplicates.py", *words).returncode == 0
    assert (tmp_path / "out.csv").read_text() == again and not list(tmp_path.glob(".*"))


def test_a_sweep_counts_groups_and_shows_pairs_between_thresholds():
    sentences = Dataset.from_dict({"sentence": list("abcd")})
    lines = sweep(np.asarray([[0, 1], [2, 3]]), np.float32([0.97, 0.72]), sentences, seed=0).splitlines()
    assert [line.split() for line in lines if "|" in line] == [["0.970", "a", "|", "b"], ["0.720", "c", "|", "d"]]
    counts = {line.split()[0]: line.split()[1:] for line in lines[1:] if "|" not in line}
    assert counts["0.95"] == counts["0.75"] == ["1", "2"] and counts["0.70"] == ["2", "4"]

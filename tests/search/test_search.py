"""Searching: the index, what it is refused for, and results against all scores computed one by one."""

import csv
import json
import shutil

import faiss
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import random_sentences

from transencoder.data.tables import read_pairs
from transencoder.embeddings import embed_texts
from transencoder.encoders import load_encoder
from transencoder.inference import Inference
from transencoder.search import neighbours
from transencoder.search.clusters import candidate_pairs, communities
from transencoder.search.index import Hit, grown, load_index, partners, recall


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
    np.testing.assert_allclose([hit["score"] for hit in line["hits"]], cosines[best], atol=1e-5)
    np.testing.assert_allclose([hit["rerank"] for hit in line["hits"]], scores[best], atol=1e-5)


def test_an_index_is_made_once_and_gets_what_is_new(words, tmp_path, run_script, monkeypatch):
    made = run_script("search.py", *words, "--sentences", tmp_path / "sentences.txt", "--query", "cancel my plan")
    assert made.returncode == 0 and "40 sentences, 40 of them new" in made.stderr
    assert "cancel my plan" in made.stdout and "retrieve" in made.stdout and "rerank" in made.stdout
    (tmp_path / "more.txt").write_text("a parcel from the moon\n" + random_sentences(40)[3] + "\nanother one\n")
    added = run_script("search.py", *words, "--sentences", tmp_path / "more.txt", "--query", "a parcel from the moon")
    assert "42 sentences, 2 of them new" in added.stderr
    assert load_index(tmp_path / "index").texts(np.asarray([40, 41])) == ["a parcel from the moon", "another one"]
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


def test_recall_counts_partners_and_not_the_query(words, tmp_path, run_script):
    hits = [Hit(text, 0.0) for text in ("q", "a", "x", "b")]
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
    assert result.stdout == "recall@39 of 20 queries: retrieved 100.00, re-ranked 100.00\n"


@pytest.mark.parametrize(
    ("text", "extra", "said"),
    [
        ("", [], "the file is empty"),
        ("only one\n", [], "fewer than two distinct sentences"),
        ("one\ntwo\n", ["--top_k", "3"], "--top_k 3: the index holds 2 sentences"),
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
    sizes = {row["cluster"]: int(row["size"]) for row in rows}
    assert sum(sizes.values()) == 30 and all(0 <= float(row["score"]) <= 1 for row in rows)
    none = run_script("find_duplicates.py", *words, "--threshold", 1.0)
    assert none.returncode == 0 and "0 groups" in none.stderr
    for wrong, said in (
        (["--output", "x.txt"], "must be the name of a .csv file"),
        (["--threshold", "2"], "--threshold"),
    ):
        bad = run_script("find_duplicates.py", *words, *wrong)
        assert bad.returncode == 2 and said in bad.stderr and len(bad.stderr.splitlines()) == 1
    assert not list(tmp_path.glob(".*"))

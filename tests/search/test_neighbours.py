"""Neighbours by words and by vectors, against what can be counted by hand or compared with all."""

import numpy as np
import pytest

from transencoder.search import neighbours
from transencoder.search.neighbours import LexicalIndex, search_vectors, vector_index, words_of


def unit_rows(rows, dimensions=16, clusters=None, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, dimensions))
    if clusters:
        vectors = 0.3 * vectors + rng.normal(size=(clusters, dimensions))[rng.integers(clusters, size=rows)]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_lexical_neighbours_share_words_and_rare_ones_count_most():
    index = LexicalIndex(["the Cat sat", "the cat RAN", "the dog barks", "the dog sleeps", "x y z"])
    found = index.search(["cat ran", "the barks", "unknown", "?!"], 4)
    assert found[0].tolist() == [1, 0, -1, -1]
    assert found[1][0] == 2 and set(found[1][1:].tolist()) == {0, 1, 3}  # all have "the", one has "barks"
    assert (found[2:] == -1).all()


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("The  Cat's iPhone-15!", ["the", "cat", "s", "iphone", "15"]),
        ("मेरा पार्सल कहाँ है।", ["मेरा", "पार्सल", "कहाँ", "है"]),  # vowel signs belong to their word
        ("我的iPhone密码", ["我的", "iphone", "密码"]),
        ("账号密码。还", ["账号", "号密", "密码", "还"]),
        ("می‌خواهم", ["میخواهم"]),  # a joiner without width
        ("?!", []),
    ],
)
def test_words_are_found_in_every_script(sentence, words):
    assert words_of(sentence) == words


def test_lexical_neighbours_of_chinese_sentences_share_characters():
    index = LexicalIndex(["账号密码还没有收到请帮忙", "退款申请什么时候上个月", "账号密码打不开了谢谢"])
    assert index.search(["账号密码还没有收到谢谢"], 3).tolist() == [[0, 2, -1]]


def test_more_lexical_neighbours_than_there_are_sentences_are_missing():
    assert LexicalIndex(["a b", "b c"]).search(["b"], 5).tolist() in ([[0, 1, -1, -1, -1]], [[1, 0, -1, -1, -1]])
    assert (LexicalIndex(["...", "!"]).search(["a"], 2) == -1).all()  # no words at all


def test_up_to_the_limit_all_vectors_are_compared(tmp_path):
    vectors = unit_rows(50)
    found = search_vectors(vector_index(vectors, tmp_path, seed=1), vectors[:7], 5)
    np.testing.assert_array_equal(found, np.argsort(-(vectors[:7] @ vectors.T), axis=1)[:, :5])
    assert not list(tmp_path.iterdir())


def test_above_the_limit_clusters_on_disk_find_nearly_all(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 1000)
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", 1500)  # three blocks, the last of them not full
    vectors = unit_rows(4000, clusters=60)
    index = vector_index(vectors, tmp_path, seed=1)
    assert index.ntotal == 4000 and index.nlist == 100 and (tmp_path / "clusters").stat().st_size > 0
    found = search_vectors(index, vectors[:300], 10)
    exact = np.argsort(-(vectors[:300] @ vectors.T), axis=1)[:, :10]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert shared > 0.9
    again = search_vectors(vector_index(vectors, tmp_path, seed=1), vectors[:300], 10)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("k", [3, 5])
def test_where_there_are_fewer_vectors_the_rest_is_missing(tmp_path, k):
    vectors = unit_rows(3)
    found = search_vectors(vector_index(vectors, tmp_path, seed=1), vectors[:1], k)
    assert sorted(found[0, :3]) == [0, 1, 2] and (found[0, 3:] == -1).all()

"""Similarities of embeddings, on disk or on the device."""

import numpy as np
import pytest
import torch

from transencoder import embeddings
from transencoder.embeddings import comparable, device_similarities, similarities, smoothed


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [("cosine", [0.6, 1.0]), ("dot", [15.0, 50.0]), ("euclidean", [-4.472136, -5.0]), ("manhattan", [-6.0, -7.0])],
)
def test_similarities_are_the_same_on_the_device(similarity, expected):
    vectors = np.array([[3.0, 4.0], [5.0, 0.0], [6.0, 8.0]], dtype=np.float32)
    first, second = np.array([0, 0], dtype=np.int32), np.array([1, 2], dtype=np.int32)
    found = similarities(comparable(vectors, similarity), first, second, similarity)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    there = device_similarities(torch.from_numpy(vectors), first, second, similarity)
    assert there.dtype == np.float32
    np.testing.assert_allclose(there, expected, rtol=1e-5)


def test_smoothing_adds_the_neighbours_less_the_mean_of_all():
    # The mean is (0, 0). Of each vector the nearest is the one 60 degrees away; the other two are 120 or more.
    angles = np.radians([0, 60, 180, 240])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = smoothed(vectors, 1, torch.device("cpu"))
    half = np.radians([30, 30, 210, 210])
    np.testing.assert_allclose(found, np.stack([np.cos(half), np.sin(half)], axis=1), atol=1e-6)


def test_smoothing_in_blocks_finds_the_same_neighbours(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(57, 8)).astype(np.float32) + 1
    whole = smoothed(vectors, 5, torch.device("cpu"))
    monkeypatch.setattr(embeddings, "NEAREST_ROWS", 10)
    monkeypatch.setattr(embeddings, "NEAREST_COLUMNS", 4)  # fewer than neighbours
    np.testing.assert_allclose(smoothed(vectors, 5, torch.device("cpu")), whole, atol=1e-6)
    # By hand, for one of them.
    centred = vectors - vectors.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    nearest = np.argsort(-(centred @ centred[20]))[1:6]
    expected = centred[20] + centred[nearest].mean(axis=0)
    np.testing.assert_allclose(whole[20], expected / np.linalg.norm(expected), atol=1e-6)

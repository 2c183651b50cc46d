"""Similarities of embeddings, on disk or on the device."""

import numpy as np
import pytest
import torch

from transencoder.embeddings import comparable, device_similarities, similarities


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

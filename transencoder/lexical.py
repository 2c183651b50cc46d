"""What two sentences have in common as strings: a teacher that needs no training."""

import datasets
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from transencoder.data import unique_sentences

NGRAMS = (2, 4)  # characters, inside words: word forms and spellings of one word share most of them


def lexical_scores(pairs: datasets.Dataset) -> np.ndarray:
    """Cosine of the sentences' TF-IDF vectors over character n-grams; the n-grams' weights come from the pairs.

    Args:
        pairs: columns sentence1 and sentence2.
    Returns:
        float32 [pairs], in [0, 1].
    """
    sentences, (first, second) = unique_sentences(pairs)
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, dtype=np.float32)
    try:
        vectors = vectorizer.fit_transform(sentences["sentence"])
    except ValueError:  # no sentence has two characters
        return np.zeros(len(pairs), dtype=np.float32)
    cosines = vectors[first].multiply(vectors[second]).sum(axis=1)
    return np.asarray(cosines, dtype=np.float32).ravel().clip(0.0, 1.0)

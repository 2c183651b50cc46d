"""Pooling: how the token vectors of a plain language model become the vector of a sentence."""

from transencoder.config.options import Choice

# By the names that sentence-transformers' own Pooling gives them; it computes them.
POOLINGS = {
    "cls": Choice("cls", "the first token's vector", "the first token's vector"),
    "mean": Choice("mean", "the mean of all tokens' vectors", "the mean of the tokens' vectors"),
    "max": Choice("max", "the maximum of each dimension", "the tokens' maximum in each dimension"),
    "weightedmean": Choice("weightedmean", "a mean in which later tokens count more", "a mean weighted by position"),
    "lasttoken": Choice("lasttoken", "the last token's vector, for decoders", "the last token's vector"),
}

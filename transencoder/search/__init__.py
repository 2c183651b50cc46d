"""Neighbours, and what is made of them: pairs, an index, groups. The only room that knows FAISS and BM25."""

"""Tables -> tokens -> batches."""

import json
from collections.abc import Iterable

import datasets
import numpy as np
import pytest
import torch
from conftest import random_pairs, random_sentences
from transformers import PhobertTokenizer

from transencoder.batches import LengthWindowSampler, PairInputs, SentencePairs, make_loader
from transencoder.contrastive import DropoutViews, MaskedViews
from transencoder.data import tables
from transencoder.data import tokens as data
from transencoder.data.cache import cache_folder
from transencoder.data.tables import PAIRS, SENTENCES, read_sentences
from transencoder.data.tokens import TokenRows, tokenize, unique_sentences
from transencoder.encoders import BiEncoder, CrossEncoder, load_bi_encoder, load_cross_encoder
from transencoder.errors import InputError
from transencoder.model_files import ModelOptions


@pytest.fixture
def bi(tiny_bert) -> BiEncoder:
    return load_bi_encoder(str(tiny_bert), ModelOptions("mean"))


@pytest.fixture
def cross(tiny_bert) -> CrossEncoder:
    return load_cross_encoder(str(tiny_bert))


def tokens_of(table: datasets.Dataset, encoder: BiEncoder | CrossEncoder, max_length: int = 16) -> TokenRows:
    columns = PAIRS if encoder.kind == "cross" else SENTENCES
    return tokenize(table, columns, encoder.preprocessor(max_length=max_length))


# --- tokens ----------------------------------------------------------------------------------------------------------


def sentences_table(*sentences: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"sentence": list(sentences)})


def pairs_table(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def test_rows_are_padded_to_the_longest_with_mask(bi):
    # [CLS] = 2, [SEP] = 3; the words are numbered from 5 in the order of WORDS.
    tokens = tokens_of(sentences_table("how do i", "late", "my card"), bi)
    assert len(tokens) == 3
    assert tokens.lengths.tolist() == [5, 3, 4]
    batch = tokens.batch(np.array([2, 0, 2]))
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[2, 9, 15, 3, 0], [2, 5, 6, 7, 3], [2, 9, 15, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert tokens.batch(np.array([1]))["input_ids"].tolist() == [[2, 20, 3]]


def test_a_pair_is_one_input_with_token_types(cross):
    table = pairs_table([{"sentence1": "my card", "sentence2": "late"}, {"sentence1": "pay", "sentence2": "app"}])
    batch = tokens_of(table, cross).batch(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[2, 9, 15, 3, 20, 3], [2, 23, 3, 25, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]


def test_a_pair_has_no_token_types_where_the_model_takes_none(cross):
    cross.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokens = tokens_of(pairs_table([{"sentence1": "my card", "sentence2": "late"}]), cross)
    assert set(tokens.batch(np.array([0]))) == {"input_ids", "attention_mask"}


def test_padding_is_the_tokenizers_own(bi):
    bi.tokenizer.pad_token = "[UNK]"  # id 1, as RoBERTa's
    tokens = tokens_of(sentences_table("how do i", "late"), bi)
    assert tokens.batch(np.array([0, 1]))["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 20, 3, 1, 1]]


def test_inputs_are_cut_to_max_length_with_their_special_tokens(bi, cross):
    sentences = tokens_of(sentences_table("how do i change my password", "late"), bi, 5)
    assert sentences.batch(np.array([0]))["input_ids"].tolist() == [[2, 5, 6, 7, 3]]
    pairs = tokens_of(pairs_table([{"sentence1": "how do i change my", "sentence2": "late app"}]), cross, 7)
    # The longer one is cut.
    assert pairs.batch(np.array([0]))["input_ids"].tolist() == [[2, 5, 6, 3, 20, 25, 3]]


def test_inputs_that_are_cut_are_counted_and_those_that_just_fit_are_not(bi, cross, capsys, monkeypatch):
    sentences = sentences_table("how do i pay", "how do i pay my", "how do i pay my order", "pay")  # 4 to 6 words, 1
    for length, cut in ((8, 0), (7, 1), (6, 2), (4, 3)):  # with [CLS] and [SEP]
        assert tokens_of(sentences, bi, length).cut == cut
        said = f"{cut} of 4 sentences are cut: longer than {length} tokens\n" if cut else ""
        assert capsys.readouterr().err == said
        assert tokens_of(sentences, bi, length).cut == cut  # from the cache
        assert capsys.readouterr().err == said
    pairs = pairs_table(
        [{"sentence1": "how do i", "sentence2": "pay"}, {"sentence1": "how do i", "sentence2": "pay my"}]
    )
    assert tokens_of(pairs, cross, 7).cut == 1
    assert "1 of 2 pairs are cut: longer than 7 tokens" in capsys.readouterr().err
    monkeypatch.setattr(data, "TOKENIZED_ROWS", 3)
    data.training_tokens(sentences, SENTENCES, bi.preprocessor(max_length=6))
    assert "666 of 1000 sampled sentences are cut: longer than 6 tokens" in capsys.readouterr().err


def test_kept_tokens_are_not_used_for_another_length_or_vocabulary(tmp_path, bi):
    (tmp_path / "s.txt").write_text("how do i change my password\nlate app\n")
    table = read_sentences([str(tmp_path / "s.txt")])
    assert tokens_of(table, bi).lengths.tolist() == [8, 4]
    assert tokens_of(table, bi, 5).lengths.tolist() == [5, 4]
    assert tokens_of(table, bi).lengths.tolist() == [8, 4]
    bi.tokenizer.add_tokens(["change my"])
    assert tokens_of(table, bi).lengths.tolist() == [7, 4]


def test_kept_tokens_of_a_model_with_token_types_are_not_used_for_one_without(cross):
    table = pairs_table([{"sentence1": "my card", "sentence2": "late"}])
    assert tokens_of(table, cross).names == ["input_ids", "token_type_ids"]
    cross.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert tokens_of(table, cross).names == ["input_ids"]


def kept_files():
    with cache_folder() as folder:
        return sorted(folder.iterdir())


def test_damaged_files_of_tokens_and_of_distinct_sentences_are_made_again(bi, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    table = pairs_table([{"sentence1": "my card", "sentence2": "late"}, {"sentence1": "late", "sentence2": "pay my"}])

    def everything():
        sentences, places = unique_sentences(table)
        tokens = tokens_of(sentences, bi).batch(np.arange(3))["input_ids"].tolist()
        return sentences["sentence"][:], [rows.tolist() for rows in places], tokens

    expected = everything()
    names = {path.name for path in kept_files()}
    assert len(names) == 5  # two of sentences, one of tokens, and their checksums
    for name in names:
        whole = (kept_files()[0].parent / name).read_bytes()
        for damaged in (b"", whole[:-9], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
            (kept_files()[0].parent / name).write_bytes(damaged)
            assert everything() == expected


def test_kept_tokens_are_not_used_for_other_merges_of_one_vocabulary(tmp_path, bi):
    (tmp_path / "vocab.txt").write_text("a 1\nb 1\nc 1\nab 1\nbc 1\nab@@ 1\na@@ 1\nb@@ 1\n")
    found = []
    for merges in ("a b 2\n", "b c</w> 2\n"):
        (tmp_path / "bpe.codes").write_text(merges)
        slow = PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
        assert not slow.is_fast
        bi.model[0].processor = slow
        assert bi.tokenizer is slow
        found.append(tokens_of(sentences_table("abc"), bi).batch(np.array([0]))["input_ids"].tolist())
    assert found[0] != found[1], found


def test_tokens_are_kept_from_run_to_run(tmp_path, bi, tiny_bert):
    source = tmp_path / "s.txt"
    source.write_text("how do i\nlate app\n")
    tokens_of(read_sentences([str(source)]), bi)
    before = kept_files()
    used = load_bi_encoder(str(tiny_bert), ModelOptions("mean"))  # as a new process does
    used.tokenizer(["how do i", "late"], truncation=True, max_length=3, padding=True)  # a fast one remembers how
    tokens_of(read_sentences([str(source)]), used)
    assert kept_files() == before


def test_tokens_are_found_in_every_chunk(monkeypatch, bi):
    monkeypatch.setattr(data, "TEXTS_AT_ONCE", 7)
    sentences = random_sentences(40)
    tokens = tokens_of(sentences_table(*sentences), bi, 64)
    order = np.random.default_rng(0).permutation(40)
    for row, index in zip(tokens.rows("input_ids", order), order, strict=True):
        assert row.tolist() == bi.tokenizer(sentences[index])["input_ids"]


@pytest.mark.parametrize("rows", [7, 1000])
def test_unique_sentences_and_their_places_give_the_pairs_back(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tables, "BLOCK_ROWS", rows)
    table = pairs_table(random_pairs(50) + random_pairs(50)[::-1])
    for part in (table, table.select([97, 3, 3, 50, 2])):
        unique, (first, second) = unique_sentences(part)
        sentences = unique["sentence"][:]
        assert sentences == list(dict.fromkeys(text for row in part for text in (row["sentence1"], row["sentence2"])))
        assert [sentences[i] for i in first] == part["sentence1"][:]
        assert [sentences[i] for i in second] == part["sentence2"][:]


# --- batches ---------------------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(0).integers(3, 65, size=1003)


def rows_of(batches: Iterable[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def full_batches(sampler: LengthWindowSampler) -> list[list[int]]:
    """The sampler's batches, pieces put together."""
    pieces = list(sampler)
    return [rows_of(pieces[i : i + sampler.micro_batches]) for i in range(0, len(pieces), sampler.micro_batches)]


def padded_tokens(batches: list[list[int]]) -> int:
    return sum(len(batch) * LENGTHS[batch].max() - LENGTHS[batch].sum() for batch in batches)


@pytest.mark.parametrize("window", [1, 4, 32, 1000])
def test_each_row_comes_at_most_once_and_only_full_batches_come(window):
    sampler = LengthWindowSampler(LENGTHS, batch_size=16, micro_batches=2, window=window, seed=1)
    pieces = list(sampler)
    assert sampler.batches == 62  # 1003 = 62 * 16 + 11
    assert len(sampler) == len(pieces) == 124
    assert {len(piece) for piece in pieces} == {sampler.batch_size} == {8}
    rows = rows_of(pieces)
    assert len(set(rows)) == len(rows) == 992
    assert set(rows) <= set(range(1003))


@pytest.mark.parametrize("window", [1, 8])
def test_a_batch_holds_the_same_rows_in_however_many_pieces_it_comes(window):
    whole, *others = (
        full_batches(LengthWindowSampler(LENGTHS, 16, pieces, window, seed=1)) for pieces in (1, 2, 4, 16)
    )
    assert all(other == whole for other in others)


def test_batches_depend_on_seed_and_epoch_alone():
    def draw(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthWindowSampler(LENGTHS, 16, 2, 8, seed)
        sampler.epoch = epoch
        return list(sampler)

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 3) == draw(1, 3)
    assert len({json.dumps(draw(seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (2, 0), (2, 1)]}) == 4


def test_rows_left_out_of_one_epoch_come_in_another():
    sampler = LengthWindowSampler(LENGTHS, 16, 1, 8, seed=1)
    seen = set()
    for sampler.epoch in range(5):
        seen |= set(rows_of(sampler))
    assert seen == set(range(1003))


def test_a_window_of_one_batch_is_a_plain_shuffle():
    batches = full_batches(LengthWindowSampler(LENGTHS, 16, 1, window=1, seed=1))
    assert not any((np.diff(LENGTHS[batch]) >= 0).all() for batch in batches)
    spread = np.mean([np.ptp(LENGTHS[batch]) for batch in batches])
    random = np.mean([np.ptp(np.random.default_rng(i).choice(LENGTHS, 16)) for i in range(200)])
    assert spread == pytest.approx(random, rel=0.05)


def test_batches_of_a_window_are_of_similar_length_and_in_random_order():
    # One window over everything: sorted by length and cut, so that each batch holds rows that follow one another.
    lengths = np.random.default_rng(1).permutation(64)
    batches = full_batches(LengthWindowSampler(lengths, 4, 1, window=16, seed=1))
    starts = [lengths[batch].min() for batch in batches]
    assert all(
        sorted(lengths[batch]) == list(range(start, start + 4)) for batch, start in zip(batches, starts, strict=True)
    )
    assert starts != sorted(starts)


def test_wider_windows_save_padding():
    padding = [
        padded_tokens(full_batches(LengthWindowSampler(LENGTHS, 16, 1, window, seed=1))) for window in (1, 4, 32)
    ]
    assert padding[1] < 0.5 * padding[0]
    assert padding[2] < 0.5 * padding[1]


def test_the_loader_gives_whole_padded_batches(bi):
    rows = DropoutViews(sentences_table(*random_sentences(20)), bi, 64)
    sampler = LengthWindowSampler(rows.lengths, 8, 2, 4, seed=1)
    batches = [batch["inputs"] for batch in make_loader(rows, sampler)]
    assert [batch["input_ids"].shape[0] for batch in batches] == [
        8,
        8,
        8,
        8,
    ]  # four pieces of four, each sentence twice
    for batch, indices in zip(batches, sampler, strict=True):
        assert batch["attention_mask"].sum(1).tolist() == rows.lengths[indices + indices].tolist()


# --- views -----------------------------------------------------------------------------------------------------------


def decoded(encoder: BiEncoder | CrossEncoder, batch: dict) -> list[str]:
    return encoder.tokenizer.batch_decode(batch["inputs"]["input_ids"], skip_special_tokens=True)


def test_dropout_views_hold_every_sentence_twice(bi):
    rows = DropoutViews(sentences_table("how do i", "late app", "pay"), bi, 16)
    assert decoded(bi, rows.__getitems__([2, 0])) == ["pay", "how do i"] * 2


def test_swap_gives_every_pair_in_both_orders_with_its_score(cross):
    rows = [
        {"sentence1": "my card", "sentence2": "late", "score": 0.25},
        {"sentence1": "pay", "sentence2": "how do i", "score": 0.75},
    ]
    swapped = PairInputs(pairs_table(rows), cross, 16, swap=True)
    batch = swapped.__getitems__([0, 1, 2, 3])
    assert decoded(cross, batch) == ["my card late", "pay how do i", "late my card", "how do i pay"]
    assert batch["scores"].tolist() == [0.25, 0.75, 0.25, 0.75]
    assert swapped.lengths.tolist() == [6, 7, 6, 7]
    plain = PairInputs(pairs_table(rows), cross, 16, swap=False)
    assert decoded(cross, plain.__getitems__([1, 0])) == ["pay how do i", "my card late"]
    assert plain.__getitems__([1, 0])["scores"].tolist() == [0.75, 0.25]
    assert len(plain.lengths) == 2


def test_sentence_pairs_stay_aligned_with_each_other_and_their_scores(bi):
    rows = random_pairs(30)
    pairs = SentencePairs(pairs_table(rows), bi, 64)
    for indices in ([4, 0, 17], [29, 3]):
        batch = pairs.__getitems__(indices)
        texts = decoded(bi, batch)
        assert texts[: len(indices)] == [rows[i]["sentence1"] for i in indices]
        assert texts[len(indices) :] == [rows[i]["sentence2"] for i in indices]
        assert batch["scores"].tolist() == pytest.approx([rows[i]["score"] for i in indices])
    # A pair is as long as its longer sentence, with two special tokens.
    assert pairs.lengths.tolist() == [max(len(row[name].split()) for name in PAIRS) + 2 for row in rows]


@pytest.mark.parametrize("kind", ["pairs", "swapped pairs", "sentences", "views"])
def test_what_is_tokenised_batch_by_batch_gives_the_same_batches(kind, bi, cross, monkeypatch):
    table = pairs_table(random_pairs(12))
    sentences = table.select_columns("sentence1").rename_column("sentence1", "sentence")
    make = {
        "pairs": lambda: PairInputs(table, cross, 11, swap=False),
        "swapped pairs": lambda: PairInputs(table, cross, 11, swap=True),
        "sentences": lambda: SentencePairs(table, bi, 6),
        "views": lambda: DropoutViews(sentences, bi, 6),
    }[kind]
    before = make()
    monkeypatch.setattr(data, "TOKENIZED_ROWS", 11)
    later = make()
    assert isinstance(before.tokens, data.TokenRows) and isinstance(later.tokens, data.TextRows)
    order = np.random.default_rng(0).permutation(len(before.lengths))
    assert len(later.lengths) == len(before.lengths)
    for indices in (order[:5].tolist(), order.tolist()):
        one, other = (rows.__getitems__(indices) for rows in (before, later))
        for name, value in one["inputs"].items():
            assert value.dtype == other["inputs"][name].dtype and torch.equal(value, other["inputs"][name]), name
        assert kind == "views" or torch.equal(one["scores"], other["scores"])


def test_lengths_of_what_is_not_tokenised_yet_are_bytes_of_text(bi, cross, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZED_ROWS", 1)
    rows = [{"sentence1": "zoë", "sentence2": "ab", "score": 0.0}, {"sentence1": "a", "sentence2": "b", "score": 1.0}]
    assert PairInputs(pairs_table(rows), cross, 16, swap=True).lengths.tolist() == [6, 2, 6, 2]
    assert SentencePairs(pairs_table(rows), bi, 16).lengths.tolist() == [4, 1]


def test_equal_sentences_are_known_where_the_loss_asks_for_them_however_many_pairs_there_are(bi, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZED_ROWS", 1)
    texts = [("a", "b"), ("a", "c"), ("c", "b")]
    table = pairs_table([{"sentence1": one, "sentence2": other, "score": 0.5} for one, other in texts])
    batch = SentencePairs(table, bi, 16, known=True).__getitems__([0, 1, 2])
    assert [batch["anchors"].tolist(), batch["others"].tolist()] == [[0, 0, 2], [1, 2, 1]]


ALPHABET = "abcdefghijklmnopqrstuvwxyz0123"  # 30 different characters


def masked(bi: BiEncoder, span: int = 5, seed: int = 1) -> MaskedViews:
    return MaskedViews(sentences_table(ALPHABET, "late app"), bi, 64, span, seed)


@pytest.mark.parametrize("span", [1, 5, 30])
def test_exactly_the_span_is_replaced_by_the_mask_token(bi, span):
    views, starts = masked(bi, span), set()
    for index in range(400):
        before, after = views.mask_span(ALPHABET, index).split("[MASK]")
        assert before + ALPHABET[len(before) : len(before) + span] + after == ALPHABET
        starts.add(len(before))
    assert starts == set(range(30 - span + 1))  # the first and the last place included


def test_the_mask_is_the_tokenizers_own(bi):
    bi.tokenizer.mask_token = "<mask>"
    assert "<mask>" in masked(bi).mask_span(ALPHABET, 0)


def test_a_sentence_under_30_characters_stays_whole(bi):
    assert masked(bi).mask_span(ALPHABET[:-1], 0) == ALPHABET[:-1]


def test_a_span_longer_than_a_sentence_masks_all_of_it(bi):
    assert masked(bi, span=40).mask_span(ALPHABET, 0) == "[MASK]"


def test_spans_depend_on_seed_epoch_and_row_alone(bi):
    def draw(seed: int, epoch: int) -> list[str]:
        views = masked(bi, seed=seed)
        views.epoch = epoch
        return [views.mask_span(ALPHABET, index) for index in range(20)]

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (2, 0)]}) == 3
    assert len(set(draw(1, 0))) > 5  # rows differ


def test_masked_views_hold_the_sentences_as_they_are_and_then_masked(bi):
    sentences = ["how do i change my password app", "late app"]
    views = MaskedViews(sentences_table(*sentences), bi, 64, 5, 1)
    batch = views.__getitems__([1, 0])["inputs"]
    assert bi.tokenizer.batch_decode(batch["input_ids"][:2], skip_special_tokens=True) == sentences[::-1]
    masks = (batch["input_ids"] == bi.tokenizer.mask_token_id).sum(1).tolist()
    assert masks == [0, 0, 0, 1]  # the short sentence stays whole in the second half as well
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_tokenizer_without_mask_token_is_refused(bi):
    bi.tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token; use --method simcse"):
        masked(bi)

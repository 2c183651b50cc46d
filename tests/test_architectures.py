"""Every kind of encoder that can be a start, with its own kind of tokenizer, against sentence-transformers."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import sentence_transformers
import sentencepiece
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import WORDS, random_pairs, random_sentences
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
    XLMRobertaConfig,
)

from transencoder.encoders import load_bi_encoder, load_cross_encoder, load_encoder
from transencoder.hub.export import export_onnx
from transencoder.inference import Inference
from transencoder.model_checks import inspect_encoder
from transencoder.model_files import ModelOptions
from transencoder.runtime.files import MODEL_FILES
from transencoder.scoring import PreparedPairs

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
LENGTH = 40  # positions that a model is given
PAIRS = [(row["sentence1"], row["sentence2"]) for row in random_pairs(12)] + [("refund " * 60, "late")]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def word_pieces(special):
    pieces = [*special, *WORDS, *(piece for x in LETTERS for piece in (x, f"##{x}") if piece not in WORDS)]
    return {piece: i for i, piece in enumerate(pieces)}


def byte_pieces(special):
    """Vocabulary and merges of a byte-level BPE."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(random_sentences(300), vocab_size=320, special_tokens=special)
    return tokenizer


def sentence_pieces(path: Path, **ids):
    """A sentencepiece model, which is all that some models on the Hub have for a tokenizer."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_sentences(300)), model_prefix=str(path.with_suffix("")), vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, **ids,
    )  # fmt: skip


def bert(folder):
    tokenizer = BertTokenizer(vocab=word_pieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    tokenizer.save_pretrained(folder)
    return BertConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **SIZES)


def distilbert(folder):
    size = bert(folder).vocab_size
    sizes = dict(dim=16, n_layers=2, n_heads=4, hidden_dim=32)
    return DistilBertConfig(vocab_size=size, max_position_embeddings=LENGTH, **sizes)


def roberta(folder):
    """Padding is number 1, and positions begin behind it."""
    trained = byte_pieces(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    trained.save_model(str(folder))
    tokenizer = RobertaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=LENGTH + 2, type_vocab_size=1, pad_token_id=1, **SIZES
    )


def mpnet(folder):
    tokenizer = MPNetTokenizer(vocab=word_pieces(["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]))
    tokenizer.save_pretrained(folder)
    return MPNetConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH + 2, pad_token_id=1, **SIZES)


def deberta_v3(folder):
    ids = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    sentence_pieces(
        folder / "spm.model", pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", **ids
    )
    # As microsoft/deberta-v3-base has it: relative positions in logarithmic buckets, no token types.
    relative = dict(relative_attention=True, position_buckets=16, pos_att_type="p2c|c2p", position_biased_input=False)
    return DebertaV2Config(
        vocab_size=100, max_position_embeddings=LENGTH, type_vocab_size=0, share_att_key=True,
        norm_rel_ebd="layer_norm", **relative, **SIZES,
    )  # fmt: skip


def modernbert(folder):
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]
    trained = byte_pieces(special)
    ids = {name: trained.token_to_id(name) for name in special}
    trained._tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, model_input_names=["input_ids", "attention_mask"], **names
    )
    tokenizer.save_pretrained(folder)
    pad, cls, sep = (ids[name] for name in ("[PAD]", "[CLS]", "[SEP]"))
    return ModernBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=LENGTH, pad_token_id=pad, cls_token_id=cls,
        bos_token_id=cls, sep_token_id=sep, eos_token_id=sep, local_attention=8, **SIZES,
    )  # fmt: skip


def xlm_roberta(folder):
    sentence_pieces(folder / "sentencepiece.bpe.model", model_type="unigram")
    return XLMRobertaConfig(
        vocab_size=100, max_position_embeddings=LENGTH + 2, type_vocab_size=1, pad_token_id=1, **SIZES
    )


STARTS = {make.__name__: make for make in (bert, roberta, distilbert, mpnet, deberta_v3, modernbert, xlm_roberta)}


@pytest.fixture(scope="module", params=STARTS)
def start(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("starts") / request.param
    folder.mkdir()
    config = STARTS[request.param](folder)
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            parameter.data.mul_(15)  # random embeddings that differ more
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def without_autocast():
    AcceleratorState._reset_state()


def scores_of(encoder, pairs=PAIRS):
    table = datasets.Dataset.from_dict({"sentence1": [a for a, _ in pairs], "sentence2": [b for _, b in pairs]})
    return PreparedPairs(encoder, table).score(encoder, Inference(Accelerator(mixed_precision="no", cpu=True), 400))


def cosines(model):
    first, second = (model.encode([pair[side] for pair in PAIRS], convert_to_tensor=True) for side in (0, 1))
    return torch.nn.functional.cosine_similarity(first, second).cpu().numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_plain_model_scores_as_in_sentence_transformers(start, pooling, tmp_path):
    assert inspect_encoder(start) == "plm"
    encoder = load_bi_encoder(start, ModelOptions(pooling))
    encoder.model.max_seq_length = 30
    ours = scores_of(encoder)
    assert np.ptp(ours) > 0.05
    transformer = Transformer(start, max_seq_length=30)
    pool = Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)
    theirs = sentence_transformers.SentenceTransformer(modules=[transformer, pool], device="cpu")
    np.testing.assert_allclose(ours, cosines(theirs), atol=1e-5)

    # Saved there and loaded here, saved here and loaded there.
    theirs.save_pretrained(str(tmp_path / "theirs"))
    np.testing.assert_allclose(scores_of(load_encoder(str(tmp_path / "theirs"))), ours, atol=1e-5)
    (tmp_path / "ours").mkdir()
    encoder.save_pretrained(tmp_path / "ours")
    # All of it is known as part of a model, so that it is moved, replaced and published with it.
    for path in (tmp_path / "ours").iterdir():
        assert any(path.match(pattern) for pattern in MODEL_FILES), path.name
    np.testing.assert_allclose(scores_of(load_encoder(str(tmp_path / "ours"))), ours, atol=1e-6)
    there = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(cosines(there), ours, atol=1e-5)


def test_a_cross_encoder_scores_as_in_sentence_transformers(start, tmp_path):
    torch.manual_seed(1)
    encoder = load_cross_encoder(start)
    encoder.model.max_seq_length = 30
    for layer in encoder.backbone.modules():
        if getattr(layer, "out_features", None) == 1:
            layer.weight.data.mul_(50)
    ours = scores_of(encoder)
    assert np.ptp(ours) > 0.01
    (tmp_path / "ours").mkdir()
    encoder.save_pretrained(tmp_path / "ours")
    assert inspect_encoder(str(tmp_path / "ours")) == "cross"
    np.testing.assert_allclose(scores_of(load_encoder(str(tmp_path / "ours"))), ours, atol=1e-6)
    there = sentence_transformers.CrossEncoder(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(there.predict(PAIRS), ours, atol=1e-5)


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_a_text_as_long_as_the_models_positions_goes_through(start, kind):
    encoder = load_bi_encoder(start, ModelOptions("mean")) if kind == "bi" else load_cross_encoder(start)
    assert encoder.max_length == LENGTH
    assert np.isfinite(scores_of(encoder, [("refund " * 60, "late " * 60), ("pay", "my plan")])).all()


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_the_rest_of_the_batch_changes_no_score(start, kind):
    """Padding is the tokenizer's own number, and is masked out."""
    torch.manual_seed(1)
    encoder = load_bi_encoder(start, ModelOptions("mean")) if kind == "bi" else load_cross_encoder(start)
    together = scores_of(encoder)
    alone = [scores_of(encoder, [pair])[0] for pair in PAIRS[:4]]
    np.testing.assert_allclose(together[:4], alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_every_architecture_can_be_exported(start, kind, tmp_path):
    encoder = load_bi_encoder(start, ModelOptions("mean")) if kind == "bi" else load_cross_encoder(start)
    assert export_onnx(encoder, tmp_path / "onnx") < 1e-4

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
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
)

from transencoder.batches import PairInputs, SentencePairs
from transencoder.contrastive import DropoutViews
from transencoder.encoders import load_bi_encoder, load_cross_encoder, load_encoder
from transencoder.errors import InputError
from transencoder.hub.export import export_onnx
from transencoder.inference import Inference
from transencoder.losses import InfoNCE, cosine_mse, soft_bce
from transencoder.model_checks import (
    check_bi_encoder,
    check_cross_encoder_start,
    check_encoders,
    check_language_model,
    check_tokenizer,
    inspect_encoder,
)
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


def decoder(folder, **names):
    """A decoder's tokenizer, which adds nothing to a text and pads on the left."""
    trained = byte_pieces(["<end>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<end>", unk_token="<end>",
        model_input_names=["input_ids", "attention_mask"], padding_side="left", **names,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def gpt2(folder, pad_token="<end>"):
    size = decoder(folder, pad_token=pad_token)
    return GPT2Config(
        vocab_size=size, n_embd=16, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )


def qwen3(folder):
    """Its configuration names no padding, as Qwen's own does not."""
    size = decoder(folder, pad_token="<end>")
    return Qwen3Config(
        vocab_size=size, max_position_embeddings=LENGTH, num_key_value_heads=2, head_dim=4, bos_token_id=None,
        eos_token_id=0, **SIZES,
    )  # fmt: skip


def t5(folder):
    """Positions are relative: neither the model nor its tokenizer names a longest input."""
    trained = byte_pieces(["<pad>", "</s>", "<unk>"])
    trained._tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return T5Config(
        vocab_size=len(tokenizer), n_positions=LENGTH, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


STARTS = {make.__name__: make for make in (bert, roberta, distilbert, mpnet, deberta_v3, modernbert, xlm_roberta)}
OTHERS = {make.__name__: make for make in (gpt2, qwen3, t5)}


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


def save_other(kind: str, folder: Path) -> str:
    """Save a random decoder or encoder-decoder, with weights so large that outputs differ."""
    folder.mkdir()
    config = OTHERS[kind](folder)
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(1 if kind == "t5" or parameter.ndim < 2 else 6)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def without_autocast():
    AcceleratorState._reset_state()


def scores_of(encoder, pairs=PAIRS):
    table = datasets.Dataset.from_dict({"sentence1": [a for a, _ in pairs], "sentence2": [b for _, b in pairs]})
    return PreparedPairs(encoder, table).score(encoder, Inference(Accelerator(mixed_precision="no", cpu=True), 400))


def cosines(model, batch_size=32):
    first, second = (
        model.encode([pair[side] for pair in PAIRS], batch_size=batch_size, convert_to_tensor=True) for side in (0, 1)
    )
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


@pytest.mark.parametrize("kind", OTHERS)
def test_decoders_and_t5_go_through_every_step(kind, tmp_path):
    name, pooling = save_other(kind, tmp_path / kind), ModelOptions("mean" if kind == "t5" else "lasttoken")
    check_language_model(name)
    check_bi_encoder(name, pooling)
    check_cross_encoder_start(name)
    bi, cross = load_bi_encoder(name, pooling), load_cross_encoder(name)
    table = datasets.Dataset.from_dict(dict(zip(("sentence1", "sentence2"), zip(*PAIRS, strict=True), strict=True)))
    table = table.add_column("score", np.linspace(0, 1, len(PAIRS), dtype=np.float32))
    sentences = table.select_columns("sentence1").rename_column("sentence1", "sentence")
    places = list(range(len(PAIRS)))
    steps = [
        (bi, DropoutViews(sentences, bi, 16), lambda out, batch: InfoNCE(0.05)(lambda **_: out, batch)),
        (bi, SentencePairs(table, bi, 16), lambda out, batch: cosine_mse(*out.chunk(2), batch["scores"])),
        (cross, PairInputs(table, cross, 32, swap=False), lambda out, batch: soft_bce(out, batch["scores"])),
    ]
    for encoder, rows, loss_of in steps:
        encoder.train()
        batch = rows.__getitems__(places)
        loss_of(encoder(**batch["inputs"]), batch).backward()
        gradients = [parameter.grad for parameter in encoder.parameters() if parameter.requires_grad]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    for encoder in (bi, cross):
        encoder.eval()
        assert encoder.max_length == LENGTH
        scores = scores_of(encoder)
        assert np.ptp(scores) > 0.01
        np.testing.assert_allclose([scores_of(encoder, [pair])[0] for pair in PAIRS[:4]], scores[:4], atol=1e-5)
        folder = tmp_path / encoder.kind
        encoder.save_pretrained(folder)
        check_encoders([str(folder)])
        np.testing.assert_allclose(scores_of(load_encoder(str(folder))), scores, atol=1e-5)
    # In a batch it pads on the left there, as the tokenizer says, which moves GPT-2's positions.
    there = sentence_transformers.SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    np.testing.assert_allclose(cosines(there, batch_size=1), scores_of(bi), atol=1e-5)
    there = sentence_transformers.CrossEncoder(str(tmp_path / "cross"), device="cpu")
    np.testing.assert_allclose(there.predict(PAIRS, batch_size=1), scores_of(cross), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_the_first_token_of_a_decoder_is_no_vector(kind, tmp_path):
    """It sees no other token: texts with the same first word would be the same."""
    name = save_other(kind, tmp_path / kind)
    with pytest.raises(InputError, match=f"^{name}: gives different texts the same output; a decoder needs --pooling"):
        load_bi_encoder(name, ModelOptions("cls"))
    pairs = [("how do I cancel my plan", "how tall is the Eiffel tower"), ("where is it", "cancel my plan")]
    assert scores_of(load_bi_encoder(name, ModelOptions("lasttoken")), pairs).max() < 0.99


def test_a_decoder_without_padding_is_refused(tmp_path):
    gpt2(tmp_path, pad_token=None).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"no padding token; name one in tokenizer_config.json \(pad_token, such as <end"
    ):
        check_tokenizer(str(tmp_path))


def test_an_encoder_of_t5_alone_is_a_bi_encoder_and_no_cross_encoder(tmp_path):
    config = t5(tmp_path)
    T5EncoderModel(config).save_pretrained(tmp_path)
    assert np.isfinite(scores_of(load_bi_encoder(str(tmp_path), ModelOptions("mean")))).all()
    with pytest.raises(InputError, match=r"its weights lack transformer\.decoder\."):
        check_cross_encoder_start(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_every_architecture_can_be_exported(start, kind, tmp_path):
    encoder = load_bi_encoder(start, ModelOptions("mean")) if kind == "bi" else load_cross_encoder(start)
    assert export_onnx(encoder, tmp_path / "onnx") < 1e-4

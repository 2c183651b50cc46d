"""Models: what a name stands for, pooling, saving and loading, drophead."""

import copy
import json
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_tokenizer, random_pairs
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    RobertaConfig,
)

from transencoder import embeddings
from transencoder.contrastive import MLPHead, add_drophead
from transencoder.encoders import BiEncoder, CrossEncoder, load_bi_encoder, load_cross_encoder, load_encoder
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.model_checks import check_bi_encoder, check_encoders, check_language_model, inspect_encoder
from transencoder.model_files import ModelOptions
from transencoder.runtime.shards import Shards
from transencoder.scoring import PreparedPairs, Teachers

MEAN, CLS = ModelOptions("mean"), ModelOptions("cls")
PAIRS = [(row["sentence1"], row["sentence2"]) for row in random_pairs(24)]
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
VOCABULARY = len(make_tokenizer())


ARCHITECTURES = {
    "bert": BertConfig(vocab_size=VOCABULARY, **SIZES),
    "roberta": RobertaConfig(vocab_size=VOCABULARY, pad_token_id=0, **SIZES),
    "deberta": DebertaV2Config(vocab_size=VOCABULARY, **SIZES),
    "distilbert": DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=4, hidden_dim=32),
    "mpnet": MPNetConfig(vocab_size=VOCABULARY, pad_token_id=0, **SIZES),
    "modernbert": ModernBertConfig(
        vocab_size=VOCABULARY, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, **SIZES
    ),
}


def save_model(folder: Path, config: PretrainedConfig, **tokenizer_options: object) -> str:
    """A random model of this configuration, with the tiny tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    for name, value in tokenizer_options.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def embed(encoder: BiEncoder, *sentences: str) -> torch.Tensor:
    with torch.no_grad():
        return encoder(**encoder.preprocessor().batch(list(sentences)))


def with_length(encoder: BiEncoder | CrossEncoder, tokens: int) -> BiEncoder | CrossEncoder:
    """The encoder, which says itself that its inputs are that long at most."""
    encoder.model.max_seq_length = tokens
    return encoder


def pairs_table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"sentence1": [a for a, _ in PAIRS], "sentence2": [b for _, b in PAIRS]})


def plain_accelerator() -> Accelerator:
    """An Accelerator without autocast, whatever other tests of this process left behind."""
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no")


def scores_of(encoder: BiEncoder | CrossEncoder) -> np.ndarray:
    """The encoder's scores of `PAIRS`, on a CPU or GPU."""
    accelerator = plain_accelerator()
    prepared = PreparedPairs(encoder, pairs_table())
    return prepared.score(encoder.to(accelerator.device), Inference(accelerator, 256))


@pytest.fixture
def bi_folder(tiny_bert, tmp_path) -> Path:
    """A saved bi-encoder: mean pooling, 12 tokens."""
    folder = tmp_path / "bi"
    folder.mkdir()
    with_length(load_bi_encoder(str(tiny_bert), MEAN), 12).save_pretrained(folder)
    return folder


@pytest.fixture
def cross_folder(tiny_bert, tmp_path) -> Path:
    """A saved cross-encoder of 20 tokens, whose logits differ more than a new head's."""
    folder = tmp_path / "cross"
    folder.mkdir()
    torch.manual_seed(0)
    encoder = with_length(load_cross_encoder(str(tiny_bert)), 20)
    encoder.backbone.classifier.weight.data.mul_(50)
    encoder.save_pretrained(folder)
    return folder


# --- what a name stands for ------------------------------------------------------------------------------------------


def test_folders_say_what_they_hold(tiny_bert, bi_folder, cross_folder):
    assert inspect_encoder(str(tiny_bert)) == "plm"
    assert inspect_encoder(str(bi_folder)) == "bi"
    assert inspect_encoder(str(cross_folder)) == "cross"
    assert isinstance(load_encoder(str(bi_folder)), BiEncoder)
    assert isinstance(load_encoder(str(cross_folder)), CrossEncoder)
    assert load_encoder(str(tiny_bert), CLS).model[1].pooling_mode == "cls"


def test_a_masked_language_model_is_a_plain_one(tmp_path):
    BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZES)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert inspect_encoder(str(tmp_path)) == "plm"


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_with_several_labels_is_refused_where_none_is_named(tmp_path, labels):
    config = BertConfig(vocab_size=VOCABULARY, num_labels=labels, **SIZES)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"^{tmp_path}: a classifier with {labels} labels, not a cross-encoder"):
        check_encoders([str(tmp_path)])
    check_encoders([str(tmp_path)], ModelOptions(label="label_1"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "not an encoder (no config.json)"),
        ("{}", "not an encoder (config.json names no model_type that transformers knows)"),
        ("[]", "not an encoder (config.json names no model_type that transformers knows)"),
        ('{"model_type": null}', "not an encoder (config.json names no model_type that transformers knows)"),
        ('{"model_type": "bertt"}', "not an encoder (config.json names no model_type that transformers knows)"),
        ('{"model_type": ["bert"]}', "not an encoder (config.json names no model_type that transformers knows)"),
        ("{", "config.json cannot be read: "),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        inspect_encoder(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: {expected}")


def test_a_folder_without_weights_is_refused(tiny_bert, bi_folder, cross_folder):
    for folder in (bi_folder, cross_folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match=rf"^{folder}: no weights \(model\.safetensors\)$"):
            inspect_encoder(str(folder))


@pytest.mark.parametrize("damage", ["cut off", "empty", "no safetensors", "too long"])
@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_damaged_weights_are_refused(cross_folder, name, damage):
    content = (cross_folder / "model.safetensors").read_bytes()
    broken = {
        "cut off": content[:-100],
        "empty": b"",
        "no safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        "too long": content + b"0" * 8,
    }
    (cross_folder / name).write_bytes(broken[damage])
    with pytest.raises(InputError) as caught:
        inspect_encoder(str(cross_folder))
    assert str(caught.value).startswith(f"{cross_folder / name}: damaged: ")


def test_a_folder_without_a_tokenizer_is_refused(bi_folder, cross_folder):
    for folder in (bi_folder, cross_folder):
        for path in folder.glob("*token*"):
            path.unlink()
        with pytest.raises(InputError, match=rf"^{folder}: no tokenizer \(tokenizer\.json, or a vocabulary\)$"):
            inspect_encoder(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "vocab.json", "spiece.model"])
def test_any_kind_of_tokenizer_will_do(bi_folder, name):
    for path in bi_folder.glob("*token*"):
        path.unlink()
    (bi_folder / name).touch()
    assert inspect_encoder(str(bi_folder)) == "bi"


def test_a_model_whose_training_goes_on_is_refused(bi_folder):
    (bi_folder / "run.json").write_text('{"status": "running"}')
    for refused in (inspect_encoder, load_encoder):
        with pytest.raises(InputError, match=f"^{bi_folder}: its training is not finished"):
            refused(str(bi_folder))
    for other in ('{"status": "complete"}', "{}", "[]"):  # ours, or somebody else's
        (bi_folder / "run.json").write_text(other)
        assert inspect_encoder(str(bi_folder)) == "bi"


@pytest.mark.parametrize("content", ["{}", '"Transformer"', '["Transformer"]', "[{}]", "[1]"])
def test_modules_that_are_no_list_of_modules_are_refused(bi_folder, content):
    (bi_folder / "modules.json").write_text(content)
    with pytest.raises(InputError, match=rf"^{bi_folder}: modules\.json is not a list of modules$"):
        inspect_encoder(str(bi_folder))


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match=r"model\.bin: not a folder with an encoder$"):
        inspect_encoder(str(tmp_path / "model.bin"))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/no: no such folder, and not a Hub id"):
        inspect_encoder(str(tmp_path / "no"))


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_model_that_cannot_be_had_offline_is_refused_with_the_way_out(name):
    assert huggingface_hub.is_offline_mode()  # else this would ask the network
    with pytest.raises(InputError) as caught:
        inspect_encoder(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: no such folder, and the Hub cannot be reached; ")
    assert f"hf download {name} --local-dir DIR" in message
    assert len(message.splitlines()) == 1


def test_each_place_takes_its_kind_of_model(tiny_bert, bi_folder, cross_folder):
    plain, bi, cross = map(str, (tiny_bert, bi_folder, cross_folder))
    check_bi_encoder(bi)
    check_bi_encoder(plain, MEAN)
    check_language_model(plain)
    check_language_model(bi)
    check_encoders([bi, cross])
    with pytest.raises(InputError, match="cross: a cross-encoder, where a bi-encoder is needed"):
        check_bi_encoder(cross)
    with pytest.raises(InputError, match="cross: already a cross-encoder"):
        check_language_model(cross)
    for check in (lambda: check_bi_encoder(plain), lambda: check_encoders([cross, plain])):
        with pytest.raises(InputError, match="does not say how it pools; add --pooling cls or --pooling mean"):
            check()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("1_Pooling/config.json", {}),
        ("1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": "none"}),
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]),
    ],
)
def test_a_bi_encoder_that_gives_no_vector_is_refused(bi_folder, file, content):
    (bi_folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"^{bi_folder}: "):
        scores_of(load_bi_encoder(str(bi_folder)))


def test_the_first_token_behind_a_prompt_that_is_left_out_is_the_vector(bi_folder):
    """Where the pooling leaves the prompt out, "cls" is not the first of all tokens."""
    from sentence_transformers import SentenceTransformer

    (bi_folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": False})
    )
    path = bi_folder / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "my late "}, "default_prompt_name": "query"}
    path.write_text(json.dumps(json.loads(path.read_text()) | prompts))
    theirs = SentenceTransformer(str(bi_folder), device="cpu")
    embeddings = [theirs.encode(list(side), convert_to_tensor=True) for side in zip(*PAIRS, strict=True)]
    expected = torch.cosine_similarity(*embeddings).numpy()
    np.testing.assert_allclose(scores_of(load_bi_encoder(str(bi_folder))), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 32}, "cls"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
    ],
)
def test_old_and_new_pooling_configurations_are_read(bi_folder, config, expected):
    size = {} if "embedding_dimension" in config else {"word_embedding_dimension": 32}
    (bi_folder / "1_Pooling" / "config.json").write_text(json.dumps(config | size))
    assert load_bi_encoder(str(bi_folder)).model[1].pooling_mode == expected


# --- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_an_embedding(tiny_bert, pooling):
    encoder = load_bi_encoder(str(tiny_bert), ModelOptions(pooling)).eval()
    alone, together = embed(encoder, "pay my card"), embed(encoder, "pay my card", "how do i change my password " * 3)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_pooling_takes_the_first_token_or_the_mean_of_all_but_padding(tiny_bert):
    encoder = load_bi_encoder(str(tiny_bert), MEAN).eval()
    with torch.no_grad():
        states = AutoModel.from_pretrained(tiny_bert)(**encoder.tokenizer("pay my card", return_tensors="pt"))[0][0]
    assert states.shape == (5, 32)
    mean = embed(encoder, "pay my card", "how do i change my password")[0]
    torch.testing.assert_close(mean, sum(states[i] for i in range(5)) / 5, atol=1e-5, rtol=0)
    encoder = load_bi_encoder(str(tiny_bert), CLS).eval()
    torch.testing.assert_close(embed(encoder, "pay my card", "how do i change")[0], states[0], atol=1e-5, rtol=0)


def test_the_head_is_for_training_only(tiny_bert):
    encoder = load_bi_encoder(str(tiny_bert), CLS, dropout=0.0).eval()
    plain = embed(encoder, "pay my card")
    encoder.head = MLPHead(32)
    assert torch.equal(embed(encoder.eval(), "pay my card"), plain)
    torch.testing.assert_close(embed(encoder.train(), "pay my card"), encoder.head(plain))
    assert (encoder.head(plain).abs() <= 1).all()  # tanh


def test_the_pooler_that_nothing_uses_is_not_trained(tiny_bert):
    encoder = load_bi_encoder(str(tiny_bert), CLS)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.0.model.pooler.dense.weight", "model.0.model.pooler.dense.bias"}


def test_embeddings_and_logits_are_float32_under_autocast(bi_folder, cross_folder):
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(load_bi_encoder(str(bi_folder)), "pay").dtype == torch.float32
        cross = load_cross_encoder(str(cross_folder))
        assert cross(**cross.preprocessor().batch(["pay"], ["late"])).dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_not_rounded_under_autocast(tmp_path, architecture):
    # Weights that are large enough to tell inputs apart: a tiny random model gives them all nearly the same states.
    config = copy.deepcopy(ARCHITECTURES[architecture])
    config.initializer_range = 0.3
    encoder = load_cross_encoder(save_model(tmp_path, config)).eval()
    rows = random_pairs(400)
    inputs = encoder.preprocessor().batch([row["sentence1"] for row in rows], [row["sentence2"] for row in rows])
    with torch.no_grad():
        exact = encoder(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            logits = encoder(**inputs)
    assert logits.dtype == torch.float32
    rounded = logits.to(torch.bfloat16).float()
    distinct = len(set(logits.tolist()))
    assert distinct > 0.95 * len(set(exact.tolist()))
    assert distinct > len(set(rounded.tolist()))
    assert (logits != rounded).float().mean() > 0.9
    torch.testing.assert_close(logits, exact, atol=0.1, rtol=0.1)


def test_the_logit_of_a_half_precision_model_is_float32(cross_folder):
    # As FSDP and DeepSpeed compute: the weights themselves are bf16.
    encoder = load_cross_encoder(str(cross_folder)).eval().bfloat16()
    logits = encoder(**encoder.preprocessor().batch(["pay my card", "late"], ["late", "app"]))
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_the_head_is_trained_under_autocast(cross_folder):
    encoder = load_cross_encoder(str(cross_folder)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = encoder(**encoder.preprocessor().batch(["pay my card"], ["late"])).sum()
    loss.backward()
    gradient = encoder.backbone.classifier.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_bi_encoders_score_is_the_cosine_of_its_embeddings(bi_folder):
    encoder = load_bi_encoder(str(bi_folder))
    scores = scores_of(encoder)
    encoder.cpu().eval()
    for (first, second), score in zip(PAIRS, scores, strict=True):
        inputs = [encoder.tokenizer(x, truncation=True, max_length=12, return_tensors="pt") for x in (first, second)]
        with torch.no_grad():
            cosine = torch.cosine_similarity(*(encoder(**x) for x in inputs))
        assert score == pytest.approx(cosine.item(), abs=1e-5)
    assert len(set(scores.round(4))) > 10


def test_a_cross_encoders_score_is_the_sigmoid_of_its_logit(cross_folder):
    encoder = load_cross_encoder(str(cross_folder))
    scores = scores_of(encoder)
    encoder.cpu().eval()
    for (first, second), score in zip(PAIRS, scores, strict=True):
        with torch.no_grad():
            inputs = encoder.tokenizer(first, second, truncation=True, max_length=20, return_tensors="pt")
            assert score == pytest.approx(encoder(**inputs).sigmoid().item(), abs=1e-5)
    assert len(set(scores.round(4))) > 10


def test_scoring_leaves_the_training_mode_as_it_was(bi_folder):
    encoder = load_bi_encoder(str(bi_folder)).train()
    first = scores_of(encoder)
    assert encoder.training
    assert encoder.backbone.training
    assert np.array_equal(scores_of(encoder), first)  # no dropout meanwhile


def test_several_encoders_give_their_mean_score(bi_folder, cross_folder):
    table, inference = pairs_table(), Inference(plain_accelerator(), 256)
    names = [str(bi_folder), str(cross_folder)]
    (first,), (second,) = (Teachers([name]).score([table], inference) for name in names)
    both, part = Teachers(names).score([table, table.select([5, 2])], inference)
    (weighted,) = Teachers(names, weights=[1, 3]).score([table], inference)
    np.testing.assert_allclose(weighted, 0.25 * first + 0.75 * second, atol=1e-6)
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-6)
    np.testing.assert_allclose(part, both[[5, 2]], atol=1e-5)


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_scores_do_not_depend_on_the_blocks_they_are_made_in(kind, bi_folder, cross_folder, tmp_path, monkeypatch):
    table, accelerator = pairs_table(), plain_accelerator()
    encoder = load_encoder(str(bi_folder if kind == "bi" else cross_folder)).to(accelerator.device).eval()
    prepared = PreparedPairs(encoder, table)
    whole = prepared.score(encoder, Inference(accelerator, 10**6))
    monkeypatch.setattr(embeddings, "SIMILARITY_ROWS", 5)
    monkeypatch.setattr(embeddings, "RANDOM_ROWS", 3)
    for rows, batch_tokens in ((1000, 10**6), (7, 10**6), (7, 100)):
        shards = Shards(tmp_path / "scores.parquet", {"batch_tokens": batch_tokens}, rows, accelerator)
        found = prepared.score_in_shards(Inference(accelerator, batch_tokens, shards), "Scoring", "encoder")
        np.testing.assert_allclose(found, whole, atol=1e-6)
        assert not list(shards.folder.glob("*.vec"))


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_a_saved_bi_encoder_is_a_sentence_transformers_folder(bi_folder):
    files = {path.relative_to(bi_folder).as_posix() for path in bi_folder.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    modules = json.loads((bi_folder / "modules.json").read_text())
    assert [(module["path"], module["type"]) for module in modules] == [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ]
    pooling = json.loads((bi_folder / "1_Pooling" / "config.json").read_text())
    assert pooling == {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}
    assert json.loads((bi_folder / "tokenizer_config.json").read_text())["model_max_length"] == 12
    config = json.loads((bi_folder / "config_sentence_transformers.json").read_text())
    assert (config["model_type"], config["similarity_fn_name"]) == ("SentenceTransformer", "cosine")


def test_a_saved_cross_encoder_is_a_sentence_transformers_folder_and_a_plain_classifier(cross_folder):
    files = {path.relative_to(cross_folder).as_posix() for path in cross_folder.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    modules = json.loads((cross_folder / "modules.json").read_text())
    assert [(module["path"], module["type"]) for module in modules] == [
        ("", "sentence_transformers.base.modules.transformer.Transformer")
    ]
    config = json.loads((cross_folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 1
    config = json.loads((cross_folder / "config_sentence_transformers.json").read_text())
    assert config["model_type"] == "CrossEncoder"
    assert config["activation_fn"] == "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_bi_encoder_scores_the_same_when_loaded_again(tiny_bert, tmp_path, pooling):
    encoder = with_length(load_bi_encoder(str(tiny_bert), ModelOptions(pooling)), 10)
    (tmp_path / "bi").mkdir()
    encoder.save_pretrained(tmp_path / "bi")
    again = load_bi_encoder(str(tmp_path / "bi"))
    assert (again.model[1].pooling_mode, again.max_length) == (pooling, 10)
    np.testing.assert_allclose(scores_of(again), scores_of(encoder), atol=1e-6)


def test_a_cross_encoder_scores_the_same_when_loaded_again(cross_folder, tmp_path):
    encoder = load_cross_encoder(str(cross_folder))
    (tmp_path / "again").mkdir()
    encoder.save_pretrained(tmp_path / "again")
    again = load_cross_encoder(str(tmp_path / "again"))
    assert again.max_length == 20
    np.testing.assert_allclose(scores_of(again), scores_of(encoder), atol=1e-6)


def test_a_new_cross_encoders_head_depends_on_the_seed(tiny_bert):
    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return load_cross_encoder(str(tiny_bert)).backbone.classifier.weight

    assert head(1).shape == (1, 32)
    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_gathered_weights_are_saved_in_place_of_the_models_own(bi_folder, tmp_path):
    encoder = load_bi_encoder(str(bi_folder))
    encoder.head = MLPHead(32)
    state = {name: value + 1 for name, value in encoder.state_dict().items()}
    (tmp_path / "saved").mkdir()
    encoder.save_pretrained(tmp_path / "saved", state)
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(load_file(bi_folder / "model.safetensors"))
    again = load_bi_encoder(str(tmp_path / "saved"))
    own = dict(encoder.backbone.named_parameters())
    for name, value in again.backbone.named_parameters():
        torch.testing.assert_close(value, own[name] + 1)


def test_the_head_is_not_saved(bi_folder, tmp_path):
    encoder = load_bi_encoder(str(bi_folder))
    encoder.head = MLPHead(32)
    (tmp_path / "saved").mkdir()
    encoder.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(load_file(bi_folder / "model.safetensors"))


def test_a_saved_bi_encoder_scores_the_same_in_sentence_transformers(bi_folder):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(bi_folder), device="cpu")
    assert theirs.max_seq_length == 12
    embeddings = [theirs.encode(list(side), convert_to_tensor=True) for side in zip(*PAIRS, strict=True)]
    expected = torch.cosine_similarity(*embeddings).numpy()
    np.testing.assert_allclose(scores_of(load_bi_encoder(str(bi_folder))), expected, atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_bi_encoder_of_sentence_transformers_scores_the_same_here(bi_folder, tmp_path, normalize):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize

    theirs = SentenceTransformer(str(bi_folder), device="cpu")
    if normalize:
        theirs.append(Normalize())
    theirs.save(str(tmp_path / "theirs"))
    ours = load_bi_encoder(str(tmp_path / "theirs"))
    assert (ours.model[1].pooling_mode, ours.max_length) == ("mean", 12)
    np.testing.assert_allclose(scores_of(ours), scores_of(load_bi_encoder(str(bi_folder))), atol=1e-6)


def test_a_saved_cross_encoder_scores_the_same_in_sentence_transformers(cross_folder):
    import sentence_transformers

    theirs = sentence_transformers.CrossEncoder(str(cross_folder), device="cpu")
    expected = theirs.predict(PAIRS)
    np.testing.assert_allclose(scores_of(load_cross_encoder(str(cross_folder))), expected, atol=1e-4)


def test_a_cross_encoder_of_sentence_transformers_scores_the_same_here(cross_folder, tmp_path):
    import sentence_transformers

    sentence_transformers.CrossEncoder(str(cross_folder), device="cpu").save_pretrained(str(tmp_path / "theirs"))
    assert inspect_encoder(str(tmp_path / "theirs")) == "cross"
    ours = load_encoder(str(tmp_path / "theirs"))
    np.testing.assert_allclose(scores_of(ours), scores_of(load_encoder(str(cross_folder))), atol=1e-6)


def test_a_saved_cross_encoder_scores_the_same_in_plain_transformers(cross_folder):
    model = AutoModelForSequenceClassification.from_pretrained(cross_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(cross_folder)
    inputs = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[:, 0].sigmoid().numpy()
    np.testing.assert_allclose(scores_of(load_cross_encoder(str(cross_folder))), expected, atol=1e-4)


# --- lengths, dropout, architectures ---------------------------------------------------------------------------------


def test_the_length_is_the_saved_one_within_what_the_model_takes_or_a_shorter_one_that_is_asked_for(
    tiny_bert, bi_folder
):
    encoder = load_bi_encoder(str(bi_folder))
    assert encoder.max_length == encoder.preprocessor().max_length == 12
    assert encoder.preprocessor(max_length=5).max_length == 5
    assert encoder.preprocessor(max_length=30).max_length == 12
    assert encoder.preprocessor(max_length=5).batch(["pay " * 50])["input_ids"].shape == (1, 5)
    assert load_bi_encoder(str(tiny_bert), CLS).max_length == load_cross_encoder(str(tiny_bert)).max_length == 64
    for make in (lambda: load_bi_encoder(str(tiny_bert), CLS), lambda: load_cross_encoder(str(tiny_bert))):
        assert make().preprocessor(max_length=512).max_length == 64


def test_a_tokenizer_without_a_length_gets_the_models(tmp_path):
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES)
    name = save_model(tmp_path, config, model_max_length=10**30)
    assert load_bi_encoder(name, CLS).max_length == 20


def test_robertas_positions_are_not_exceeded(tmp_path):
    # Positions are counted on from the padding id, 1: of 20, two are never used.
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=20, pad_token_id=1, **SIZES)
    name = save_model(tmp_path, config, pad_token="[UNK]")
    for encoder in (load_bi_encoder(name, CLS), load_cross_encoder(name)):
        assert encoder.max_length == 18
        texts = [["pay " * 50]] * (2 if encoder.kind == "cross" else 1)
        inputs = encoder.preprocessor().batch(*texts)
        assert inputs["input_ids"].shape == (1, 18)
        assert torch.isfinite(encoder(**inputs)).all()
        inputs = {name: torch.cat([value[:, :1], value], dim=1) for name, value in inputs.items()}
        with pytest.raises((IndexError, RuntimeError)):
            encoder(**inputs)


@pytest.mark.parametrize("kind", ["bi", "cross"])
@pytest.mark.parametrize(("architecture", "takes"), [("bert", True), ("distilbert", False), ("modernbert", False)])
def test_a_model_reads_token_types_only_if_it_knows_them(tmp_path, architecture, takes, kind):
    config = copy.deepcopy(ARCHITECTURES[architecture])
    config.initializer_range = 0.3
    name = save_model(tmp_path, config)
    encoder = (load_bi_encoder(name, MEAN) if kind == "bi" else load_cross_encoder(name)).eval()
    inputs = dict(encoder.tokenizer(["pay"], ["late"], return_tensors="pt"))
    found = encoder(**inputs)
    assert inputs.pop("token_type_ids").any()
    assert torch.isfinite(found).all()
    assert torch.equal(found, encoder(**inputs)) is not takes


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_dropout_overrides_the_configurations(tiny_bert, kind):
    def load(dropout: float | None) -> nn.Module:
        if kind == "bi":
            return load_bi_encoder(str(tiny_bert), CLS, dropout)
        return load_cross_encoder(str(tiny_bert), dropout=dropout)

    def rates(encoder: nn.Module) -> set[float]:
        return {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)}

    assert rates(load(None)) == {0.1}
    assert rates(load(0.3)) == {0.3}
    encoder = load(0.0).train()
    inputs = encoder.preprocessor().batch(["pay my card"], *([["late"]] if kind == "cross" else []))
    assert torch.equal(encoder(**inputs), encoder(**inputs))


def test_dropout_of_other_architectures_is_overridden_too(tmp_path):
    sizes = dict(dim=16, n_layers=1, n_heads=4, hidden_dim=32, max_position_embeddings=64)
    name = save_model(tmp_path, DistilBertConfig(vocab_size=VOCABULARY, **sizes))
    config = load_bi_encoder(name, CLS, dropout=0.3).backbone.config
    assert (config.dropout, config.attention_dropout) == (0.3, 0.3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drophead_drops_whole_heads_and_scales_up_the_others(tmp_path, architecture):
    encoder = load_bi_encoder(save_model(tmp_path, ARCHITECTURES[architecture]), CLS, dropout=0.0)
    add_drophead(encoder, 0.4)
    hooked = [m for m in encoder.backbone.modules() if isinstance(m, nn.Linear) and m._forward_pre_hooks]
    assert len(hooked) == 2  # one in each layer
    seen = []
    hooked[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    sentences = [first for first, _ in PAIRS] * 4
    embed(encoder.eval(), *sentences)
    embed(encoder.train(), *sentences)
    # [sentence, token, head, size]: the first layer gets the same in both modes.
    plain, dropped = (states.reshape(96, -1, 4, 4) for states in seen)
    kept = (dropped != 0).any(dim=3).any(dim=1)
    scale = torch.where(kept, 4 / kept.sum(1, keepdim=True).clamp(min=1), 0.0)
    torch.testing.assert_close(dropped, plain * scale[:, None, :, None])
    assert 1 - kept.float().mean().item() == pytest.approx(0.4, abs=0.1)  # 384 draws: four standard deviations
    assert len({tuple(row) for row in kept.tolist()}) > 8  # drawn for each input


def test_drophead_does_nothing_outside_training(tiny_bert):
    encoder = load_bi_encoder(str(tiny_bert), MEAN, dropout=0.0).eval()
    before = embed(encoder, "pay my card")
    add_drophead(encoder, 0.9)
    assert torch.equal(embed(encoder, "pay my card"), before)
    assert not torch.equal(embed(encoder.train(), "pay my card"), before)


def test_drophead_with_all_heads_dropped_gives_finite_gradients(tiny_bert):
    encoder = load_bi_encoder(str(tiny_bert), MEAN).train()
    add_drophead(encoder, 1.0)
    encoder(**encoder.preprocessor().batch(["pay my card"])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_drophead_refuses_an_architecture_that_it_does_not_know(tmp_path):
    name = save_model(tmp_path, AlbertConfig(vocab_size=VOCABULARY, embedding_size=8, **SIZES))
    with pytest.raises(InputError, match="--drophead: the attention layers of a albert model are not known"):
        add_drophead(load_bi_encoder(name, CLS), 0.1)

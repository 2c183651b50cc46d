"""Whatever sentence-transformers loads scores here as it does there: all layouts, prompts, similarities, labels."""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import SPECIAL, launch, make_tokenizer, write_jsonl
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from transencoder.data.tokens import Preprocessor
from transencoder.encoders import load_bi_encoder, load_cross_encoder_start, load_encoder
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.model_checks import check_bi_encoder, check_cross_encoder_start, check_encoders, inspect_encoder
from transencoder.model_files import ModelOptions, has_bounds, label_of
from transencoder.scoring import Teachers, score_texts

FIRST = ["how do i change my password", "cancel my plan", "is the parcel late", "Refund my ORDER", "pay"]
SECOND = ["change the mail address", "how do i cancel", "the app is not late", "a card", "how do i pay the order " * 9]
PAIRS = datasets.Dataset.from_dict({"sentence1": FIRST, "sentence2": SECOND})


def ours(name: Path, **options) -> np.ndarray:
    """Scores as scoring gives them, through batches of similar length; checked against the path of a few texts."""
    options = ModelOptions(**options)
    check_encoders([str(name)], options)
    inference = Inference(Accelerator(cpu=True, mixed_precision="no"), batch_tokens=64)
    (scores,) = Teachers([str(name)], options=options, both_orders=False).score([PAIRS], inference)
    encoder = load_encoder(str(name), options)
    if encoder.kind == "bi":
        assert np.allclose(score_texts(encoder, FIRST, SECOND, inference), scores, atol=1e-5)
    return scores


def theirs(model: SentenceTransformer, **words) -> np.ndarray:
    first, second = (model.encode(texts, convert_to_tensor=True, **words) for texts in (FIRST, SECOND))
    return model.similarity_pairwise(first, second).numpy()


@pytest.fixture(scope="module")
def telling_bert(tiny_bert, tmp_path_factory) -> Path:
    """The tiny BERT with weights so large that scores differ."""
    folder = tmp_path_factory.mktemp("telling") / "bert"
    shutil.copytree(tiny_bert, folder)
    transformer = Transformer(str(tiny_bert))
    for parameter in transformer.parameters():
        parameter.data.mul_(6 if parameter.ndim > 1 else 1)
    transformer.model.save_pretrained(folder)
    return folder


def save(model, folder: Path) -> Path:
    torch.manual_seed(0)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def modules_of(bert: Path, pooling="mean", *more) -> list:
    transformer = Transformer(str(bert))
    return [transformer, Pooling(transformer.get_embedding_dimension(), pooling), *more]


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_every_pooling(pooling, telling_bert, tmp_path):
    folder = save(SentenceTransformer(modules=modules_of(telling_bert, pooling)), tmp_path / "model")
    scores = ours(folder)
    assert np.ptp(scores) > 0.01
    assert np.allclose(scores, theirs(SentenceTransformer(str(folder))), atol=1e-4)


def test_several_poolings_and_further_modules(telling_bert, tmp_path):
    torch.manual_seed(0)
    more = [Dense(64, 16), LayerNorm(16), Normalize()]
    folder = save(SentenceTransformer(modules=modules_of(telling_bert, ("cls", "mean"), *more)), tmp_path / "model")
    assert np.allclose(ours(folder), theirs(SentenceTransformer(str(folder))), atol=1e-4)
    encoder = load_bi_encoder(str(folder))
    assert encoder.width == 16 and not encoder.reads_first_token
    encoder.save_pretrained(tmp_path / "saved")
    assert np.allclose(ours(folder), theirs(SentenceTransformer(str(tmp_path / "saved"))), atol=1e-4)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_every_similarity_and_fewer_dimensions(similarity, telling_bert, tmp_path, capsys):
    model = SentenceTransformer(modules=modules_of(telling_bert), similarity_fn_name=similarity, truncate_dim=8)
    folder = save(model, tmp_path / "model")
    assert np.allclose(ours(folder), theirs(SentenceTransformer(str(folder))), atol=1e-4)
    assert (f"by {similarity}, as it says" in capsys.readouterr().err) == (similarity != "cosine")
    assert load_bi_encoder(str(folder)).width == 8


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_by_default_by_name_and_as_text(include_prompt, telling_bert, tmp_path):
    prompts = {"query": "my app ", "passage": "the order "}
    model = SentenceTransformer(modules=modules_of(telling_bert), prompts=prompts, default_prompt_name="query")
    model.set_pooling_include_prompt(include_prompt)
    folder = save(model, tmp_path / "model")
    model = SentenceTransformer(str(folder))
    assert np.allclose(ours(folder), theirs(model), atol=1e-4)
    assert np.allclose(ours(folder, prompt_names=("passage",)), theirs(model, prompt_name="passage"), atol=1e-4)
    assert np.allclose(ours(folder, prompts=("late ",)), theirs(model, prompt="late "), atol=1e-4)
    first = model.encode(FIRST, prompt_name="query", convert_to_tensor=True)
    second = model.encode(SECOND, prompt_name="passage", convert_to_tensor=True)
    two_sides = model.similarity_pairwise(first, second).numpy()
    assert np.allclose(ours(folder, prompt_names=("query", "passage")), two_sides, atol=1e-4)
    assert not np.allclose(two_sides, theirs(model), atol=1e-3)
    with pytest.raises(InputError, match=r"has no prompt 'nothing'; it has: .*passage"):
        ours(folder, prompt_names=("nothing",))


def test_lower_casing_and_length_as_the_model_says(telling_bert, tmp_path):
    folder = save(SentenceTransformer(modules=modules_of(telling_bert)), tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    cased = ours(folder)
    config = json.loads((folder / "sentence_bert_config.json").read_text())
    (folder / "sentence_bert_config.json").write_text(json.dumps({**config, "do_lower_case": True}))
    lower = ours(folder)
    assert np.allclose(lower, theirs(SentenceTransformer(str(folder))), atol=1e-4)
    assert abs(cased[3] - lower[3]) > 1e-3 and np.allclose(cased[:3], lower[:3], atol=1e-5)
    (folder / "sentence_bert_config.json").write_text(json.dumps({**config, "max_seq_length": 6}))
    assert load_bi_encoder(str(folder)).max_length == 6
    assert np.allclose(ours(folder), theirs(SentenceTransformer(str(folder))), atol=1e-4)


def test_the_layout_of_old_versions(telling_bert, tmp_path):
    """The language model in a folder of its own, flags for the pooling, classes by their old paths."""
    folder = save(SentenceTransformer(modules=modules_of(telling_bert, "max")), tmp_path / "model")
    expected = ours(folder)
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(inside / path.name)
    kinds = ("Transformer", "Pooling")
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (inside / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": false}')
    old = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    (folder / "config_sentence_transformers.json").write_text('{"__version__": {"sentence_transformers": "2.0.0"}}')
    assert inspect_encoder(str(folder)) == "bi"
    assert np.allclose(ours(folder), expected, atol=1e-5)
    assert np.allclose(ours(folder), theirs(SentenceTransformer(str(folder))), atol=1e-4)


def test_a_decoder_with_a_chat_template(tmp_path):
    folder = save(SentenceTransformer(modules=qwen_modules(tmp_path)), tmp_path / "model")
    assert np.allclose(ours(folder), theirs(SentenceTransformer(str(folder))), atol=1e-4)


def qwen_modules(tmp_path: Path) -> list:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} [SEP] {% endfor %}"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    transformer = Transformer(str(tmp_path / "qwen"))
    return [transformer, Pooling(32, "lasttoken")]


# --- cross-encoders --------------------------------------------------------------------------------------------------


def classifier(bert: Path, folder: Path, labels: list[str]) -> Path:
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(bert, num_labels=len(labels))
    config.id2label, config.label2id = dict(enumerate(labels)), {label: n for n, label in enumerate(labels)}
    model = BertForSequenceClassification.from_pretrained(bert, config=config)
    model.classifier.weight.data.mul_(50)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_a_classifier_with_one_label(activation, telling_bert, tmp_path):
    folder = classifier(telling_bert, tmp_path / "model", ["LABEL_0"])
    model = CrossEncoder(str(folder), activation_fn=getattr(torch.nn, activation)())
    folder = save(model, tmp_path / "saved")
    expected = CrossEncoder(str(folder)).predict(list(zip(FIRST, SECOND, strict=True)))
    assert np.ptp(expected) > 0.01
    assert np.allclose(ours(folder), expected, atol=1e-4)
    encoder = load_encoder(str(folder))
    assert encoder.is_bounded == has_bounds(str(folder)) == (activation == "Sigmoid")
    encoder.save_pretrained(tmp_path / "again")
    assert np.allclose(CrossEncoder(str(tmp_path / "again")).predict(list(zip(FIRST, SECOND, strict=True))), expected)
    name = f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
    (folder / "config_sentence_transformers.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for older in ({"sentence_transformers": {"activation_fn": name}}, {"sbert_ce_default_activation_function": name}):
        (folder / "config.json").write_text(json.dumps(config | older))
        assert load_encoder(str(folder)).is_bounded == has_bounds(str(folder)) == (activation == "Sigmoid")


def test_a_label_of_several_is_named_and_its_probability_is_the_score(telling_bert, tmp_path):
    folder = classifier(telling_bert, tmp_path / "nli", ["contradiction", "entailment", "neutral"])
    with pytest.raises(
        InputError, match=r"a classifier with 3 labels.*--label contradiction or entailment or neutral"
    ):
        ours(folder)
    with pytest.raises(InputError, match=r"--label same: .* has the labels contradiction, entailment, neutral"):
        ours(folder, label="same")
    pairs = list(zip(FIRST, SECOND, strict=True))
    expected = CrossEncoder(str(folder)).predict(pairs, apply_softmax=True)[:, 1]
    assert np.ptp(expected) > 0.01
    assert np.allclose(ours(folder, label="Entailment"), expected, atol=1e-4)


def test_modular_cross_encoders_and_decoders(telling_bert, tmp_path):
    torch.manual_seed(0)
    dense = Dense(32, 1, activation_function=None, module_input_name="sentence_embedding", module_output_name="scores")
    folder = save(CrossEncoder(modules=[*modules_of(telling_bert, "cls"), dense]), tmp_path / "modular")
    pairs = list(zip(FIRST, SECOND, strict=True))
    assert inspect_encoder(str(folder)) == "cross"
    assert np.allclose(ours(folder), CrossEncoder(str(folder)).predict(pairs), atol=1e-4)

    qwen_modules(tmp_path)
    transformer = Transformer(str(tmp_path / "qwen"), transformer_task="text-generation")
    transformer.modality_config.pop("message")
    folder = save(CrossEncoder(modules=[transformer, LogitScore(5, 6)]), tmp_path / "decoder")
    assert np.allclose(ours(folder), CrossEncoder(str(folder)).predict(pairs), atol=1e-4)


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_a_pair_scores_alone_as_in_a_batch_whatever_side_is_padded(kind, telling_bert, tmp_path):
    """In files and in search, which has one query and many texts."""
    if kind == "bi":
        folder = save(SentenceTransformer(modules=modules_of(telling_bert)), tmp_path / "model")
    else:
        folder = classifier(telling_bert, tmp_path / "model", ["LABEL_0"])
    right = ours(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    assert np.allclose(ours(folder), right, atol=1e-6)
    encoder, inference = load_encoder(str(folder)), Inference(Accelerator(cpu=True, mixed_precision="no"))
    together = score_texts(encoder, FIRST[:1] * len(SECOND), SECOND, inference)
    alone = [score_texts(encoder, FIRST[:1], [text], inference)[0] for text in SECOND]
    assert np.ptp(together) > 0.01 and np.allclose(together, alone, atol=1e-6)


def test_step_2_starts_from_anything(telling_bert, bi_encoder, tmp_path, capsys):
    pairs = list(zip(FIRST, SECOND, strict=True))
    reranker = classifier(telling_bert, tmp_path / "plain", ["LABEL_0"])
    reranker = save(CrossEncoder(str(reranker), activation_fn=torch.nn.Identity()), tmp_path / "reranker")
    nli = classifier(telling_bert, tmp_path / "nli", ["contradiction", "entailment", "neutral"])
    for start, said in (
        (telling_bert, "a new head"),
        (bi_encoder, "a new head"),
        (nli, "a new head"),
        (reranker, "its head"),
    ):
        check_cross_encoder_start(str(start))
        torch.manual_seed(0)
        encoder = load_cross_encoder_start(str(start))
        assert capsys.readouterr().err.count(said) == 1
        encoder.save_pretrained(tmp_path / "student")
        assert label_of(str(tmp_path / "student"), None) is None
        scores = ours(tmp_path / "student")
        assert scores.min() > 0 and scores.max() < 1
        weights = encoder.backbone.bert.encoder.layer[0].output.dense.weight
        of_start = load_file(start / "model.safetensors")
        (name,) = (name for name in of_start if name.endswith("encoder.layer.0.output.dense.weight"))
        assert torch.equal(weights, of_start[name])
    # Its logits were its scores; they are trained as logits, whose scores are their sigmoids.
    logits = CrossEncoder(str(reranker)).predict(pairs)
    assert np.allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-5)


# --- through the scripts ---------------------------------------------------------------------------------------------


def test_a_label_and_prompts_are_options_of_scoring(telling_bert, tmp_path):
    nli = classifier(telling_bert, tmp_path / "nli", ["contradiction", "entailment", "neutral"])
    prompts = {"query": "my app ", "passage": "the order "}
    bi = save(SentenceTransformer(modules=modules_of(telling_bert), prompts=prompts), tmp_path / "bi")
    rows = [{"sentence1": first, "sentence2": second} for first, second in zip(FIRST, SECOND, strict=True)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    for encoder, words, options in (
        (nli, ["--label", "entailment"], {"label": "entailment"}),
        (bi, ["--prompt_name", "query", "passage"], {"prompt_names": ("query", "passage")}),
        (bi, ["--prompt", "late "], {"prompts": ("late ",)}),
    ):
        output = tmp_path / "scores.parquet"
        words += [
            "--encoders",
            encoder,
            "--pairs",
            pairs,
            "--output",
            output,
            "--overwrite",
            "--mixed_precision",
            "no",
        ]
        result = launch("score_pairs.py", *words, direct=True)
        assert result.returncode == 0, result.stderr
        assert np.allclose(pq.read_table(output)["score"].to_numpy(), ours(encoder, **options), atol=1e-5)


def test_search_encodes_queries_and_passages_with_their_prompts(telling_bert, tmp_path):
    prompts = {"query": "my app ", "passage": "the order "}
    bi = save(SentenceTransformer(modules=modules_of(telling_bert), prompts=prompts), tmp_path / "bi")
    (tmp_path / "sentences.txt").write_text("\n".join(SECOND))
    words = ["--bi_encoder", bi, "--index", tmp_path / "index", "--top_k", 5, "--output", tmp_path / "hits.jsonl"]
    words += ["--query", FIRST[0], "--sentences", tmp_path / "sentences.txt", "--mixed_precision", "no"]
    result = launch("search.py", *words, "--prompt_name", "query", "passage", direct=True)
    assert result.returncode == 0, result.stderr
    found = {hit["sentence"]: hit["score"] for hit in json.loads((tmp_path / "hits.jsonl").read_text())["hits"]}
    model = SentenceTransformer(str(bi))
    query, passages = model.encode(FIRST[:1], prompt_name="query"), model.encode(SECOND, prompt_name="passage")
    expected = model.similarity(query, passages)[0].tolist()
    assert [found[text] for text in SECOND] == pytest.approx(expected, abs=1e-4)
    refused = launch("search.py", *words, "--prompt_name", "query", direct=True)
    assert refused.returncode == 2 and "made with the prompts ['my app ', 'the order ']" in refused.stderr


# --- what cannot be used ---------------------------------------------------------------------------------------------


def changed(folder: Path, target: Path, file: str, **values) -> Path:
    shutil.copytree(folder, target)
    path = target / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}) if isinstance(content, dict) else json.dumps(values["all"]))
    return target


def test_one_line_for_each_thing_that_cannot_be_used(bi_encoder, tmp_path):
    modules = json.loads((bi_encoder / "modules.json").read_text())
    own = [{**modules[0], "type": "modeling_mine.Own"}, modules[1]]
    static = [{**modules[0], "type": "sentence_transformers.models.StaticEmbedding"}]
    cases = [
        (changed(bi_encoder, tmp_path / "adapter", "adapter_config.json", peft_type="LORA"), "an adapter"),
        (changed(bi_encoder, tmp_path / "own", "modules.json", all=own), "modeling_mine.Own is code of its own"),
        (changed(bi_encoder, tmp_path / "static", "modules.json", all=static), "its first module is StaticEmbedding"),
        (
            changed(bi_encoder, tmp_path / "sparse", "config_sentence_transformers.json", model_type="SparseEncoder"),
            "neither a SentenceTransformer nor a CrossEncoder",
        ),
        (changed(bi_encoder, tmp_path / "auto", "config.json", auto_map={"AutoModel": "a.B"}), "auto_map"),
    ]
    cut = shutil.copytree(bi_encoder, tmp_path / "cut")  # as a download that ended too early leaves it
    (cut / "tokenizer.json").unlink()
    cases.append((cut, "no tokenizer"))
    added = shutil.copytree(bi_encoder, tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(added)
    tokenizer.add_tokens(["[URL]"])
    tokenizer.save_pretrained(added)
    cases.append((added, r"has 77 tokens, its language model embeddings for 76, and none for '\[URL\]'"))
    for known in ([], SPECIAL):
        few = shutil.copytree(bi_encoder, tmp_path / f"{len(known)} pieces")
        content = json.loads((few / "tokenizer.json").read_text())
        content["model"]["vocab"] = {piece: number for number, piece in enumerate(known)}
        (few / "tokenizer.json").write_text(json.dumps(content))
        cases.append((few, "its tokenizer has 5 of 76 tokens; download its vocabulary again"))
    lengths = dict(enumerate([0, -1, 1, 2, 2.5, "64", True, math.nan, math.inf]))
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        for number, length in lengths.items():
            folder = changed(bi_encoder, tmp_path / f"{key}{number}", file, **{key: length})
            if file == "tokenizer_config.json":
                (folder / "sentence_bert_config.json").write_text("{}")
            cases.append((folder, "hold no text; correct model_max_length in tokenizer_config.json"))
    unpadded = changed(bi_encoder, tmp_path / "unpadded", "tokenizer_config.json", pad_token=None)
    cases.append((unpadded, r"its tokenizer has no padding token; name one in tokenizer_config.json \(pad_token\)"))
    for folder, message in cases:
        with pytest.raises(InputError, match=message):
            check_encoders([str(folder)])


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_model_whose_configuration_makes_nothing_of_its_weights_is_not_loaded(value, bi_encoder, tmp_path):
    """The weights are whole and finite: only what it makes of a few texts tells."""
    folder = changed(bi_encoder, tmp_path / "model", "config.json", layer_norm_eps=value)
    expected = "gives numbers that are not finite" if value != value else "gives different texts the same output"
    with pytest.raises(InputError, match=f"^{folder}: {expected}"):
        load_encoder(str(folder))


def test_an_output_that_depends_on_the_padding_is_refused(bi_encoder, monkeypatch):
    pad = Preprocessor.pad

    def without_mask(self, rows):
        batch = pad(self, rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(Preprocessor, "pad", without_mask)
    with pytest.raises(InputError, match=r"its output for a text depends on the padding; see pad_token"):
        load_encoder(str(bi_encoder))


def test_a_model_that_tells_no_second_text_is_a_bi_encoder_only(tiny_bert, tmp_path):
    folder = changed(tiny_bert, tmp_path / "model", "config.json", type_vocab_size=1)
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    assert load_bi_encoder(str(folder), ModelOptions("mean")).width == 32
    check_bi_encoder(str(folder), ModelOptions("mean"))
    with pytest.raises(InputError, match=r"marks the second text of a pair \(token_type_ids\), .* a bi-encoder only"):
        check_cross_encoder_start(str(folder))


def test_a_module_with_pickled_weights_is_not_read(telling_bert, tmp_path):
    folder = save(SentenceTransformer(modules=modules_of(telling_bert, "mean", Dense(32, 8))), tmp_path / "model")
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"its weights are pickled .* SentenceTransformer as M"):
        check_encoders([str(folder)])


# --- what is trained is saved as its start said ----------------------------------------------------------------------


def test_what_a_start_says_is_still_said_when_it_is_saved(telling_bert, tmp_path):
    prompts = {"query": "how ", "passage": "the "}
    model = SentenceTransformer(modules=modules_of(telling_bert, "mean", Dense(32, 8), Normalize()), prompts=prompts)
    model.max_seq_length = 40
    folder = save(model, tmp_path / "start")
    encoder = load_bi_encoder(str(folder))
    assert encoder.preprocessor(max_length=8).max_length == 8
    encoder.save_pretrained(tmp_path / "student")
    student = SentenceTransformer(str(tmp_path / "student"))
    assert student.max_seq_length == 40 and student.prompts["query"] == "how " and len(student) == 4


def test_a_student_compares_by_the_cosine_that_it_was_trained_for(telling_bert, tmp_path, capsys):
    model = SentenceTransformer(modules=modules_of(telling_bert), similarity_fn_name="dot")
    encoder = load_bi_encoder(str(save(model, tmp_path / "start")))
    encoder.compare_by_cosine()
    assert "compares by dot; what is trained from it compares by cosine" in capsys.readouterr().err
    encoder.save_pretrained(tmp_path / "student")
    assert SentenceTransformer(str(tmp_path / "student")).similarity_fn_name == "cosine"

"""A tiny random BERT, and what runs the scripts as a user does."""

import functools
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the libraries read it when they are imported

import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from support import warm

SHARED = "TRANSENCODER_TESTS"  # environment variable: the folder and the process that all workers of pytest share
WORDS = [
    "how",
    "do",
    "i",
    "change",
    "my",
    "password",
    "mail",
    "address",
    "order",
    "refund",
    "card",
    "the",
    "a",
    "is",
    "not",
    "late",
    "parcel",
    "cancel",
    "pay",
    "plan",
    "app",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """The tests write to a `datasets` cache of their own, in this process and in those it starts."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    datasets.config.HF_DATASETS_CACHE = folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word pieces: the known words, and letters for all others."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = SPECIAL + WORDS + [p for x in letters for p in (x, f"##{x}") if p not in WORDS]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a random two-layer BERT, 32 wide."""
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


def save_tiny_bert(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory) -> Path:
    """Folder of a random one-layer RoBERTa, 24 wide, which cuts text into other pieces than the tiny BERT."""
    folder = tmp_path_factory.mktemp("models") / "tiny-roberta"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in zip(("bos", "pad", "eos", "unk", "mask"), special, strict=True)},
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(2)
    size = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    config = RobertaConfig(vocab_size=len(fast), max_position_embeddings=66, type_vocab_size=1, **size)
    RobertaModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def random_sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct sentences of three to nine known words."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(WORDS, k=draw.randint(3, 9)))] = None
    return list(found)


def random_pairs(count: int, seed: int = 0) -> list[dict]:
    """Pairs with a score that depends on the words they share, so that there is something to learn."""
    draw = random.Random(seed)
    sentences = random_sentences(count, seed)
    rows = []
    for first in sentences:
        second = first.split()
        for place in draw.sample(range(len(second)), draw.randint(0, len(second) - 1)):
            second[place] = draw.choice(WORDS)
        shared = len(set(first.split()) & set(second)) / len(set(first.split()) | set(second))
        rows.append({"sentence1": first, "sentence2": " ".join(second), "score": 5 * shared})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with sentences.txt, pairs.jsonl (unlabelled) and dev.jsonl, test.jsonl (with scores)."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def step1(tiny_bert, corpus) -> list:
    """The options that train_contrastive.py cannot do without; the output folder comes after them."""
    return ["--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt", "--output_dir"]


def write_corpus(folder: Path) -> Path:
    (folder / "sentences.txt").write_text("\n".join(random_sentences(96)) + "\n", encoding="utf-8")
    pairs = random_pairs(64)
    write_jsonl(folder / "pairs.jsonl", [{k: row[k] for k in ("sentence1", "sentence2")} for row in pairs])
    write_jsonl(folder / "dev.jsonl", random_pairs(40, seed=1))
    write_jsonl(folder / "test.jsonl", random_pairs(40, seed=2))
    return folder


@pytest.fixture(scope="session")
def bi_encoder(tiny_bert, tmp_path_factory) -> Path:
    """Folder of a bi-encoder on the tiny BERT."""
    from transencoder.encoders import load_bi_encoder
    from transencoder.model_files import ModelOptions

    folder = tmp_path_factory.mktemp("bi") / "bi"
    load_bi_encoder(str(tiny_bert), ModelOptions("mean")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cross_encoder(tiny_bert, tmp_path_factory) -> Path:
    """Folder of a cross-encoder on the tiny BERT, with a random head."""
    from transencoder.encoders import load_cross_encoder

    folder = tmp_path_factory.mktemp("cross") / "cross"
    torch.manual_seed(0)
    load_cross_encoder(str(tiny_bert)).save_pretrained(folder)
    return folder


def save_telling_encoders(folder: Path, tiny_bert: Path, max_lengths: tuple = (None, None)) -> None:
    """Folders "bi" and "cross", with weights so large that scores differ. `max_lengths`: of the two, in tokens."""
    from transencoder.encoders import load_bi_encoder, load_cross_encoder
    from transencoder.model_files import ModelOptions

    torch.manual_seed(0)
    encoders = {"bi": load_bi_encoder(str(tiny_bert), ModelOptions("mean"))}
    encoders["cross"] = load_cross_encoder(str(tiny_bert))
    for encoder, length in zip(encoders.values(), max_lengths, strict=True):
        encoder.model.max_seq_length = length or encoder.max_length
    for parameter in encoders["bi"].parameters():
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)
    encoders["cross"].backbone.classifier.weight.data.mul_(50)
    for kind, encoder in encoders.items():
        encoder.save_pretrained(folder / kind)


def write_measured(folder: Path, encoders: list[str], tasks: list, scores: list) -> None:
    """What evaluate_encoders.py leaves in a folder. `scores`: of each encoder for each task."""
    import numpy as np

    from transencoder import evaluation
    from transencoder.runtime.files import write_json

    folder.mkdir(parents=True, exist_ok=True)
    evaluation.write_pair_scores(folder / "pair-scores.parquet", encoders, tasks, scores)
    entries = []
    for encoder, own in zip(encoders, scores, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "inspect_encoder", lambda name: "cross" if "cross" in name else "bi")
            for task, values in zip(tasks, own, strict=True):
                entries += evaluation.result_entries([encoder], task, np.asarray(values))
    write_json(folder / "results.json", entries)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        os.environ[SHARED] = f"{tempfile.mkdtemp()}:{os.getpid()}"


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[SHARED].rpartition(":")[0], ignore_errors=True)


@functools.cache
def warm_python() -> warm.Warm:
    """The warm Python of all tests; started by the first one that asks for it."""
    folder, _, owner = os.environ[SHARED].rpartition(":")
    with FileLock(Path(folder) / "lock"):
        return warm.Warm(Path(folder) / "warm", int(owner))


def launch_command(
    script: str, *words: object, processes: int = 1, direct: bool = False, config: str = "", cold: bool = False
) -> dict:
    """`args` and `env` of a subprocess that runs a script: through `accelerate launch`, or `direct`ly with Python.

    Args:
        config: name of one of `accelerate_configs/`; by default cpu for one process, multi_gpu (over gloo) for more.
        cold: with a Python that begins with nothing imported, which takes ten seconds longer.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    python = sys.executable if cold else str(warm_python().path / "python")
    config = config or ("cpu" if processes == 1 else "multi_gpu")
    if config in ("cpu", "multi_gpu"):
        environment["ACCELERATE_USE_CPU"] = "true"  # "--cpu --num_processes 2" would silently run one process
    launcher = [python, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    launcher += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    command = [python] if direct else launcher
    return {"args": [*command, str(ROOT / "scripts" / script), *map(str, words)], "env": environment}


def launch(script: str, *words: object, **how: Any) -> subprocess.CompletedProcess:
    """Run a script to its end; `how` as for `launch_command`."""
    return subprocess.run(**launch_command(script, *words, **how), capture_output=True, text=True, timeout=600)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script in this process, as `python scripts/NAME` would: for what ends before any model is loaded."""

    def run(script: str, *words: object) -> subprocess.CompletedProcess:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / script), *map(str, words)])
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, out, err)

    return run

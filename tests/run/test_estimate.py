"""What a run has and will take, said by a dry run."""

from types import SimpleNamespace

import datasets
import yaml
from conftest import write_jsonl

from transencoder.run import estimate
from transencoder.run.checks import check_inputs
from transencoder.run.plan import load_plan, resolve_recipe

STAGE = dict(total_batch_size=2, learning_rate=1e-3, max_length=6)


def described(tmp_path, tiny_bert, **changes):
    """The lines of a recipe for one student."""
    plan = {"students": [{"name": "one", "plm": str(tiny_bert)}], "cycles": 1, **changes}
    content = {"common": {"skip_bad_rows": True}, "run_transencoder": plan}
    content["mine_pairs"] = {"num_pairs": 12, "mix": ["random=1"]}
    content |= {"train_contrastive": STAGE, "distill_bi2cross": STAGE, "distill_cross2bi": STAGE}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    plan = load_plan(resolve_recipe(str(path)), str(path))
    return estimate.describe(plan, check_inputs(plan, str(path)), 1)


def test_repeats_bad_rows_and_cut_sentences_are_counted(tiny_bert, tmp_path, capsys):
    # Six tokens are four characters of the tiny tokenizer: [CLS] and [SEP] are two.
    rows = ["a b c d", "a b c d e", "a b", "a b", "a b", " ", "c", "d e"]
    (tmp_path / "s.txt").write_text("\n".join(rows) + "\n")
    lines = described(tmp_path, tiny_bert, sentences=str(tmp_path / "s.txt"))
    assert lines[:2] == ["Sentences: 5 (exact repeats left out: 2)", "Pairs: 12, to be mined"]
    assert lines[2] == "Cut at 6 tokens: 1 of 5 sentences (train_contrastive, student one)"
    assert " of 5 random pairs (distill_bi2cross, student one)" in lines[3] and "distill_cross2bi" in lines[4]
    assert lines[-1] == "Nothing will be measured: the recipe names neither tasks nor dev"
    assert "s.txt: 1 of 8 rows left out, first row 6: sentence is empty" in capsys.readouterr().err


def test_given_pairs_and_what_is_measured_are_counted(tiny_bert, tmp_path):
    pairs = [("a", "b"), ("a", "b"), ("a b c", "d e"), ("c", "a")]
    rows = [dict(sentence1=a, sentence2=b, score=i) for i, (a, b) in enumerate(pairs)]
    files = dict(pairs=str(write_jsonl(tmp_path / "p.jsonl", rows)), tasks=[f"mine={tmp_path / 'p.jsonl'}"])
    student = {"name": "one", "plm": str(tiny_bert)}
    (tmp_path / "s.txt").write_text("a\nb\nc\n")
    lines = described(tmp_path, tiny_bert, students=[student], sentences=str(tmp_path / "s.txt"), **files)
    assert lines[1] == "Pairs: 3 (exact repeats left out: 1)" and lines[-1] == "Measured: mine"
    # [CLS] a b c [SEP] d e [SEP]
    assert "Cut at 6 tokens: 1 of 4 pairs (distill_bi2cross, student one)" in lines


def test_time_and_disk_by_hand(monkeypatch):
    monkeypatch.setattr(estimate, "_parameters", lambda name: (2e11, 1e11))  # of which half are embeddings
    monkeypatch.setattr(estimate, "_lengths", lambda name, columns: 0 * estimate.np.ones(9) + 10)
    monkeypatch.setattr(estimate, "prompts_of", lambda *_: (None, None))
    monkeypatch.setattr(estimate, "cpu_cores", lambda: 1)
    monkeypatch.setattr(estimate, "cpu_computes_bf16", lambda: False)

    def options(**changes):
        same = dict(num_epochs=1, total_batch_size=10, max_steps=None, max_length=32, checkpoints_total_limit=2)
        return SimpleNamespace(**{**same, **changes})

    trained = {
        "train_contrastive": (options(), 1000),
        "distill_bi2cross": (options(), 4000),  # 2000 in both orders
        "distill_cross2bi": (options(num_epochs=2), 2000),
    }
    plan = load_plan(
        {"run_transencoder": {"students": [{"name": "a", "plm": "m"}], "cycles": 2, "sentences": "s"}}, ""
    )
    texts = datasets.Dataset.from_dict({"sentence": ["a", "b"]})
    inputs = estimate.Inputs([texts], None, 2000, [], [trained])
    # Two views: 6 * 20 * 1000 = 1.2e5. In two cycles 2 * 10 * (6 * 4000 + 2 * 2000) = 5.6e5 and twice as much.
    # With 1e11 parameters 1.8e17: 104 days at 2e10, and an hour at 5e13. Models: five of 8e11 bytes, and six of them.
    time, disk = estimate.describe(plan, inputs, 1)[-3:-1]
    assert time.startswith("Time, very rough: 100 days on 1 CPU core, 1 hour on a GPU (at 20 GFLOP/s a core")
    assert disk.startswith("Disk, rough: 9000 GB, for 5 models")
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "cpu_computes_bf16", lambda: True)
        assert "30 days on 1 CPU core" in estimate.describe(plan, inputs, 1)[-3]  # 35, at 6e10
    trained["distill_cross2bi"] = (options(num_epochs=2, max_steps=1), 2000)
    # In step 3 only 2 * 20 * (6 * 10 + 2 * 2000) = 1.6e5, so 8.4e16 together: 49 days.
    assert "50 days on 1 CPU core" in estimate.describe(plan, inputs, 1)[-3]
    time, disk = estimate.describe(plan, inputs, 6)[-3:-1]
    assert "300 days" in time and "30000 GB, for 30 models" in disk

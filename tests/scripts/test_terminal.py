"""What a person sees: the pages of --help, bars and hints at a terminal and none in a log."""

import dataclasses
import re
import signal
import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT

from transencoder.config.stages import STAGES
from transencoder.config.tools import DuplicatesArguments, SearchArguments
from transencoder.runtime.accelerator import log_next, progress_bar

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
ARGUMENTS = {name: stage.arguments for name, stage in STAGES.items()}
ARGUMENTS |= {"search": SearchArguments, "find_duplicates": DuplicatesArguments}


@pytest.fixture
def page(run_script, monkeypatch):
    """The page of --help, on a terminal a hundred characters wide."""
    monkeypatch.setenv("COLUMNS", "100")

    def show(script: str) -> str:
        result = run_script(script, "--help")
        assert result.returncode == 0 and not result.stderr
        return result.stdout

    return show


def entries(shown: str) -> dict[str, tuple[str, str]]:
    """Option -> the group that it stands in, and its text."""
    found, group, option = {}, "", ""
    for line in shown.splitlines():
        if title := re.fullmatch(r"(\S.*):", line):
            group, option = title[1], ""
        elif name := re.match(r"  (-{0,2}\w+)( \S+( \.\.\.)?)?(  +|$)", line):
            option = name[1]
            found[option] = (group, line[name.end() :])
        elif option and line.strip():
            found[option] = (group, f"{found[option][1]} {line.strip()}")
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_a_text_and_a_default_or_is_required(page, script):
    shown = page(script)
    assert shown.startswith(f"usage: {script} ")
    assert "\n\npython scripts/" in shown or "\n\naccelerate launch scripts/" in shown  # a line to copy
    assert max(map(len, shown.splitlines())) <= 120
    options = entries(shown)
    for name, (group, text) in options.items():
        assert len(text) > 5, name
        if name != "-h":
            assert group == "required" or "Default:" in text or re.search(r"\(default: .+\)$", text), (name, text)
    if script.removesuffix(".py") in ARGUMENTS:
        fields = dataclasses.fields(ARGUMENTS[script.removesuffix(".py")])
        assert set(options) == {"-h", *(f"--{field.name}" for field in fields)}


def test_options_stand_in_groups_with_what_is_required_first(page):
    options = entries(page("distill_bi2cross.py"))
    groups = list(dict.fromkeys(group for group, _ in options.values()))
    assert groups[:2] == ["required", "the cross-encoder"] and groups[-1] == "options"
    assert options["--output_dir"][0] == "required"
    assert options["--learning_rate"][0].startswith("training") and "(default: 2e-05)" in options["--learning_rate"][1]
    assert options["--push_to_hub"][0] == options["--hub_model_id"][0] == "the Hub"
    assert options["--seed"][0] == "general"


def test_a_hint_is_for_somebody_at_a_terminal_who_runs_a_stage_alone(monkeypatch, capsys):
    monkeypatch.delenv("TRANSENCODER_RUN", raising=False)
    log_next("a")
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log_next("a")
    assert capsys.readouterr().err == "next: a\n"
    monkeypatch.setenv("TRANSENCODER_RUN", "runs/mine")
    log_next("a")
    assert not capsys.readouterr().err


def test_a_bar_is_for_a_terminal_and_shows_rate_and_time_left(monkeypatch, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    bar = progress_bar(accelerator, 4, "Training")
    bar.update(2)
    bar.close()
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress_bar(accelerator, 4, "Training")
    bar.update(2)
    shown = bar.format_meter(**{**bar.format_dict, "elapsed": 4.0, "ncols": 80})
    bar.close()
    assert shown.startswith("Training:  50%|") and "| 2/4 [00:04<00:04,  2.00s/it]" in shown


def test_ctrl_c_is_one_line_wherever_it_comes():
    code = "import transencoder; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "-c: stopped by Ctrl-C\n" and done.returncode == -signal.SIGINT


HEAVY = "torch|accelerate|transformers|sentence_transformers|faiss|sklearn|datasets|numpy|pyarrow|pandas"


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_the_package_comes_first_in_a_script(path):
    """The package comes before what takes its time: it sets GOMP_SPINCOUNT, which PyTorch reads, and tells Ctrl-C."""
    imports = re.findall(rf"^(?:import|from) (transencoder|{HEAVY})\b", path.read_text(), re.MULTILINE)
    assert not imports or imports[0] == "transencoder", imports

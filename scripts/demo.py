#!/usr/bin/env python3
r"""Try models on a page: two sentences and their scores, and search in a file of sentences. Needs gradio.

python scripts/demo.py --run runs/quickstart --sentences examples/sentences.txt

or with models named one by one: --bi_encoder MODEL, --cross_encoder MODEL, --start MODEL. The page is served to this
machine alone (--host, --port) and loads nothing from any other; what is uploaded is deleted at the end.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.tools import DemoArguments, parse_tool
from transencoder.demo import check_packages, check_port, choose_models, keep_uploads_in, open_demo
from transencoder.errors import one_line_errors
from transencoder.runtime.accelerator import quiet_libraries


@one_line_errors
def main() -> None:
    arguments = parse_tool(DemoArguments, __doc__)
    quiet_libraries()
    choice = choose_models(arguments)
    check_port(arguments.host, arguments.port)
    check_packages()
    with tempfile.TemporaryDirectory(prefix="trans-encoder-") as folder:
        keep_uploads_in(Path(folder))
        demo = open_demo(arguments, choice)
        from transencoder.page import build_page, serve  # not before gradio is known to be there

        serve(build_page(demo), arguments.host, arguments.port)


if __name__ == "__main__":
    main()

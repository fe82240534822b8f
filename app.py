"""The front door: python app.py opens the workbench in a browser."""

import argparse
import os

# Read when torch is loaded. Without it, torch's threads spin while they wait for each other, and on
# a machine with anything else to do (a browser, say) that makes an answer twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from workbench.errors import WorkbenchError
from workbench.views.app import build_app, open_app


def main() -> None:
    """Read the command line, load the two models, open the page."""
    parser = argparse.ArgumentParser(
        description="A question, with a picture or without, to a teacher and its Mamba-2 hybrid."
    )
    parser.add_argument("--teacher", default="pocket", help="name, Hugging Face id or folder")
    parser.add_argument("--hybrid", help="name or folder; default: TEACHER-25")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the app to the network")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    chosen = parser.parse_args()
    # One core is the browser's: torch's threads wait for the slowest of them at every product.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    try:
        hybrid = chosen.hybrid or f"{chosen.teacher}-25"
        app = build_app(teacher=chosen.teacher, hybrid=hybrid, device=chosen.device)
        open_app(app, host=chosen.host, port=chosen.port)
    except WorkbenchError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()

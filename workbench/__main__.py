"""The workbench on the command line, for machines without a screen.

python -m workbench distill settings.json
accelerate launch -m workbench distill settings.toml
python -m workbench evaluate pocket-25 easy-vqa --limit 64
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

from workbench.data import load_data
from workbench.errors import WorkbenchError
from workbench.models.teacher import load
from workbench.steps.headless import distill_from, read_settings
from workbench.steps.quality.evaluation import evaluate
from workbench.steps.training.parallel import Processes, own_device


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 for what a user can set right."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except WorkbenchError as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2


def _distill(args: argparse.Namespace) -> int:
    settings = read_settings(args.settings)
    if args.folder:
        settings["folder"] = args.folder
    if args.resume:
        settings["resume"] = True
    # A cluster that takes the machine back sends this first: the run stops as after Ctrl-C.
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    first = Processes().rank == 0
    try:
        run = distill_from(
            settings,
            on_step=None if args.progress or not first else lambda row: print(row, flush=True),
            stop=asked.is_set,
            progress=args.progress and first,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    if first:
        print(run)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    target = Path(args.json).expanduser() if args.json else None
    if target and (target.is_dir() or not target.parent.is_dir()):  # said before hours of asking
        raise WorkbenchError(f"{target} cannot be written: name a file in a folder that is there.")
    data = load_data(
        args.data, split=args.split, limit=args.limit, seed=args.seed, images=args.images
    )
    vlm = load(args.name, device=args.device)
    found = evaluate(vlm, data, batch_size=args.batch_size)
    print(found)
    if target:
        target.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workbench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    train = commands.add_parser("distill", help="convert and train, from a file of settings")
    train.add_argument("settings", help="a .json or .toml file")
    train.add_argument("--folder", help="where the run is kept, instead of the file's")
    train.add_argument("--resume", action="store_true", help="go on from its last checkpoint")
    train.add_argument("--progress", action="store_true", help="a progress line instead of rows")
    train.set_defaults(run=_distill)
    score = commands.add_parser("evaluate", help="ask a model every question of a data set")
    score.add_argument("name", help="a model's name, folder or Hugging Face id")
    score.add_argument("data", help="pocket, easy-vqa, a .json file, or hub:NAME")
    score.add_argument("--split", default="test")
    score.add_argument("--limit", type=int)
    score.add_argument("--seed", type=int, default=0)
    score.add_argument("--images", help="the folder of a .json file's pictures")
    score.add_argument("--batch-size", type=int, default=16)
    score.add_argument("--device", default=own_device())
    score.add_argument("--json", help="file for the scores")
    score.set_defaults(run=_evaluate)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Distil the SmolLM2 hybrids from SmolLM2-135M-Instruct, one after the other.

    python -m benchmarks.smollm2.train_hybrids --corpus FOLDER --out FOLDER --batch 16
        --context 2048 --align 300 --method greedy --kernels torch 25:160 12.5:110 50:190

`--corpus` is what benchmarks.smollm2.corpus wrote. Made by the library's own verbs, align,
choose_layers, convert and distill, from the teacher alone: on packed text, and on chats whose
answers the teacher writes first. Saves each hybrid as a delta of eight bits with its curve, then
scores teacher and hybrids, read back from their deltas, on the held-out text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import workbench as wb
from benchmarks.smollm2.chats import write_chats
from benchmarks.smollm2.corpus import HELDOUT
from benchmarks.timing import steps_in, train_each
from workbench.data.text import TextBatches, TokenIds, encode_chats, load_texts, read_ids
from workbench.mamba import kernels
from workbench.models.delta import load_delta, save_delta
from workbench.models.hybrid import plan_of
from workbench.models.prompts import position_limit
from workbench.models.sources import smollm2
from workbench.steps.training.stages import RECIPES

WINDOW = 1024  # tokens, of perplexity
FEW = 8  # sequences that mixers are calibrated and layers are searched on


def on_gpu() -> bool:
    """Whether to train on a GPU; without one everything runs, slowly, on the CPU."""
    return torch.cuda.is_available()


def load_teacher(args: argparse.Namespace) -> wb.VLM:
    """The teacher, from `--gguf` or from wherever `wb.load_teacher` finds it."""
    device = "cuda" if on_gpu() else "cpu"
    if not args.gguf:
        return wb.load_teacher(args.teacher, device=device)
    model, tokenizer = smollm2.read_gguf(args.gguf)
    return wb.VLM(smollm2.TEACHER, model.to(device), tokenizer)


def chats_of(teacher: wb.VLM, args: argparse.Namespace) -> TokenIds:
    """The teacher's answers to the prompts, with those answers to be learnt."""
    prompts = json.loads((Path(args.corpus) / "prompts.json").read_text())[: args.prompts]
    start = time.perf_counter()
    pairs = write_chats(
        teacher, prompts, max_new_tokens=args.answer_tokens, batch_size=args.chat_batch,
        seed=args.seed,
    )  # fmt: skip
    tokens = encode_chats(teacher.tokenizer, pairs)
    n, seconds = int(tokens.is_answer.sum()), time.perf_counter() - start
    print(f"{len(pairs)} chats, {n:,} answer tokens, written in {seconds:.0f} s", flush=True)
    for asked, said in pairs[:3] + pairs[-3:]:
        print(f"  {asked!r}: {said[:160]!r}", flush=True)
    return tokens


class Mixture:
    """Endless batches in which some sequences are chats and the rest is text."""

    def __init__(self, text: TokenIds, chats: TokenIds | None, args: argparse.Namespace):
        n_chats = 0 if chats is None else round(args.chat_share * args.batch)
        common = {"context": args.context, "seed": args.seed}
        self.parts = [TextBatches(text, batch_size=args.batch - n_chats, **common)]
        if n_chats:
            self.parts.append(TextBatches(chats, batch_size=n_chats, **common))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for some in zip(*self.parts, strict=True):
            yield {name: torch.cat([part[name] for part in some]) for name in some[0]}


def distilled(
    student: wb.VLM, teacher: wb.VLM, data: Mixture, args: argparse.Namespace, **more
) -> wb.Run:
    """`wb.distill` with what every run here shares."""
    return wb.distill(
        student, teacher, data, lr=args.lr, seed=args.seed,
        compile_layers=on_gpu() and not args.eager, **more,
    )  # fmt: skip


def some_of(data: Mixture) -> Iterator[dict[str, torch.Tensor]]:
    """A few sequences of each batch, text and chats in their proportion."""
    for batch in data:
        n = len(batch["input_ids"])
        chosen = torch.linspace(0, n - 1, min(FEW, n)).round().long()
        yield {name: t[chosen] for name, t in batch.items()}


def aligned(teacher: wb.VLM, data: Mixture, args: argparse.Namespace) -> wb.VLM | None:
    """The donor of all hybrids: a mixer for every layer, to search with and to start from."""
    if not args.align:
        return None
    rows: list[wb.StepRow] = []
    donor = wb.align(
        teacher, data, steps=args.align, init=args.init, calibration=some_of(data), lr=args.lr,
        seed=args.seed, compile_layers=on_gpu() and not args.eager, on_step=rows.append,
    )  # fmt: skip
    print(f"aligned: {rows[-1]}", flush=True)
    curve = {"tokens": args.align * args.batch * args.context, "rows": [asdict(r) for r in rows]}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "align.json").write_text(json.dumps(curve, indent=1))
    return donor


def started(
    teacher: wb.VLM, plan: wb.Plan, percent: float, donor: wb.VLM | None, data: Mixture,
    args: argparse.Namespace,
) -> wb.VLM:  # fmt: skip
    """The student before training."""
    name = f"{teacher.name}-{percent:g}"  # as it is asked for: 12.5 % of 30 layers are 4, 13.3 %
    return wb.convert(
        teacher, plan, init=donor or args.init, calibration=some_of(data), seed=args.seed, name=name
    )


def train_hybrid(
    teacher: wb.VLM, donor: wb.VLM | None, percent: float, seconds: float, data: Mixture,
    args: argparse.Namespace,
) -> Path:  # fmt: skip
    """Place, convert, distil, save."""
    stages = RECIPES[args.recipe][-1:] if donor else RECIPES[args.recipe]  # it is aligned already
    plan = wb.choose_layers(
        teacher, ratio=percent / 100, method=args.method, donor=donor, data=some_of(data),
        limit=args.limit,
    )  # fmt: skip
    print(plan, flush=True)
    steps = args.steps or steps_in(
        seconds, stages, lambda: started(teacher, plan, percent, donor, data, args),
        lambda student, **how: distilled(student, teacher, data, args, **how),
    )  # fmt: skip
    student = started(teacher, plan, percent, donor, data, args)
    run = distilled(
        student, teacher, data, args, recipe=stages, steps=steps, log_every=args.log_every,
        on_step=lambda row: print(f"{percent} {row}", flush=True),
    )  # fmt: skip
    folder = Path(args.out) / f"hybrid-{percent:g}"
    save_delta(student.model, teacher.model, folder, dtype=torch.bfloat16, bits=8)
    hidden = ("out", "corpus", "gguf", "heldout")
    arguments = {name: value for name, value in vars(args).items() if name not in hidden}
    machine = torch.cuda.get_device_name() if on_gpu() else "CPU"
    curve = run.to_dict() | {"arguments": arguments, "machine": machine,
                             "tokens": steps * args.batch * args.context}  # fmt: skip
    (folder / "curve.json").write_text(json.dumps(curve, indent=1))
    print(run, flush=True)
    return folder


def score(teacher: wb.VLM, folders: list[Path], args: argparse.Namespace) -> None:
    """Print and keep the perplexity of the teacher and of the hybrids, read from their deltas."""
    texts = load_texts(args.heldout, limit=args.heldout_limit)
    window, results = min(WINDOW, position_limit(teacher)), []
    for folder in [None, *folders]:
        vlm = teacher
        if folder is not None:
            model = load_delta(teacher.model, folder)
            name = f"{smollm2.TEACHER}-{folder.name.removeprefix('hybrid-')}"
            vlm = wb.VLM(name, model, teacher.processor, plan_of(model))
        result = wb.perplexity(vlm, texts, context=window, batch_size=8 if on_gpu() else 1)
        print(result, flush=True)
        print(wb.answer(vlm, [], "What is the capital of France?", max_new_tokens=40), flush=True)
        results.append(result.to_dict())
    (Path(args.out) / "perplexity.json").write_text(json.dumps(results, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hybrids", nargs="+", help="percent:seconds, such as 25:300")
    parser.add_argument("--corpus", required=True, help="folder of tokens.npy and prompts.json")
    parser.add_argument("--out", required=True)
    parser.add_argument("--teacher", default=smollm2.TEACHER, help="name or folder of the teacher")
    parser.add_argument("--gguf", help="read the teacher from this file instead")
    parser.add_argument("--heldout", default=str(HELDOUT), help="folder of held-out texts")
    parser.add_argument("--heldout-limit", type=int, help="documents; all of them by default")
    parser.add_argument("--init", default="calibrated")
    parser.add_argument("--align", type=int, default=0, help="steps on all layers before the rest")
    parser.add_argument("--method", default="even", help="of placement, as in choose_layers")
    parser.add_argument("--limit", type=int, default=FEW, help="sequences of a search")
    parser.add_argument("--kernels", default="auto", help="of the scan; auto measures them first")
    parser.add_argument("--recipe", default="workbench")
    parser.add_argument("--steps", type=int, help="exactly so many, whatever the seconds")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--chat-share", type=float, default=0.125, help="of the sequences, 0 to 1")
    parser.add_argument("--prompts", type=int, default=2000, help="chats that the teacher writes")
    parser.add_argument("--answer-tokens", type=int, default=200, help="longest answer in a chat")
    parser.add_argument("--chat-batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = parsed()
    torch.set_float32_matmul_precision("high")
    # Every layer compiles on its own: with and without gradients, Mamba-2 or not.
    torch._dynamo.config.recompile_limit = 64
    kernels.use(args.kernels)
    start = time.perf_counter()
    teacher = load_teacher(args)
    print(f"{teacher}\nloaded in {time.perf_counter() - start:.0f} s", flush=True)
    text = read_ids(Path(args.corpus) / "tokens.npy", teacher.tokenizer.eos_token_id)
    chats = chats_of(teacher, args) if args.prompts and args.chat_share else None
    data = Mixture(text, chats, args)
    print(f"{len(text.ids):,} tokens of text in {len(text.starts):,} documents", flush=True)
    donor = aligned(teacher, data, args)
    folders, refused = train_each(
        args.hybrids,
        lambda percent, seconds: train_hybrid(teacher, donor, percent, seconds, data, args),
    )
    score(teacher, folders, args)
    if refused:
        raise SystemExit("\n".join(refused))


if __name__ == "__main__":
    main()

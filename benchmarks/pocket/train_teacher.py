"""Train the pocket teacher from scratch on a GPU: a TinyLLaVA in miniature.

    python -m benchmarks.pocket.train_teacher --processor FOLDER --out FOLDER --steps 10000

Regional compilation (one decoder layer, one vision layer), bf16 autocast, Muon on the matrices and
AdamW on the rest, linear warm-up and linear decay to zero. The run ends, fully decayed, after
`--steps` or after `--minutes`, whichever is first. Saves every `--save-minutes`; the curve goes to
OUT/curve.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from workbench.data.conversations import IGNORE, Encoder, TrainingBatches
from workbench.models.sources.pocket_model import pocket_config


def config_for(tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    """The pocket teacher's config with this tokenizer's ids."""
    return pocket_config(
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def image_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """(n, 3, 128, 128) uint8 to (n, 256, d_model): what LlavaModel does, without its host syncs."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.embeddings(pixels.float() / 127.5 - 1).to(torch.bfloat16)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    return model.model.multi_modal_projector(hidden)


def answer_logits(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits and labels at the positions whose next token belongs to an answer's text.

    Returns:
        logits (batch, text_tokens, vocab) and labels (batch, text_tokens), where `text_tokens`
        counts back from the end to the first position that is text in any row.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    features = image_features(model, batch["pixel_values"])
    text = model.get_input_embeddings()(ids).to(features.dtype)
    if len(features) == len(ids):  # a picture a row, always right after USER:
        after = 1 + features.shape[1]
        embeds = torch.cat((text[:, :1], features.to(text.dtype), text[:, after:]), dim=1)
    else:
        is_image = ids == model.config.image_token_id
        place = (is_image.flatten().cumsum(0) - 1).clamp(min=0).view_as(ids)
        seen = features.flatten(0, 1)[place].to(text.dtype)
        embeds = torch.where(is_image.unsqueeze(-1), seen, text)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    first = ids.shape[1] - batch["text_tokens"]
    return model.lm_head(hidden[:, first:-1]), labels[:, first + 1 :]


def answer_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over answer tokens; a token of an n-token answer row weighs 1 / sqrt(n)."""
    wanted = labels != IGNORE
    weight = wanted / wanted.sum(1, keepdim=True).clamp(min=1).sqrt()
    by_class = logits.float().transpose(1, 2)
    nats = F.cross_entropy(by_class, labels, ignore_index=IGNORE, reduction="none")
    right = ((logits.argmax(-1) == labels) & wanted).sum() / wanted.sum()
    return (nats * weight).sum() / weight.sum(), right


def make_optimizers(model: nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head, norms, biases, the patch conv."""
    hidden, rest, flat = [], [], []
    for name, p in model.named_parameters():
        inside = ".layers." in name or "projector" in name
        (hidden if p.ndim == 2 and inside else rest if p.ndim >= 2 else flat).append(p)
    adam = [{"params": rest, "weight_decay": 0.01}, {"params": flat, "weight_decay": 0.0}]
    if not muon:
        adam.append({"params": hidden, "weight_decay": 0.05})
        return [torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.95), fused=True)]
    return [
        torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.95), fused=True),
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]


def rate(step: int, progress: float, warmup: int = 200) -> float:
    """Linear warm-up, then linear decay to zero over the whole run; `progress` is in 0..1."""
    return min((step + 1) / warmup, max(0.0, 1 - progress))


def to_device(
    batches: Iterator[dict[str, Tensor]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Copy one batch ahead, so that the GPU never waits for a transfer."""
    ahead = None
    for batch in batches:
        here = {
            key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }
        if ahead is not None:
            yield ahead
        ahead = here


def compile_layers(model: LlavaForConditionalGeneration) -> None:
    """Compile one vision layer and one decoder layer; the others reuse the code."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    for layer in (*tower.encoder.layers, *model.model.language_model.layers):
        layer.forward = torch.compile(layer.forward, dynamic=False)


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    processor = AutoProcessor.from_pretrained(args.processor)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.init:
        model = LlavaForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = LlavaForConditionalGeneration(config_for(processor.tokenizer))
    model.to(device)
    if args.compile:
        compile_layers(model)
    optimizers = make_optimizers(model, args.lr, args.optimizer == "muon")
    data = TrainingBatches(Encoder(processor.tokenizer), args.batch, seed=args.seed)
    loader = DataLoader(
        data, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
    )  # fmt: skip
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    curve, start, saved = (out / "curve.jsonl").open("w"), time.time(), time.time()
    sums = torch.zeros(2, device=device)
    for step, batch in enumerate(to_device(iter(loader), device)):
        progress = max(step / args.steps, (time.time() - start) / (60 * args.minutes))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step, progress)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, labels = answer_logits(model, batch)
            loss, right = answer_loss(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums += torch.stack((loss.detach(), right))
        if (step + 1) % args.log_every == 0:
            loss_mean, right_mean = (sums / args.log_every).tolist()
            sums.zero_()
            seconds = time.time() - start
            row = {
                "step": step + 1,
                "loss": round(loss_mean, 4),
                "token_accuracy": round(right_mean, 4),
                "seconds": round(seconds, 1),
                "steps_per_s": round((step + 1) / seconds, 2),
            }
            print(json.dumps(row), file=curve, flush=True)
            print(row, flush=True)
        late = time.time() - start > 60 * args.minutes
        last = late or step + 1 == args.steps
        if last or time.time() - saved > 60 * args.save_minutes:
            saved = time.time()
            save(model, processor, out / "teacher")
        if last:
            break


def save(model: LlavaForConditionalGeneration, processor: ProcessorMixin, folder: Path) -> None:
    """Write a bf16 copy in shards of 15 MB; the model goes on in float32."""
    state = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size="15MB")
    processor.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processor", required=True, help="folder of the pocket processor")
    parser.add_argument("--out", required=True)
    parser.add_argument("--init", help="teacher folder to start from")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this long")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=512, help="pictures a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

"""Let a model answer many prompts at once, sampled or greedy: chats to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import workbench as wb
from workbench.models.generation import end_tokens
from workbench.models.prompts import build_prompt


def write_chats(
    teacher: wb.VLM,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 256,
    temperature: float = 0.8,
    greedy_share: float = 0.25,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """(prompt, answer) pairs in the teacher's own words; answers that are empty are left out.

    Args:
        teacher: a language model.
        prompts: what it is asked.
        max_new_tokens: where an answer is cut off.
        batch_size: prompts answered together.
        temperature: of the sampled answers.
        greedy_share: of the prompts is answered greedily, 0 to 1.
        seed: of the sampling.
    """
    torch.manual_seed(seed)
    n_greedy = round(greedy_share * len(prompts))
    answers = [
        *_answers(teacher, prompts[:n_greedy], max_new_tokens, batch_size, {"do_sample": False}),
        *_answers(
            teacher, prompts[n_greedy:], max_new_tokens, batch_size,
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95},
        ),
    ]  # fmt: skip
    return [(asked, said) for asked, said in zip(prompts, answers, strict=True) if said]


def _answers(
    teacher: wb.VLM, prompts: Sequence[str], max_new_tokens: int, batch_size: int, how: dict
) -> list[str]:
    tokenizer, said = teacher.tokenizer, []
    asked = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike ones share a batch
    for start in range(0, len(asked), batch_size):
        some = asked[start : start + batch_size]
        batch = tokenizer(
            [build_prompt(teacher, 0, prompts[i]) for i in some], add_special_tokens=False,
            padding=True, padding_side="left", return_tensors="pt",
        ).to(teacher.model.device)  # fmt: skip
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            tokens = teacher.model.generate(
                **batch, **how, max_new_tokens=max_new_tokens, num_beams=1,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=list(end_tokens(teacher)),
            )  # fmt: skip
        new = tokens[:, batch["input_ids"].shape[1] :].tolist()
        said += [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]
    in_order = dict(zip(asked, said, strict=True))
    return [in_order[i] for i in range(len(prompts))]

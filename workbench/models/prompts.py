"""From questions with their pictures to what a model reads: one left-padded batch."""

import inspect
from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.families import text_config
from workbench.models.teacher import VLM


def sees(vlm: VLM) -> bool:
    """Tell whether a model takes pictures, or reads text only."""
    return hasattr(vlm.processor, "image_processor")


def build_prompt(vlm: VLM, n_images: int, question: str) -> str:
    """Write the text that the model reads, with the chat template where the model has one.

    Args:
        vlm: the model that will be asked.
        n_images: pictures that stand before the question.
        question: in plain words.

    Raises:
        WorkbenchError: the question is empty, or a language model is given pictures.
    """
    if not isinstance(question, str) or not question.strip():
        raise WorkbenchError("The question is empty; ask something.")
    seeing = sees(vlm)
    if n_images and not seeing:
        raise WorkbenchError(f"{vlm.name} reads text only; ask it without pictures.")
    token = getattr(vlm.processor, "image_token", None) or "<image>"
    if seeing and token in question:
        raise WorkbenchError(
            f"The question contains {token!r}, which stands for a picture; leave it out."
        )
    written = f"{token}\n" * n_images + question
    if seeing and vlm.processor.chat_template:
        writer = vlm.processor
        written = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    elif vlm.tokenizer.chat_template:
        writer = vlm.tokenizer
    else:
        return f"USER: {written} ASSISTANT:"
    messages = [{"role": "user", "content": written}]
    return writer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def prepare_inputs(
    vlm: VLM,
    images: Sequence[Sequence[Image.Image]],
    questions: Sequence[str],
    max_new_tokens: int,
) -> dict[str, Tensor]:
    """Turn questions with their pictures into one left-padded batch on the model's device.

    Args:
        vlm: the model that will be asked.
        images: for each question, its pictures.
        questions: in plain words.
        max_new_tokens: checked only.

    Returns:
        What the model's forward takes: input_ids, attention_mask, pixel_values of the pictures,
        and the processor's token_type_ids, by which some let a picture's tokens see each other.

    Raises:
        WorkbenchError: as `stream_answer`.
    """
    if max_new_tokens < 1:
        raise WorkbenchError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    images = [_checked_images(some) for some in images]
    prompts = [
        build_prompt(vlm, len(some), question)
        for some, question in zip(images, questions, strict=True)
    ]
    options = {"padding_side": "left"}
    bos = vlm.tokenizer.bos_token
    if bos and prompts[0].startswith(bos):  # the template wrote it: the tokenizer must not again
        options["add_special_tokens"] = False
    inputs = what_it_reads(vlm, processed(vlm, images, text=prompts, **options))
    limit, length = position_limit(vlm), inputs["input_ids"].shape[1]
    if length >= limit:
        raise WorkbenchError(
            f"The question is too long: with its pictures it takes {length} tokens, and {vlm.name} "
            f"has {limit} positions for question and answer together."
        )
    return {
        name: t.to(vlm.model.device, vlm.model.dtype if t.is_floating_point() else None)
        for name, t in inputs.items()
    }


def processed(
    vlm: VLM, images: Sequence[Sequence[Image.Image]], **given: object
) -> Mapping[str, Tensor]:
    """What the processor makes of one padded batch.

    Args:
        vlm: whose processor it is.
        images: for each text, its pictures.
        given: what else the processor takes, `text` first of all.

    Returns:
        input_ids and attention_mask, each (batch, seqlen), and what the pictures became.

    Raises:
        WorkbenchError: a text has no picture, and the processor insists on one.
    """
    if reads_a_suffix(vlm) and not all(images):
        raise WorkbenchError(f"{vlm.name} reads no question without a picture: give one with each.")
    tokenizer = vlm.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    nothing_pads = tokenizer.pad_token is None
    if nothing_pads:  # masks hide padding: any token will do, but not for longer than this
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    pictures = {"images": images} if any(images) else {}
    try:
        return vlm.processor(**given, **pictures, padding=True, return_tensors="pt")
    finally:
        if nothing_pads:
            tokenizer.pad_token = None


def reads_a_suffix(vlm: VLM) -> bool:
    """Whether the processor wants what follows the question apart, as PaliGemma's does.

    All of its question sees itself: an answer that stood in the text would be seen beforehand.
    """
    return "suffix" in inspect.signature(type(vlm.processor).__call__).parameters


def what_it_reads(vlm: VLM, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what a processor made, the model's inputs.

    Tokenizers give token_type_ids to models, too, that have no use for them; Gemma 3 and PaliGemma
    read from them which tokens see what follows. Labels are what a processor takes for answers.
    """
    left_out = {"labels"}
    if "token_type_ids" not in inspect.signature(vlm.model.forward).parameters:
        left_out.add("token_type_ids")
    return {name: t for name, t in made.items() if isinstance(t, Tensor) and name not in left_out}


def position_limit(vlm: VLM) -> int:
    """Return how many tokens the model can see at most, question and answer together."""
    return text_config(vlm.model).max_position_embeddings


def _checked_images(images: Sequence[Image.Image]) -> list[Image.Image]:
    if isinstance(images, Image.Image):
        raise WorkbenchError("Images must be a list, even if there is only one: write [image].")
    for image in images:
        if not isinstance(image, Image.Image):
            raise WorkbenchError(f"Images must be PIL images, not {type(image).__name__}.")
    return list(images)

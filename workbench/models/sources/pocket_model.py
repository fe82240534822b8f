"""The pocket teacher's config and processor, for training and loading to agree on."""

from transformers import (
    LlavaConfig,
    LlavaProcessor,
    PhiConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

# "USER: <image>\n{question} ASSISTANT: {answer}</s>", with one "<image>\n" for each image.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def pocket_config(
    vocab_size: int,
    *,
    image_token_id: int,
    pad_token_id: int,
    bos_token_id: int,
    eos_token_id: int,
    image_size: int = 128,
    patch_size: int = 8,
    vision_layers: int = 6,
    text_layers: int = 16,
    width: int = 256,
) -> LlavaConfig:
    """Describe the pocket teacher: a SigLIP tower, a two-layer projector and a Phi decoder.

    Args:
        vocab_size: of the tokenizer, added tokens included.
        image_token_id: of "<image>".
        pad_token_id: of the padding token.
        bos_token_id: of the token at the start, if the tokenizer sets one.
        eos_token_id: of the token that ends an answer.
        image_size: side of the square picture, in pixels.
        patch_size: side of a patch, in pixels; (image_size / patch_size)^2 tokens an image.
        vision_layers: of the tower.
        text_layers: of the decoder.
        width: d_model of both; 4 heads and a feed-forward width of 4 * width.
    """
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    vision = SiglipVisionConfig(
        **shared,
        num_hidden_layers=vision_layers,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    text = PhiConfig(
        **shared,
        vocab_size=vocab_size,
        num_hidden_layers=text_layers,
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def build_pocket_processor(
    tokenizer: PreTrainedTokenizerBase, *, image_size: int = 128, patch_size: int = 8
) -> LlavaProcessor:
    """Join a tokenizer that knows "<image>" with picture processing that needs PIL only.

    A picture is resized (bicubic, antialiased) unless it has the right size already, and scaled to
    -1..1.

    Args:
        tokenizer: with the added token "<image>".
        image_size: side of the square that the tower takes, in pixels.
        patch_size: side of a patch, in pixels.
    """
    pictures = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )

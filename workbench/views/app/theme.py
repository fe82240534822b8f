"""Fonts and colours for Gradio's own components; what is ours stands in style.css."""

from pathlib import Path

import gradio as gr

STYLE = Path(__file__).with_name("style.css")

# Only fonts that are on the reader's machine: the page asks no other host for anything.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Return a quiet theme, light and dark, whose one accent is the blue of Mamba-2."""
    shades = (
        "#eff7fc #dbeefa #b5dcf4 #84c5eb #4ba9de #1f8dd0 #0b6fae #0a5a8d #0b4a73 #0c3d5f #08273e"
    )
    blue = gr.themes.Color(*shades.split(), name="blue")
    return gr.themes.Base(
        primary_hue=blue,
        neutral_hue="zinc",
        font=SANS,
        font_mono=MONO,
        radius_size="md",
    ).set(
        body_background_fill="#fbfbfa",
        body_background_fill_dark="#131416",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1b1d20",
        block_border_color="#e6e6e3",
        block_border_color_dark="#2d3035",
        block_shadow="none",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_weight="600",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1b1d20",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )

"""Plotly figures, one function a result, the same in the app and in the notebooks.

Teacher and hybrid keep their colours everywhere: a neutral grey and a blue, which people who
confuse red and green tell apart, and which stand out on a white page as on a dark one.
"""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from workbench.models.generation import Answer
from workbench.models.plan import Plan
from workbench.steps.efficiency.rows import Profile

TEACHER = "#8a8f98"
HYBRID = "#1f8dd0"
TEXT = "#7d828b"
GRID = "rgba(128,128,128,0.2)"
CONTINUED = 4
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def stack_figure(plan: Plan) -> go.Figure:
    """Draw the decoder as a row of cells, first layer to the left, Mamba-2 layers in blue.

    Args:
        plan: Which of `n_layers` layers are Mamba-2.
    """
    layers = list(range(plan.n_layers))
    kinds = ["Mamba-2" if layer in plan.mamba_layers else "attention" for layer in layers]
    figure = go.Figure()
    for kind, colour in (("attention", TEACHER), ("Mamba-2", HYBRID)):
        mine = [layer for layer in layers if kinds[layer] == kind]
        figure.add_bar(
            x=mine,
            y=[1] * len(mine),
            name=kind,
            marker_color=colour,
            width=0.9,
            hovertemplate=f"layer %{{x}}: {kind}<extra></extra>",
        )
    figure.update_layout(**_layout(height=140), bargap=0.1, barmode="overlay")
    figure.update_xaxes(title="decoder layer", tickvals=layers)
    figure.update_yaxes(visible=False)
    return figure


def cache_figure(
    answers: Mapping[str, Sequence[Answer]],
    *,
    continued: float = CONTINUED,
    longest: int | None = None,
) -> go.Figure:
    """Draw how the cache grows with the tokens, one line a model.

    Args:
        answers: The model's name to answers of growing length, such as those that `stream_answer`
            yielded; the teacher's first.
        continued: The lines go on, dotted, to so many times the longest of them.
        longest: But no further than that, such as where the models end.

    Returns:
        Cache in KiB (keys, values and states) against the tokens of prompt and answer: bold what
        was measured, dotted what it comes to at the same rate.
    """
    figure = go.Figure()
    reached = max(_length(stream[-1]) for stream in answers.values())
    end = max(reached, min(continued * reached, longest or float("inf")))
    for position, (name, stream) in enumerate(answers.items()):
        colour = HYBRID if position else TEACHER
        lengths = [_length(answer) for answer in stream]
        sizes = [answer.cache_bytes / 1024 for answer in stream]
        figure.add_scatter(
            x=lengths, y=sizes, name=name, mode="lines" if len(stream) > 1 else "markers",
            line=dict(color=colour, width=4), marker=dict(color=colour, size=8),
            hovertemplate=f"{name}: %{{y:,.0f}} KiB at %{{x}} tokens<extra></extra>",
        )  # fmt: skip
        if len(stream) > 1:
            rate = (sizes[-1] - sizes[0]) / (lengths[-1] - lengths[0])
            figure.add_scatter(
                x=[lengths[-1], end], y=[sizes[-1], sizes[-1] + rate * (end - lengths[-1])],
                mode="lines", line=dict(color=colour, width=1.5, dash="dot"), showlegend=False,
                hovertemplate=f"{name}, going on: %{{y:,.0f}} KiB at %{{x}} tokens<extra></extra>",
            )  # fmt: skip
    figure.update_layout(**_layout(height=230))
    title = "tokens of prompt and answer (dotted: at the same rate)"
    figure.update_xaxes(title=title, rangemode="tozero", tickformat=",d")
    figure.update_yaxes(title="cache, KiB", rangemode="tozero", tickformat=",d")
    return figure


def speed_figure(profile: Profile) -> go.Figure:
    """Draw tokens a second against the length of the prompt, a line a model.

    Args:
        profile: of several prompts; its first model is the teacher.

    Returns:
        What was measured, with the range of the rounds, and dotted the roof of the machine.
    """
    return _against_length(
        profile, "tokens a second",
        lambda row: (row.decode_tokens_per_s, row.decode_tokens_per_s_range),
        lambda row: row.decode_bound_tokens_per_s,
    )  # fmt: skip


def prefill_figure(profile: Profile) -> go.Figure:
    """Draw milliseconds of reading a prompt against its length; see `speed_figure`."""
    return _against_length(
        profile, "prefill, ms",
        lambda row: (row.prefill_ms, row.prefill_ms_range),
        lambda row: row.prefill_bound_ms,
    )  # fmt: skip


def _against_length(profile: Profile, title: str, measured, bound) -> go.Figure:
    figure = go.Figure()
    names = list(dict.fromkeys((row.model, row.batch_size) for row in profile.rows))
    for position, (model, batch) in enumerate(names):
        rows = [row for row in profile.rows if (row.model, row.batch_size) == (model, batch)]
        rows = sorted(
            (row for row in rows if measured(row)[0] is not None),
            key=lambda row: row.n_prompt_tokens,
        )
        colour = HYBRID if any(row.ratio for row in rows) else TEACHER
        name = model if batch == 1 else f"{model}, batch {batch}"
        lengths = [row.n_prompt_tokens for row in rows]
        values = [measured(row)[0] for row in rows]
        figure.add_scatter(
            x=lengths, y=values, name=name, mode="lines+markers",
            line=dict(color=colour, width=3), marker=dict(color=colour, size=8, symbol=position),
            error_y=dict(
                array=[measured(r)[1][1] - v for r, v in zip(rows, values, strict=True)],
                arrayminus=[v - measured(r)[1][0] for r, v in zip(rows, values, strict=True)],
            ),
            hovertemplate=f"{name}: %{{y:,.1f}} at %{{x}} tokens<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=lengths, y=[bound(row) for row in rows], mode="lines", showlegend=False,
            line=dict(color=colour, width=1.5, dash="dot"),
            hovertemplate=f"{name}, bound: %{{y:,.1f}} at %{{x}} tokens<extra></extra>",
        )  # fmt: skip
    figure.update_layout(**_layout(height=260))
    figure.update_xaxes(title="tokens of the prompt", rangemode="tozero", tickformat=",d")
    figure.update_yaxes(title=title, rangemode="tozero", tickformat=",d")
    return figure


def _length(answer: Answer) -> int:
    return answer.n_prompt_tokens + answer.n_new_tokens


def _layout(*, height: int) -> dict:
    """The theme that all figures share: no frame, no ground, a legend above."""
    return dict(
        height=height,
        margin=dict(l=8, r=8, t=32, b=8),
        font=dict(family=FONT, size=12, color=TEXT),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend=dict(orientation="h", x=0, y=1.02, yanchor="bottom"),
        hovermode="closest",
        xaxis=dict(showgrid=False, zeroline=False, automargin=True, title_font_size=12),
        yaxis=dict(gridcolor=GRID, zerolinecolor=GRID, automargin=True, title_font_size=12),
    )

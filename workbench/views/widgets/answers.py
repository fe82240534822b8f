"""Two answers side by side; the deeper a token's colour, the further apart the two models are."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

import ipywidgets

from workbench.data import Sample, load_data
from workbench.errors import WorkbenchError
from workbench.models.generation import answer
from workbench.models.teacher import VLM
from workbench.steps.quality.together import Token, read_together
from workbench.views.widgets.drawing import side_by_side, table
from workbench.views.widgets.panel import Panel, button, row

FULL_NATS = 2.0  # where the colour is deepest
DEEP = 0.8  # from this part of it on, black letters are clearer than a dark page's white ones


def answer_viewer(
    teacher: VLM, student: VLM, samples: Sequence[Sample] | None = None, *, max_new_tokens: int = 96
) -> "AnswerViewer":
    """Ask both models, and colour each token of both answers by KL(teacher || student) there.

    Both answers are read by both models, token by token. Where the colour first gets deep, they
    part; what follows in either answer is a consequence. The pointer on a token shows what each
    model expected.

    Args:
        teacher: one model.
        student: the other, with the same tokenizer.
        samples: pictures with questions to choose from; None takes a few of the workbench's own.
        max_new_tokens: of an answer, at most.

    Returns:
        A widget; `.ask()` does what the button does, `.value` has both answers token by token.

    Raises:
        WorkbenchError: there is no sample.
    """
    if samples is None:
        some = load_data("pocket", split="test", limit=24)
        samples = [s for s in some if s.family in ("describe", "chart", "grid")]
    if not samples:
        raise WorkbenchError("There is nothing to ask: give at least one sample.")
    return AnswerViewer(teacher, student, samples, max_new_tokens)


class AnswerViewer(Panel):
    """What `answer_viewer` returns."""

    def __init__(
        self, teacher: VLM, student: VLM, samples: Sequence[Sample], max_new_tokens: int
    ) -> None:
        super().__init__()
        self.models, self.samples, self.most = (teacher, student), list(samples), max_new_tokens
        self.answers: list[tuple[Token, ...]] = []
        names = [f"{i}: {s.family}" for i, s in enumerate(self.samples)]
        self.which = ipywidgets.Dropdown(options=list(zip(names, range(len(names)), strict=True)),
                                         description="picture")  # fmt: skip
        self.question = ipywidgets.Text(
            self.samples[0].question, description="question",
            layout=ipywidgets.Layout(flex="1 1 320px"),
        )  # fmt: skip
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="192px"))
        self.which.observe(lambda _: self._chosen(), "value")
        self.button = button("Ask both", self._ask_slowly, icon="comments", tip="Ask both models")
        self._chosen()
        self.build(row(self.which, self.question, self.button), self.image)
        self.ask()

    def _chosen(self) -> None:
        sample = self.samples[self.which.value]
        self.question.value = sample.question
        if sample.images:
            self.image.value = sample.images[0]._repr_png_()
        self.image.layout.display = "" if sample.images else "none"

    def ask(self) -> list[tuple[Token, ...]]:
        """Ask both models the question, and let both read both answers."""
        sample, question = self.samples[self.which.value], self.question.value
        asked = replace(sample, question=question, facts=None, more=())
        said = [
            answer(vlm, asked.images, asked.question, max_new_tokens=self.most).text
            for vlm in self.models
        ]
        both = [replace(asked, answer=text) for text in said]
        self.answers = list(read_together(*self.models, both))
        self.draw()
        return self.answers

    def _ask_slowly(self) -> None:
        def work() -> None:
            self.ask()
            self.say("")

        self.in_background(work, busy="Asking both …")

    @property
    def value(self) -> dict:
        """The question, and each answer token by token."""
        return {
            "question": self.question.value,
            "answers": {
                vlm.name: [t.to_dict() for t in tokens]
                for vlm, tokens in zip(self.models, self.answers, strict=False)
            },
        }

    def to_html(self) -> str:
        """Write both answers as coloured tokens, and the places where they part most."""
        if not self.answers:
            return ""
        parts = [
            f"<b>{escape(vlm.name)}</b><p style='line-height:1.9'>{_coloured(tokens)}</p>"
            f"<small>{_mean(tokens):.3f} nats a token</small>"
            for vlm, tokens in zip(self.models, self.answers, strict=True)
        ]
        worst = sorted(self.answers[0], key=lambda t: -t.kl_nats)[:5]
        rows = [
            [repr(t.text), f"{t.kl_nats:.3f}", f"{t.teacher!r} / {t.student!r}",
             f"{t.teacher_p:.0%} / {t.student_p:.0%}"]
            for t in worst
        ]  # fmt: skip
        head = ["in the teacher's answer", "KL, nats", "likeliest", "chance of this token"]
        return side_by_side(*parts) + table(head, rows)

    def __str__(self) -> str:
        return "\n".join(
            f"{vlm.name} ({_mean(tokens):.3f} nats a token): {''.join(t.text for t in tokens)}"
            for vlm, tokens in zip(self.models, self.answers, strict=False)
        )


def _coloured(tokens: Sequence[Token]) -> str:
    depths = [min(1, t.kl_nats / FULL_NATS) for t in tokens]
    return "".join(
        f'<span style="background:rgba(214,110,20,{0.85 * depth:.2f});'
        f'{"color:#111;" if depth > DEEP else ""}'
        f'border-radius:3px" title="{t.kl_nats:.3f} nats; teacher {escape(repr(t.teacher))}, '
        f'student {escape(repr(t.student))}">{escape(t.text)}</span>'
        for t, depth in zip(tokens, depths, strict=True)
    )


def _mean(tokens: Sequence[Token]) -> float:
    return sum(t.kl_nats for t in tokens) / max(1, len(tokens))

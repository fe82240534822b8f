"""Turn a pretrained vision-language model into a Mamba-2 hybrid, one visible step at a time.

    import workbench as wb

    teacher = wb.load_teacher("pocket")
    plan    = wb.choose_layers(teacher, ratio=0.25)
    student = wb.convert(teacher, plan)
    run     = wb.distill(student, teacher, wb.load_data("pocket", split="train"))
    report  = wb.compare(teacher, student, "pocket", limit=64)

The method is MaTVLM's (arXiv 2503.13440). Every verb takes what the one before returned.
"""

import os

# Threads of torch that wait must sleep, not spin: with more threads than free cores (a class on one
# server, a browser beside the app) spinning makes everything up to twenty times slower. OpenMP
# reads this once, so it stands before the first import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from workbench.data import Dataset, Sample, load_data
from workbench.errors import WorkbenchError
from workbench.models.generation import Answer, answer, stream_answer
from workbench.models.plan import Plan
from workbench.models.teacher import VLM, load, load_teacher, save
from workbench.steps.conversion.alignment import align
from workbench.steps.conversion.initialization import convert
from workbench.steps.conversion.scores import Scores, score_layers
from workbench.steps.conversion.selection import choose_layers
from workbench.steps.efficiency.profiling import Profile, profile
from workbench.steps.quality.comparison import Comparison, compare
from workbench.steps.quality.evaluation import Evaluation, evaluate
from workbench.steps.quality.fidelity import LayerFit, layer_fit
from workbench.steps.quality.perplexity import Perplexity, perplexity
from workbench.steps.training.answers import answers_of
from workbench.steps.training.distillation import Run, Stage, StepRow, distill
from workbench.steps.training.trackers import track

__all__ = [
    "VLM", "Answer", "Comparison", "Dataset", "Evaluation", "LayerFit", "Perplexity", "Plan",
    "Profile", "Run", "Sample", "Scores", "Stage", "StepRow", "WorkbenchError", "align", "answer",
    "answers_of", "choose_layers", "compare", "convert", "distill", "evaluate", "layer_fit", "load",
    "load_data", "load_teacher", "perplexity", "profile", "save", "score_layers", "stream_answer",
    "track",
]  # fmt: skip

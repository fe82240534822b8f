# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Distilling
#
# **The idea:** the student learns from the teacher's expectations, not from right answers. You
# will take the losses apart, run a distillation that you can pause and stop while it runs, break
# it off, and take it up again. Reading time: 50 minutes, of which two of computing.
#
# Everything here is small so that it is done in class: a handful of pictures, a dozen steps. What
# a proper run reaches is in the README's table.

# %%
import tempfile
import time
from pathlib import Path

import workbench as wb  # before torch, whose threads then sleep while they wait
import torch

from workbench.steps.quality.together import mean_kl
from workbench.steps.training.stages import RECIPES
from workbench.views.charts import bars_figure
from workbench.views.lessons import check, versions
from workbench.views.widgets import distill_dashboard

print(versions())

# %% [markdown]
# ## Two losses
#
# - **Layer loss.** Each Mamba-2 layer $f_i$ is fed what the *teacher's* layer was given, $h_i$, and
#   should give what that gave, $h_{i+1}$. The workbench divides by what the teacher's layer added:
#   $\lVert f_i(h_i) - h_{i+1} \rVert^2 / \lVert h_{i+1} - h_i \rVert^2$, so that 1 is a layer that
#   adds nothing, whatever its scale. MaTVLM takes $\lVert f_i(h_i) - h_{i+1} \rVert_2$
#   ([arXiv 2503.13440](https://arxiv.org/abs/2503.13440), section 3.3).
# - **KL.** What both expect as the next token, $\mathrm{KL}(p_T \,\Vert\, p_S) = \sum_v p_T(v)
#   \log \frac{p_T(v)}{p_S(v)}$, in nats, at each token of the answer (Hinton et al.,
#   [arXiv 1503.02531](https://arxiv.org/abs/1503.02531)).
#
# **Exercise 1.** Write `kl(p, q)` for two vectors of probabilities. Which of the two may be 0
# somewhere without harm?

# %% tags=["exercise"]
def kl(p, q):
    return ...  # your turn


# %% tags=["solution"]
def kl(p, q):
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


# %%
sure, unsure = torch.tensor([0.9, 0.05, 0.05]), torch.tensor([0.4, 0.3, 0.3])
check(
    "Exercise 1",
    (lambda: abs(kl(sure, sure)) < 1e-6, "between equal distributions it is 0."),
    (lambda: abs(kl(sure, unsure) - 0.5507) < 1e-3,
     "sum p * log(p / q) with the natural logarithm, weighted by p, not by q."),
    (lambda: torch.isfinite(kl(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))),
     "where p is 0, the term is 0: guard it, for 0 * log 0 is nan in floating point."),
)  # fmt: skip

# %% [markdown]
# ## A recipe is a list of stages
#
# A stage says what is minimised, what is trained, and how fast. The two recipes that have names:

# %%
for name, stages in RECIPES.items():
    print(name)
    for stage in stages:
        weights = {k: v for k, v in stage.to_dict().items() if k.endswith("weight") and v}
        print(f"   {stage.name:<8} {stage.steps:>3} steps, {weights}, trains {stage.trains}")

# %% [markdown]
# The workbench aligns every layer on its own first, which needs no logits and is robust, then
# trains the whole by KL, and by how far the final hidden states are from the teacher's: a share, 0
# where they agree, at every token and not only where an answer is given. That order is MOHAWK's
# ([arXiv 2408.10189](https://arxiv.org/abs/2408.10189)). Its KL has a *temperature* of 2: both
# models' logits are halved first, so that what the teacher holds likely beside its first choice
# weighs more ([arXiv 1503.02531](https://arxiv.org/abs/1503.02531)).
#
# **Exercise 2.** Make a recipe of two stages: `"align"`, 4 steps with a layer loss of weight 1
# that trains the mixers only, and `"distill"`, 8 steps with a KL of weight 1. Use `wb.Stage`.

# %% tags=["exercise"]
my_recipe = []  # your turn

# %% tags=["solution"]
my_recipe = [
    wb.Stage("align", 4, layer_weight=1.0, trains="mixers"),
    wb.Stage("distill", 8, kl_weight=1.0),
]

# %%
check(
    "Exercise 2",
    (lambda: len(my_recipe) == 2, "a list with two stages in it."),
    (lambda: [s.steps for s in my_recipe] == [4, 8], "4 steps, then 8."),
    (lambda: my_recipe[0].layer_weight == 1 and my_recipe[0].kl_weight == 0,
     "the first stage asks for the layer loss alone: layer_weight=1.0."),
    (lambda: my_recipe[0].trains == "mixers", "the first trains the mixers: trains='mixers'."),
    (lambda: my_recipe[1].kl_weight == 1 and my_recipe[1].layer_weight == 0,
     "the second stage asks for the KL alone: kl_weight=1.0."),
)  # fmt: skip

# %% [markdown]
# ## Start, pause, stop
#
# The student starts as the paper's does. It learns from four descriptions; two others, which it
# never sees in training, judge it. The dashboard trains in a thread: press **Start**, and go on
# reading, or running cells. **Pause** waits between two steps, **Stop** ends there, and what was
# learnt stays.

# %%
teacher = wb.load_teacher("pocket")
plan = wb.choose_layers(teacher, ratio=0.25)
judges = [s for s in wb.load_data("pocket", split="test", limit=32) if s.family == "describe"][:2]
lesson = [s for s in wb.load_data("pocket", split="train", limit=64) if s.family == "describe"][:4]

student = wb.convert(teacher, plan, init="matvlm")
before = mean_kl(teacher, student, judges)
recipe = [
    wb.Stage("align", 4, layer_weight=1.0, trains="mixers"),
    wb.Stage("distill", 8, kl_weight=1.0),
]
folder = Path(tempfile.mkdtemp()) / "run"
dashboard = distill_dashboard(
    student, teacher, lesson, recipe=recipe, batch_size=2, folder=folder, save_every=2
)
dashboard

# %% [markdown]
# What the buttons do, code does too. This cell starts the run, and stops it after six steps, as a
# power cut would, only more politely.

# %%
dashboard.start()
while dashboard.state == "running" and len(dashboard.rows) < 6:
    time.sleep(0.05)
dashboard.stop()
dashboard.wait()
broken_off = dashboard.run
print(broken_off)

# %% [markdown]
# Because it has a folder, a second start goes on where the first one ended, with the optimiser's
# memory and the order of the pictures. (So does `distill(..., folder=..., resume=True)`.)

# %%
dashboard.start()
dashboard.wait()
whole = dashboard.run
print(whole)
print(sorted(path.name for path in folder.iterdir()))

# %%
after = mean_kl(teacher, student, judges)
print(f"KL on the two judges: {before:.2f} before, {after:.2f} after {whole.steps} steps")
dashboard  # a second view of the same run

# %% [markdown]
# Look at the curves above. There are two, one a stage, and they are **not** comparable: one is a
# relative error, the other is in nats. Look at the bars, too: some layers are harder to imitate.
#
# ## Losses one by one
#
# The same student, the same pictures, six steps each: the layers alone, the KL alone, both at
# once as in the paper, and the right answers alone (cross-entropy, without any teacher).

# %%
ways = {
    "layers alone": dict(layer_weight=1.0),
    "KL alone": dict(kl_weight=1.0),
    "both": dict(layer_weight=1.0, kl_weight=1.0),
    "right answers alone": dict(ce_weight=1.0),
}
learnt = {"no training": before}
for name, weights in ways.items():
    fresh = wb.convert(teacher, plan, init="matvlm")
    wb.distill(fresh, teacher, lesson, recipe=[wb.Stage(name, 6, **weights)], batch_size=2)
    learnt[name] = mean_kl(teacher, fresh, judges)
bars_figure(learnt, x="KL on the two judges, nats a token", height=250)

# %% [markdown]
# Six steps decide nothing; with other pictures the order may change. In MaTVLM's ablation, after
# ten thousand steps, the average score is 55.6 with right answers alone, 60.7 with layers alone,
# 61.4 with the KL alone and 62.3 with both (teacher: 64.2).
#
# **Exercise 3.** Lesson 3 left a question open: are the matrices that the student takes over worth
# anything once it is trained? Train the control: the loop's way `"both"`, six steps, the same
# pictures, but from `init="random"`. What is its KL on the judges? Compare it with
# `learnt["both"]`, and say what you would have to do before you believe the answer.

# %% tags=["exercise"]
from_random = ...  # your turn: convert, distill and mean_kl, as in the loop above

# %% tags=["solution"]
control = wb.convert(teacher, plan, init="random")
both = wb.Stage("both", 6, **ways["both"])
wb.distill(control, teacher, lesson, recipe=[both], batch_size=2)
from_random = mean_kl(teacher, control, judges)
print(f"from random, after six steps: {from_random:.3f} nats a token")

# %%
untrained = mean_kl(teacher, wb.convert(teacher, plan, init="random"), judges)
print(f"taken over: {before:.2f} nats before, {learnt['both']:.2f} after six steps; "
      f"random: {untrained:.2f} before, and after six steps what you find")  # fmt: skip
check(
    "Exercise 3",
    (lambda: from_random > 0, "a number of nats: what mean_kl(...) gives."),
    (lambda: from_random not in learnt.values(), "this is the paper's start: say init='random'."),
    (lambda: from_random < 0.9 * untrained, "this student has not been trained: distill it first."),
)  # fmt: skip

# %% [markdown]
# ## What this lesson claimed

# %%
assert broken_off.stopped
assert broken_off.steps < 12
assert not whole.stopped
assert [row.step for row in whole.rows] == list(range(1, 13))
print("A run that was stopped goes on where it ended, and no step is done twice.")

stages = {name: [r for r in whole.rows if r.stage == name] for name in ("align", "distill")}
assert stages["align"][-1].layer_loss < stages["align"][0].layer_loss
assert stages["distill"][-1].kl_nats < stages["distill"][0].kl_nats
print("Each stage lowers what it is asked to lower.")

assert after < before
print("And two pictures that it never saw agree: the student came nearer to its teacher.")

# %% [markdown]
# **Go on**: start from `init="calibrated"` (lesson 3), or press *Start* on a dashboard with
# `wb.load_data("pocket", split="train")` and a few hundred steps, and have lunch. Next:
# [5 · Profiling](5_profiling.ipynb).

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
# # 3 · From attention to Mamba-2
#
# **The idea:** a new mixer can take over the matrices that attention already has, because they
# play the same parts. What attention has no counterpart for must start somehow, and that is where
# a student is lost or won before its first training step. You will switch the ingredients one by
# one and watch the distance to the teacher. Reading time: 45 minutes.
#
# The name for what we watch is **zero-shot KL**: what both models expect as the next token,
# before any training, $\mathrm{KL}(p_\mathrm{teacher} \,\Vert\, p_\mathrm{student})$ in nats a
# token.

# %%
import workbench as wb  # before torch, whose threads then sleep while they wait
import torch

from workbench.models.cache import CACHE
from workbench.models.families import decoder_layers
from workbench.models.hybrid import mixers
from workbench.steps.quality.together import mean_kl
from workbench.views.charts import bars_figure
from workbench.views.lessons import check, versions
from workbench.views.widgets import init_bench

print(versions())

# %% [markdown]
# ## Who plays what
#
# | attention | Mamba-2 | |
# | --- | --- | --- |
# | query projection $W_Q$ | C | how the state is read |
# | key projection $W_K$ | B | where a token is written |
# | value projection $W_V$ | x | what is written |
# | output projection $W_O$ | output | stays |
# | - | z, dt, conv1d, A, D, norm | **new** |
#
# The mapping is MaTVLM's ([arXiv 2503.13440](https://arxiv.org/abs/2503.13440), section 3.2); the
# idea is from *The Mamba in the Llama* ([arXiv 2408.15237](https://arxiv.org/abs/2408.15237)).
# Here nothing is even copied: the mixer keeps attention's own modules, under their own names.

# %%
teacher = wb.load_teacher("pocket")
plan = wb.choose_layers(teacher, ratio=0.25)
student = wb.convert(teacher, plan, init="matvlm")
layer = plan.mamba_layers[1]
mixer, attention = mixers(student.model)[layer], decoder_layers(teacher.model)[layer].self_attn
for name, parameter in mixer.named_parameters():
    taken = name in dict(attention.named_parameters())
    print(f"{'taken over' if taken else 'new       '}  {name:<16}{tuple(parameter.shape)}")

# %% [markdown]
# **Exercise 1.** Which four parameters of the attention does the paper's mixer **not** take over?
# Name them as PyTorch does, such as `"q_proj.weight"`.

# %% tags=["exercise"]
lost = {...}  # your turn, a set of four names

# %% tags=["solution"]
lost = set(dict(attention.named_parameters())) - set(dict(mixer.named_parameters()))

# %%
there, here = (set(dict(module.named_parameters())) for module in (attention, mixer))
check(
    "Exercise 1",
    (lambda: not lost & here, "one of yours is in the list above as taken over."),
    (lambda: lost <= there, "one of yours is no parameter of the attention: print(attention)."),
    (lambda: lost == there - here, "compare dict(attention.named_parameters()) with the list."),
)  # fmt: skip

# %% [markdown]
# ## Five things that are no longer what they were
#
# Attention computes $\mathrm{softmax}(C B^\top / \sqrt n)\, x$. The paper's mixer computes
#
# $$ y = \mathrm{norm}\big(\mathrm{silu}(z) \odot (\mathrm{SSD}(x', B', C') + D\,x')\big),
#    \qquad x', B', C' = \mathrm{silu}(\mathrm{conv}(x, B, C)) $$
#
# so that, at the start, (1) biases and rotary positions are gone, (2) a random convolution and a
# SiLU stand in the way of x, B and C, (3) a random gate multiplies the output, (4) a norm fixes
# its size, and (5) there is no softmax. How near is one layer's output to the attention's, on the
# same input? We measure the relative error: 0 is the same, 1 is as far as saying nothing.

# %%
pictures = wb.load_data("pocket", split="test", limit=32)
judges = [s for s in pictures if s.family == "describe"][:2]


def layer_errors(student):
    """Relative error of every mixer on what the teacher's layer is given."""
    errors, hooks = {}, []

    def compare(index, mixer):
        def hook(module, args, kwargs, output):
            got = mixer(*args, **kwargs | {CACHE: None})[0]
            errors[index] = float((got - output[0]).norm() / output[0].norm())

        return hook

    for index, mixer in mixers(student.model).items():
        attention = decoder_layers(teacher.model)[index].self_attn
        hooks.append(attention.register_forward_hook(compare(index, mixer), with_kwargs=True))
    sample = judges[0]
    wb.answer(teacher, sample.images, sample.question, max_new_tokens=1)
    for hook in hooks:
        hook.remove()
    return errors


for init in ("random", "matvlm", "linear"):
    errors = layer_errors(wb.convert(teacher, plan, init=init))
    print(f"{init:<8}", "  ".join(f"layer {i}: {e:8.2f}" for i, e in errors.items()))

# %% [markdown]
# `linear` keeps everything of attention but the softmax, exactly, and is the worst of all: what
# the softmax kept at a sum of 1 now grows with every token. **Exactness is not nearness.** Nobody
# should start there without a norm.
#
# ## The bench
#
# Choose a start, switch its parts, press *Measure*. Blue bars have a part switched; the answers
# of both models are compared on about a hundred tokens.

# %%
bench = init_bench(teacher, plan, samples=judges, inits=("random", "matvlm", "linear"))
bench

# %% [markdown]
# The same by code. First what the paper drops (biases, rotary positions), then the norm, then the
# gate.

# %%
kept = {"rope": True, "bias": True}
bench.measure("matvlm", **kept)
bench.measure("matvlm", norm=False)
bench.measure("matvlm", gate=False)
print(bench)

# %% [markdown]
# **Exercise 2.** Which single option brought the paper's start nearest to the teacher? Find it in
# `bench.value["rows"]`: the row with the lowest `kl_nats` among those with init `matvlm`.

# %% tags=["exercise"]
best_row = ...  # your turn, one of the rows

# %% tags=["solution"]
best_row = min(
    (r for r in bench.value["rows"] if r["init"] == "matvlm"), key=lambda r: r["kl_nats"]
)

# %%
check(
    "Exercise 2",
    (lambda: best_row["init"] == "matvlm", "a row is a dict; look at those with init 'matvlm'."),
    (lambda: all(best_row["kl_nats"] <= r["kl_nats"]
                 for r in bench.value["rows"] if r["init"] == "matvlm"),
     "there is a row of matvlm with a lower kl_nats."),
)  # fmt: skip

# %% [markdown]
# ## Fitting instead of guessing
#
# None of these starts has looked at the teacher **at work**. `calibrated`, the default, does, for a
# dozen sequences, and needs no gradient: for each head it tries several rates of
# forgetting, and for each it solves a least-squares problem, output of the mixer → output of the
# attention. The best rate stays; the map is folded into $W_O$
# (`workbench/steps/conversion/calibration.py`).
# LoLCATs calls a fit of this kind, there by gradient, attention transfer
# ([arXiv 2410.10254](https://arxiv.org/abs/2410.10254)).

# %%
calibrated = wb.convert(teacher, plan, init="calibrated")
errors = layer_errors(calibrated)
print("calibrated", "  ".join(f"layer {i}: {e:.2f}" for i, e in errors.items()))
rates = torch.exp(mixers(calibrated.model)[plan.mamba_layers[-1]].A_log)
print("forgetting per token, head by head:", [round(r, 4) for r in rates.tolist()])

# %% [markdown]
# **Exercise 3.** A head that forgets at the rate $r$ keeps $e^{-rt}$ of a token after $t$ more
# tokens. After how many tokens has the slowest of the heads above lost half?

# %% tags=["exercise"]
half_life = ...  # your turn, in tokens; `rates` is there

# %% tags=["solution"]
half_life = float(torch.log(torch.tensor(2.0)) / rates.min())

# %%
check(
    "Exercise 3",
    (lambda: half_life > 0, "a number of tokens, above 0."),
    (lambda: abs(torch.exp(-rates.max() * half_life) - 0.5) > 1e-3 or rates.max() == rates.min(),
     "this is the fastest head: the slowest has the smallest rate."),
    (lambda: abs(torch.exp(-rates.min() * half_life) - 0.5) < 1e-3,
     "solve exp(-r t) = 1/2 for t."),
)  # fmt: skip

# %%
kl = {
    (r["init"] + "".join(f", {k}={v}" for k, v in r["options"].items())): r["kl_nats"]
    for r in bench.value["rows"]
}
kl["calibrated"] = mean_kl(teacher, calibrated, judges)
shown = {name: value for name, value in kl.items() if name != "linear"}
bars_figure(shown, x="KL before training, nats a token", chosen=["calibrated"], height=280)

# %% [markdown]
# Now look at `random`, the control: every matrix drawn anew. On this small teacher it is about as
# far away as the paper's start, and no wonder: a random mixer says something small, and the
# layer's feed-forward part and all other layers go on as before. So the zero-shot KL of the
# paper's start measures mostly what its random parts spoil. That the taken-over matrices help,
# the paper claims of the **training** that follows; lesson 4 tests it, in its last exercise.
#
# ## What this lesson claimed

# %%
assert there - here == {f"{m}.bias" for m in ("q_proj", "k_proj", "v_proj", "dense")}
print("The paper's start loses attention's biases.")

assert kl["linear"] > 3 * kl["matvlm"]
print("Attention without softmax, exactly, is far from attention with it.")

assert kl["matvlm, norm=False"] < kl["matvlm"]
print("Parts of the paper's start that are new at random stand in its way.")

assert kl["calibrated"] < kl["matvlm"] / 10
assert max(errors.values()) < 1
print("A fit without a gradient leaves less than a tenth, and every layer beats saying nothing.")

# %% [markdown]
# **Go on**: `plan = wb.choose_layers(teacher, ratio=1)`. Does the order of the starts stay? Next:
# [4 · Distilling](4_distilling.ipynb).

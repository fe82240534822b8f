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
# # A tour of the workbench
#
# A vision-language model looks at pictures and answers questions about them.
# This workbench turns such a model, the **teacher**, into a **hybrid**: in some of its layers a
# Mamba-2 mixer takes the place of attention, and a short training, the distillation, teaches the
# new layers to do what the old ones did.
# The method is MaTVLM's ([arXiv 2503.13440](https://arxiv.org/abs/2503.13440)), and every step of
# it is one line that you can run, read and change.
#
# The tour takes a minute and a half on two CPU cores. Every figure below is measured while it runs.

# %%
import platform
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import workbench as wb  # before torch, whose threads then sleep while they wait
import torch
import transformers

from workbench.views.figures import cache_figure, stack_figure
from workbench.views.notebook import ask

device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"Python {platform.python_version()}, torch {torch.__version__}, "
      f"transformers {transformers.__version__}, device {device}")  # fmt: skip

# %% [markdown]
# ## A picture and a question
#
# Two of the models that come with the workbench: `pocket` is the teacher, a SigLIP tower that
# cuts a picture into 256 patches, a projector, and a Phi decoder of 16 layers, trained on
# generated graphics and small enough for a laptop. `pocket-25` is a hybrid of it that was
# distilled before: in 25 % of its decoder layers there is no attention. Both see this picture for
# the first time.

# %%
teacher = wb.load_teacher("pocket", device=device)
hybrid = wb.load("pocket-25", device=device)
print(teacher)
print(hybrid)

samples = wb.load_data("pocket", split="test")
sample = next(s for s in samples if s.family == "describe")
sample.images[0].resize((256, 256))

# %%
question = sample.question  # or your own, such as "Is there a brown star in the picture?"
streams = ask([teacher, hybrid], sample.images, question)

# %% [markdown]
# **Prefill** reads the prompt, picture included, at once; **decode** then writes one token after
# the other. So as not to read everything again for each new token, attention keeps the keys and
# values of all tokens so far: the **cache**. It grows with every token, in every layer that
# attends. A Mamba-2 layer keeps a *state* instead, whose size does not depend on how much it has
# read. To see that, we ask about one picture, two, three and four.

# %%
grown = {
    vlm.name: [wb.answer(vlm, n * sample.images, question, max_new_tokens=1) for n in (1, 2, 3, 4)]
    for vlm in (teacher, hybrid)
}
cache_figure(grown, continued=2)

# %% [markdown]
# Bold is measured; dotted is the same rate to where the pocket models end, at about 2,000 tokens.
# Now as numbers:

# %%
def kib_per_token(answers: list[wb.Answer]) -> float:
    """What one more token adds to the cache."""
    first, last = answers[0], answers[-1]
    n_bytes = last.cache_bytes - first.cache_bytes
    return n_bytes / (last.n_prompt_tokens - first.n_prompt_tokens) / 1024


rates = {name: kib_per_token(answers) for name, answers in grown.items()}
states_kib = grown["pocket-25"][0].ssm_bytes / 1024
print(f"pocket     {rates['pocket']:3.0f} KiB a token")
print(f"pocket-25  {rates['pocket-25']:3.0f} KiB a token, and {states_kib:.0f} KiB of states")
even = states_kib / (rates["pocket"] - rates["pocket-25"])
print(f"The hybrid's cache is the smaller one from token {int(even) + 1} on.")

# %% [markdown]
# You can check this by hand. A layer that attends keeps one key and one value of `d_model` = 256
# numbers for each token, 4 bytes each: 2 · 256 · 4 bytes = 2 KiB, times the number of layers that
# attend. The states are a fixed price, paid at the first token and soon won back.

# %% [markdown]
# ## What a hybrid is
#
# A layer that attends compares each token with all tokens before it. With the letters of the code,
# where query, key and value are $C_t$, $B_t$ and $x_t$:
#
# $$ y_t = \sum_{s \le t} \mathrm{softmax}_s\!\left(\frac{C_t^\top B_s}{\sqrt{n}}\right) x_s $$
#
# Mamba-2 leaves the softmax out, and lets what is long ago fade. Then the sum need not be done
# anew for each token: it fits into a state $S_t$ of `headdim` × `d_state` numbers a head that is
# carried along.
#
# $$ S_t = e^{\Delta_t A}\, S_{t-1} + \Delta_t\, x_t B_t^\top \qquad y_t = S_t\, C_t + D\, x_t $$
#
# $A < 0$ says how fast a head forgets, and the step $\Delta_t > 0$, which the code calls `dt`, how
# much it takes from this token. That both formulas are one family is the *state space duality*
# (Dao & Gu 2024, [arXiv 2405.21060](https://arxiv.org/abs/2405.21060), sections 3 to 5; here
# `workbench/mamba/ssd.py`). Attention remembers every token exactly; a state is a summary. So a
# hybrid keeps both.
#
# Which layers change is a **plan**. MaTVLM spreads them evenly from layer 0 on (section 4.1). Where
# they stand matters: in its ablation, a student with all of them at the end of the stack did not
# learn to answer.

# %%
plan = wb.choose_layers(teacher, ratio=0.25)
print(plan)

# %%
stack_figure(plan)

# %% [markdown]
# ## From teacher to student
#
# Now you make a hybrid of your own. `convert` copies the teacher and swaps the planned layers. The
# new mixers do not start from nothing: $C \leftarrow W_Q$, $B \leftarrow W_K$, $x \leftarrow W_V$,
# and the output projection stays (section 3.2; the idea is from
# [arXiv 2408.15237](https://arxiv.org/abs/2408.15237)). What attention has no counterpart for
# starts at random: the gate `z`, the step `dt`, a short convolution and the decay `A`.
#
# To see later that nobody touched the teacher, we keep a copy of its weights.

# %%
teacher_before = {name: t.clone() for name, t in teacher.model.state_dict().items()}
student = wb.convert(teacher, plan, init="matvlm")
student = replace(student, name="student")  # its own name would be pocket-25, which is taken
print(student)
print(wb.answer(student, sample.images, question))

# %% [markdown]
# Words, but not what the picture shows: the layers that still attend hear from the new ones what
# they never heard before. How often does the student say what the teacher says? We ask both a few
# new questions, each about one picture, with short answers.

# %%
short = [s for s in samples[:32] if len(s.images) == 1 and s.family != "describe"][:8]
converted = wb.compare(teacher, student, short)
print(converted)

# %% [markdown]
# ## Distillation
#
# The student learns from the teacher, not from right answers (section 3.3). Two losses, added:
#
# - **layer loss**: each Mamba-2 layer $f_i$ is fed the *teacher's* hidden state $h_i$, and should
#   give what the teacher's layer gave: the mean of
#   $\lVert f_i(h_i) - h_{i+1} \rVert_2 / \sqrt{d_\mathrm{model}}$ over layers and tokens;
# - **KL**: what both models expect as the next token, at each token of the answer:
#   $\mathrm{KL}(p_\mathrm{teacher} \,\Vert\, p_\mathrm{student})$ in nats.
#
# Mixers and projector train; all else is frozen. Here: four pictures, seen four times. A line is
# one pass over all four.

# %%
pictures = wb.load_data("pocket", split="train")
lesson = [s for s in pictures[:16] if len(s.images) == 1][:4]
run = wb.distill(
    student, teacher, lesson, recipe="matvlm", steps=8, batch_size=2, log_every=2,
    on_step=lambda row: print(f"step {row.step}: layer loss {row.layer_loss:.3f}, "
                              f"KL {row.kl_nats:.3f} nats a token, {row.seconds:.0f} s"),
)  # fmt: skip
print(run)

# %% [markdown]
# ## What did it learn?
#
# The same picture once more, which was not among the four. Beside your student, which has seen
# four pictures, stands `pocket-25`: as many Mamba-2 layers, but where a search put them (lesson 2),
# with a start fitted to the teacher (lesson 3) and 4,000 pictures (`benchmarks/README.md`).

# %%
after = ask([teacher, student, hybrid], sample.images, question)

# %% [markdown]
# A low KL on four pictures proves little, for they can be learnt by heart; one picture proves
# nothing. So ask all the questions from above again.

# %%
distilled = wb.compare(teacher, student, short)
trained = wb.compare(teacher, hybrid, short)
print(f"Same words as the teacher on {len(short)} new questions:")
print(f"  student, just converted  {converted.agreement:6.1%}")
print(f"  student, distilled       {distilled.agreement:6.1%}")
print(f"  pocket-25                {trained.agreement:6.1%}")

# %% [markdown]
# If yours agrees less than before: one question is an eighth of the figure, and eight steps on four
# pictures teach little but those four. More pictures and steps are lesson 4.
#
# And a benchmark that somebody else made: easy-VQA, coloured shapes with questions, exact match. A
# few questions say little: ± is one standard error, and where it is 0, all answers were alike.

# %%
for vlm in (teacher, student, hybrid):
    print(wb.evaluate(vlm, "easy-vqa", limit=8))

# %% [markdown]
# ## Speed and memory
#
# `profile` runs both models in the same loop on the same prompts, in turns: one picture, then four.
# At this size Mamba-2 saves memory, not time: a token costs many small steps of arithmetic here,
# and reading the cache is not the slow one. Nor should you expect the 3.6 times of the paper: in
# the authors' benchmark script the hybrid runs in an engine of its own, with CUDA graphs, and the
# teacher in `generate`. Times jump about when the machine has other things to do; the bytes do not.

# %%
four = replace(sample, images=4 * sample.images)
speed = wb.profile([teacher, hybrid], [sample, four], repeats=2, max_new_tokens=16)
print(speed)

# %% [markdown]
# ## Save, and load again
#
# A hybrid is an ordinary Hugging Face model: what follows is transformers' own code, and all it
# needs is that `workbench` has been imported, which registers the class.

# %%
transformers.utils.logging.disable_progress_bar()

with tempfile.TemporaryDirectory() as folder:
    wb.save(student, folder)
    for file in sorted(Path(folder).iterdir()):
        print(f"{file.stat().st_size / 1e3:10,.1f} kB  {file.name}")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).to(device)
    processor = transformers.AutoProcessor.from_pretrained(folder)

content = [{"type": "image"}, {"type": "text", "text": question}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
inputs = processor(text=prompt, images=sample.images[0], return_tensors="pt").to(device)
tokens = model.generate(**inputs, max_new_tokens=128, do_sample=False)
reloaded = processor.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
print(f"\n{type(model).__name__} answers:\n{textwrap.fill(reloaded.strip(), 90)}")

# %% [markdown]
# ## What the tour claimed
#
# Each sentence below is checked; if one were wrong, this cell would stop.

# %%
attending = plan.n_layers - len(plan.mamba_layers)
kib_per_layer = 2 * 256 * 4 / 1024
assert rates == {"pocket": plan.n_layers * kib_per_layer, "pocket-25": attending * kib_per_layer}
print("The cache grows by 2 KiB a token for each layer that attends; Mamba-2 layers add nothing.")

mine, theirs = streams["pocket-25"][-1], streams["pocket"][-1]
assert mine.cache_bytes < theirs.cache_bytes
assert mine.weight_bytes > theirs.weight_bytes
print("The hybrid's cache is smaller, its weights are a little larger.")

now = teacher.model.state_dict()
assert all(torch.equal(tensor, now[name]) for name, tensor in teacher_before.items())
print("The teacher is untouched, bit by bit.")

assert run.rows[-1].kl_nats < run.rows[0].kl_nats
assert run.rows[-1].layer_loss < run.rows[0].layer_loss
print("Distillation lowered both losses.")

assert trained.agreement > distilled.agreement
print("A hybrid with a training of proper length speaks like the teacher; eight steps do not.")

assert reloaded.strip() == wb.answer(student, sample.images, question).text
print("Loaded again, the student gives the same answer.")

# %% [markdown]
# ## Where to go from here
#
# The whole tour, on a blackboard:
#
# ```python
# import workbench as wb
#
# teacher = wb.load_teacher("pocket")
# plan    = wb.choose_layers(teacher, ratio=0.25)
# student = wb.convert(teacher, plan)
# run     = wb.distill(student, teacher, wb.load_data("pocket", split="train"))
# speed   = wb.profile([teacher, student])
# report  = wb.compare(teacher, student, "pocket", limit=64)
# scores  = wb.evaluate(student, "easy-vqa")
# wb.save(student, "my-hybrid")
# ```
#
# Go back and change something: another `ratio`, `init="random"` in `convert` (is the teacher's
# start worth anything?), more `steps`, or your own picture with `PIL.Image.open`. The pocket models
# know drawings, flags, printed words, shapes and bar charts, not photographs: for those, give
# `load_teacher` the name of a larger model.

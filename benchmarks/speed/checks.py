"""Do the kernels compute what the naive recurrence does, and the modes say what `generate` does?"""

import torch

from benchmarks.speed.models import TINY, hybrid, llama, phi
from workbench.mamba import kernels, ssd
from workbench.models.cache import CACHE
from workbench.models.engine import MODES, Engine
from workbench.models.engine.decoder import read_decoder
from workbench.models.engine.decoding import State, step
from workbench.models.engine.operations import Operations
from workbench.models.engine.triton_operations import TritonOperations

# Relative error ||out - ref|| / ||ref||: float32 products may run as tf32, bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 3e-2}
NAMES = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dinitial")


def kernels_against_recurrence(notes, device) -> None:
    """Forward, state and all gradients of every scan, for two head sizes and three lengths."""
    for name, reason in kernels.missing().items():
        notes.add("checks", what=f"kernels {name}", result=f"missing: {reason}")
    for name in kernels.available():
        for dtype in (torch.float32, torch.bfloat16):
            for headdim in (64, 80):
                for length in (1, 3, 500):
                    for padded in (False, True):
                        if notes.left() < notes.reserve:
                            return
                        _compare(notes, device, name, dtype, headdim, length, padded)


def _compare(notes, device, name, dtype, headdim, length, padded) -> None:
    what = f"ssd {name} {str(dtype)[6:]} p={headdim} l={length}{' padded' if padded else ''}"
    torch.manual_seed(length)
    b, h = 2, 4
    x, B, C = (torch.randn(b, length, h, headdim, device=device) for _ in range(3))
    B, C = B / headdim**0.5, C / headdim**0.5
    dt = torch.rand(b, length, h, device=device) * 0.2
    if padded:
        dt[1, : length // 2] = 0
    A, first = -torch.rand(h, device=device) * 4, torch.randn(b, h, headdim, headdim, device=device)
    rounded = [t.to(dtype) for t in (x, B, C)]
    try:
        given = (rounded[0], dt, A, *rounded[1:], first)
        with kernels.use(name):
            found, refusal = _all(kernels.ssd, *given)
        exact, _ = _all(ssd.ssd_recurrent, *(t.double() for t in given))
        worst = {
            n: float((f.double() - e).norm() / e.norm().clamp(min=1e-12))
            for n, f, e in zip(NAMES, found, exact, strict=False)
        }
    except Exception as error:
        notes.add("checks", what=what, result=f"{type(error).__name__}: {str(error)[:200]}")
        return
    bad = {n: f"{e:.1e}" for n, e in worst.items() if not e <= TOLERANCE[dtype]}
    result = f"WRONG {bad}" if bad else f"no gradients: {refusal}"[:200] if refusal else "ok"
    notes.add("checks", what=what, result=result, error=max(worst.values()))


def _all(scan, x, dt, A, B, C, first):
    """Output, state and gradients; or the first two, and why a kernel refuses the rest."""
    inputs = [t.detach().requires_grad_() for t in (x, dt, A, B, C, first)]
    y, state = scan(*inputs[:5], initial_state=inputs[5])
    weights = torch.linspace(0.5, 1.5, y.shape[-1], device=y.device, dtype=torch.float64)
    loss = (y.double() * weights).sum() + (state.double() * weights).sum()
    forward = [y.detach(), state.detach()]
    try:
        return [*forward, *torch.autograd.grad(loss, inputs)], None
    except RuntimeError as error:
        return forward, error


def convolution(notes, device) -> None:
    """causal_conv1d beside shifted products, output, state and gradients, and one update."""
    for dtype in (torch.float32, torch.bfloat16):
        for length, taps in ((1, 4), (3, 4), (500, 4), (500, 2), (500, 1)):
            torch.manual_seed(0)
            x = torch.randn(2, length, 480, device=device).to(dtype)
            w, bias = torch.randn(480, taps, device=device), torch.randn(480, device=device)
            w, bias = w.to(dtype), bias.to(dtype)
            past = torch.randn(2, 480, taps - 1, device=device).to(dtype)
            results = []
            for name in ("torch", "auto"):
                inputs = [t.detach().requires_grad_() for t in (x, w, bias)]
                with kernels.use(name):
                    y, state = kernels.causal_conv1d(*inputs, state=past)
                    with torch.no_grad():
                        again = kernels.causal_conv1d(x[:, :1], w, bias, state=past)[0]
                grads = torch.autograd.grad(y.float().pow(2).sum(), inputs)
                results.append([y, state, again, *grads])
            errors = [
                float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9))
                for a, b in zip(*results, strict=True)
            ]
            fine = max(errors) <= TOLERANCE[dtype]
            what = f"conv {str(dtype)[6:]} l={length} taps={taps}"
            notes.add("checks", what=what, result="ok" if fine else "WRONG", error=max(errors))


def step_kernels(notes, device) -> None:
    """The Triton step beside the plain one, float32: logits of several tokens, for both kinds."""
    for make, name in ((phi, "phi"), (llama, "llama")):
        teacher = make(TINY, str(device), torch.float32, name)
        for ratio in (0, 0.5, 1):
            for options in ({}, {"rope": True, "bias": True}) if ratio else ({},):
                vlm = hybrid(teacher, ratio, **options)
                for start in ([0], [0, 3]):
                    error = _step_error(vlm, device, start)
                    notes.add(
                        "checks",
                        what=f"step {vlm.name} {options or ''} rows={len(start)}",
                        result="ok" if error <= TOLERANCE[torch.float32] else "WRONG",
                        error=error,
                    )


@torch.no_grad()
def _step_error(vlm, device, start) -> float:
    logits = []
    for operations in (Operations(by_place=True), None):
        decoder = read_decoder(vlm.model)
        operations = operations or TritonOperations(decoder)
        state = State(decoder, len(start), 300, vlm.plan.mamba_layers if vlm.plan else ())
        torch.manual_seed(1)
        ids = torch.randint(3, 500, (len(start), 150), device=device)
        begin = torch.tensor(start, device=device)
        mask = (torch.arange(150, device=device) >= begin[:, None]).long()
        state.begin(begin)
        vlm.model(
            input_ids=ids, attention_mask=mask if state.padded else None,
            **{CACHE: state.cache}, use_cache=True,
        )  # fmt: skip
        state.follow(150)
        rows = []
        for i in range(8):
            state.token.copy_(ids[:, i])
            rows.append(step(decoder, state, operations))
            state.length += 1
        logits.append(torch.stack(rows).double())
    return float((logits[1] - logits[0]).norm() / logits[0].norm())


def modes_against_generate(notes, device) -> None:
    """Greedy tokens of every mode, one question and a padded batch, for teacher and hybrid."""
    teacher = phi(TINY, str(device), torch.float32, "phi")
    with torch.no_grad():
        for p in teacher.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for ratio in (0, 0.5, 1):
        vlm = hybrid(teacher, ratio)
        for padding in ([0], [0, 5]):
            torch.manual_seed(2)
            ids = torch.randint(3, 500, (len(padding), 40), device=device)
            begin = torch.tensor(padding, device=device)
            mask = (torch.arange(40, device=device) >= begin[:, None]).long()
            inputs = {"input_ids": ids, "attention_mask": mask}
            expected = vlm.model.generate(
                **inputs, do_sample=False, max_new_tokens=20, pad_token_id=0
            )[:, 40:]
            for mode in MODES:
                what = f"{mode} {vlm.name} rows={len(padding)}"
                try:
                    engine = Engine(vlm, mode, max_length=80, batch_size=len(padding))
                    engine.prefill(inputs, max_new_tokens=20)
                    said = [engine.token.clone()]
                    for _ in range(19):
                        engine.step()
                        said.append(engine.token.clone())
                    same = torch.equal(torch.stack(said, 1), expected)
                    result = "ok" if same else "OTHER TOKENS"
                    notes.add("checks", what=what, result=result, warm_up_ms=engine.warm_up_ms)
                except Exception as error:
                    result = f"{type(error).__name__}: {str(error)[:200]}"
                    notes.add("checks", what=what, result=result)


SHORT = (step_kernels, modes_against_generate, convolution)
LONG = (kernels_against_recurrence,)

"""The Triton kernels of decoding against plain torch: on a GPU, or interpreted on a CPU.

Without a GPU they run, slowly, with TRITON_INTERPRET=1 in the environment, if Triton is there.
"""

import importlib.util
import os

import pytest
import tiny
import torch
from test_engine import endless, words

from workbench.models.engine.decoder import read_decoder
from workbench.models.engine.decoding import State, step
from workbench.models.engine.operations import Operations

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (GPU or INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
OPTIONS = {
    "paper": {},
    "warm": {"rope": True, "bias": True, "scale": "attention"},
    "bare": {"gate": False, "norm": False, "conv_activation": None, "d_conv": 2},
    "wide norm": {"norm_group_size": 48},
    "no taps": {"d_conv": 1},
}


def run(vlm, operations, batch, start, n=5):
    decoder = read_decoder(vlm.model)
    state = State(decoder, batch, 40, vlm.plan.mamba_layers if vlm.plan else ())
    ids = tiny.token_ids(batch, 7).to(DEVICE)
    start = torch.tensor(start, device=DEVICE)
    mask = (torch.arange(7, device=DEVICE) >= start[:, None]).long()
    logits = []
    with torch.no_grad():
        state.begin(start)
        vlm.model(
            input_ids=ids, attention_mask=mask if state.padded else None,
            past_key_values=state.cache, use_cache=True,
        )  # fmt: skip
        state.follow(7)
        for i in range(n):
            state.token.copy_(ids[:, i])
            logits.append(step(decoder, state, operations(decoder)))
            state.length += 1
    states = [
        t.clone()
        for slot in state.cache.layers
        for t in (
            (slot.keys, slot.values)
            if slot.keys is not None
            else (slot.conv_states[0], slot.recurrent_states[0])
        )
    ]
    return torch.stack(logits), states


def both(vlm, batch, start):
    from workbench.models.engine.triton_operations import TritonOperations

    vlm.model.to(DEVICE)
    expected, states = run(vlm, lambda _: Operations(), batch, start)
    logits, others = run(vlm, TritonOperations, batch, start)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    for one, other in zip(others, states, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch, start", [(1, [0]), (2, [0, 3])], ids=["one", "padded"])
def test_a_step_of_phi(options, batch, start):
    both(endless(tiny.vlm((0, 2), options)), batch, start)


@pytest.mark.parametrize("family", ["llama", "phi-norms"])
@pytest.mark.parametrize("batch, start", [(1, [0]), (2, [0, 3])], ids=["one", "padded"])
def test_a_step_of_other_families(family, batch, start):
    vlm = words(family, (1, 2), rope=True)
    both(vlm, batch, start)

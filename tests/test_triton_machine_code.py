"""The scan's kernels, compiled for Hopper without a GPU: no register is read before it is written.

ptxas 12.8, which Triton 3.6 brings, has got addresses of tiles in shared memory from such registers
(`workbench.mamba.triton_scan_kernels` says when). What Triton interprets or writes as PTX is right
then, so that only the machine code tells.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

DISASSEMBLER = "backends/nvidia/bin/nvdisasm"
FOUND = find_spec("triton")
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WIDTHS = {"128": 4, "64": 2, "WIDE": 2, "CS2R": 2}  # registers that are written at once
IGNORED = ("PRMT", "LOP3", "P2R")  # put a register together from parts, one after the other


@pytest.mark.skipif(
    FOUND is None or not (Path(FOUND.origin).parent / DISASSEMBLER).is_file(),
    reason="needs Triton for NVIDIA's GPUs",
)
@pytest.mark.parametrize("in_mixer", [0, 1], ids=["scan", "mixer"])
def test_no_register_is_read_before_it_is_written(in_mixer):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(in_mixer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "states_kernel" in done.stdout
    assert "scan_kernel" in done.stdout
    assert "unwritten" not in done.stdout, done.stdout


def described(operands):
    """Name registers with the addresses of a product: of both tiles, or if it is third, of one."""
    for place, operand in enumerate(operands):
        if found := re.match(r"gdesc\[UR(\d+)\]", operand):
            yield from (f"UR{int(found[1]) + k}" for k in range(2 if place == 2 else 0, 4))


def unwritten(code):
    """Name registers that instructions read though none above them has written any."""
    known = {"RZ", "URZ", "R1"}
    for line in code.splitlines():
        found = re.match(
            r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?)\s*;", line
        )
        if not found or found[1] == "NOP":
            continue
        op, operands = found[1], [o.strip() for o in found[2].split(",")]
        stores = op.startswith(("ST", "LDGSTS", "BRA", "ISETP", "UISETP", "FSETP", "PLOP3"))
        while not stores and re.match(r"U?P(\d|T)$", operands[0]):
            operands.pop(0)
        target = None if stores else re.match(r"(U?R)(\d+)$", operands[0])
        read = operands[1:] if target else operands
        names = () if op.startswith(IGNORED) else re.findall(r"\bU?R\d+\b", " ".join(read))
        if op.startswith("HGMMA"):
            names = described(operands)
        for name in names:
            if name not in known:
                yield f"{name} in {found[0].strip()}"
        if target:
            n = max([WIDTHS[w] for w in WIDTHS if w in op.split(".")] or [1])
            if op.startswith("HGMMA"):
                n = int(re.search(r"64x(\d+)x", op)[1]) // 2
            elif op.startswith(("HMMA", "LDSM")):
                n = 4
            known.update(f"{target[1]}{int(target[2]) + k}" for k in range(n))


class Compiled:
    """Stands for a kernel: compiles it for the arguments of a launch, and launches nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **named):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | named
        signature, constants, hints = {}, {}, {}
        for i, name in enumerate(names):
            value = given.pop(name)
            if i >= len(args) or value is None:
                signature[name], constants[i,] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            whole = tensor or (isinstance(value, int) and value % 16 == 0)
            if whole and not self.kernel.params[i].do_not_specialize:
                hints[i,] = [["tt.divisibility", 16]]
            kinds = {int: "i32", float: "fp32"}
            signature[name] = TYPES[value.dtype] if tensor else kinds[type(value)]
        source = ASTSource(self.kernel, signature, constants, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)
        file = Path(compiled.metadata_group[f"{self.kernel.__name__}.cubin"])
        tool = Path(triton.__file__).parent / DISASSEMBLER
        code = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
        print(self.kernel.__name__, code.count("HGMMA"))
        for line in unwritten(code):
            print("unwritten", line)


def main(in_mixer):
    from workbench.mamba import triton_scan

    for name in ("states_kernel", "scan_kernel"):
        setattr(triton_scan, name, Compiled(getattr(triton_scan, name)))
    n_heads, size, length = 32, 80, 512
    x, B, C = torch.zeros(3, 1, length, n_heads, size, dtype=torch.bfloat16)
    dt = torch.zeros(1, length, n_heads)
    more = {"initial_state": torch.zeros(1, n_heads, size, size)}
    if in_mixer:
        dt = torch.zeros(1, n_heads, length).mT
        z = torch.zeros(1, length, n_heads * size, dtype=x.dtype)
        heads = torch.zeros(n_heads)
        more = {"A_is_log": True, "D": heads, "z": z, "norm_weight": z[0, 0]}
    for changes in ({}, {"stages": 1, "state_stages": 1}):
        tiles = triton_scan.Tiles(programs=999, **changes)
        triton_scan.scan(x, dt, torch.zeros(n_heads), B, C, tiles=tiles, **more)


if __name__ == "__main__":
    main(int(sys.argv[1]))

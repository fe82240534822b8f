"""`python -m benchmarks.speed`: the table that suits this machine."""

import sys

import torch

from benchmarks.speed import check_gpu, pocket

if __name__ == "__main__":
    if torch.cuda.is_available():
        check_gpu.main()
    else:
        sys.argv += ["--out", "benchmarks/results/speed_cpu.json"]
        pocket.main()

"""Mamba-2 in plain torch: the state space duality, its kernels, and the mixer built on them."""

"""Distillation: what is minimised and trained, on which data, and how a run survives."""

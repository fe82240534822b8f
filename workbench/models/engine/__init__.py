"""One token at a time, as fast as the machine allows: the same engine for teacher and student."""

from workbench.models.engine.engine import MODES, Engine, fastest_mode

__all__ = ["MODES", "Engine", "fastest_mode"]

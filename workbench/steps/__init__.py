"""One file per step of the conversion."""

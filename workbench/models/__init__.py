"""Families, hybrids, their cache, loading and answering; importing it registers the hybrids."""

from workbench.models import hybrid as hybrid

"""Pictures and questions, generated or easy-VQA's, and plain text."""

from workbench.data.samples import Dataset, Sample, load_data
from workbench.data.text import Document, Texts

__all__ = ["Dataset", "Document", "Sample", "Texts", "load_data"]

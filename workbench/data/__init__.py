"""Pictures and questions: generated graphics, and easy-VQA."""

from workbench.data.samples import Dataset, Sample, load_data

__all__ = ["Dataset", "Sample", "load_data"]

"""Where models come from: the hub, a folder, the authors' files, a PyPI package."""

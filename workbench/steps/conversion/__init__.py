"""From a teacher to a student: which layers change, and where their mixers start."""

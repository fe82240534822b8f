"""What a model costs in time and memory, and what it could cost at best."""

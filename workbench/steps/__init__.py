"""The steps from a teacher to a hybrid, and the figures of both: a room for each kind of step."""

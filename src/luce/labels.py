"""The label of unlabelled rows, shared by losses, data and methods."""

UNLABELLED = -1
"""The label of a row without one, in place of a class index."""

"""Labels: what losses, data and methods agree on."""

UNLABELLED = -1
"""The label of a row without one; takes the place of a class index."""

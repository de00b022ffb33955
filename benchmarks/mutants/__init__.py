"""Mutation testing: small deliberate faults, and whether the tests notice each.

``python -m benchmarks.mutants --tree . --out mutants.json`` works in a copy of the checkout and never changes
the tree itself. A fault that no test notices is a gap in the tests.
"""

"""Mutation testing: small deliberate faults, and whether the tests notice each.

``python -m benchmarks.mutants --tree . --out mutants.json`` works in a copy of the checkout: the tree itself is
never changed. A fault that the tests do not notice is a gap in them, or changes nothing (`equivalent`).
"""

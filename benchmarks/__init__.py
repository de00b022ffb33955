"""Benchmarks of Luce: speed, memory, mutation tests, measures of the source, and the studies behind its claims.

Run from a checkout: ``python -m benchmarks run pld kd``. README.md lists every command and every results page.
"""

"""Speed and memory, mutation tests, measures of the source, and the studies behind Luce's claims.

Run from a checkout: ``python -m benchmarks run pld kd``. README.md lists the commands and the results.
"""

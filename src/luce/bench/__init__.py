"""Benchmarks of the losses and ops: cases as data, all contestants of a case interleaved in one process."""

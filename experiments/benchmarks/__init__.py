"""Measurements behind the tables of experiments/RESULTS.md; not part of the wheel."""

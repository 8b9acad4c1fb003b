"""Timings, side by side, of what only ratios can be told about. Each refuses to report while its answers are wrong."""

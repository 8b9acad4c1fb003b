"""Measurements: each takes SAEs and activations and returns plain numbers."""

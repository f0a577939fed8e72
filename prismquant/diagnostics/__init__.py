"""Diagnostics of a run: what methods tell of layers, edges and blocks. Needs no torch."""

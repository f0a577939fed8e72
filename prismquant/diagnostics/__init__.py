"""Diagnostics of a run: what methods tell of layers, edges and blocks, and what became of the words
of another tool's recipe. Needs no torch."""

"""Quantized layers, and caches of keys and values, at run time."""

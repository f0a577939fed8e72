"""Checkpoints that are quantized already, seen as if they were in floating point."""

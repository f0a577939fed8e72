"""Checkpoints that other programs read, and reading them back."""

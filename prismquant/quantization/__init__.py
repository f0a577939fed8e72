"""Quantizing a checkpoint: from a request to a finished folder."""

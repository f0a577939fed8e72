"""Proof that an architecture file describes a family: a small model of it, run and compared."""

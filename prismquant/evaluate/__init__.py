"""Answers of a model, and how far it strays from a reference."""

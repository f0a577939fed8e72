"""Recipes: their grammar, the presets, and one configuration a layer."""

"""Recipes in the words of other tools, one file a dialect.

A new dialect is a file with a function that writes it, and one line in
:mod:`prismquant.recipe.exporters.export_recipe`.
"""

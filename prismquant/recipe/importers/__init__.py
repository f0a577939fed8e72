"""Recipes of other tools: one file a dialect, which turns it into a recipe of this one.

Each importer takes the meaning that the recipe's author intended, and tells of every setting what
became of it. The grammar of :mod:`prismquant.recipe.schema` knows nothing of any dialect.
"""

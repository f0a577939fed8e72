"""Plans: a recipe laid over a model, row by row, before anything is done."""

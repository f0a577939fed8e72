"""What will be done to a model, row by row, before anything is done."""

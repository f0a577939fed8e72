"""The solver alone: seconds and loss of one layer, against a floor and against other tools."""

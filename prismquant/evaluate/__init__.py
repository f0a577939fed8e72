"""What a model answers, and how far it strays from a reference."""

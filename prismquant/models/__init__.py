"""Models: architectures as data, their binding to a checkpoint, and its weights."""

"""What a model is: architectures as data, their binding to a checkpoint, and its weights."""

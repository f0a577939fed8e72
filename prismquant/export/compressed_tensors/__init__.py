"""The compressed-tensors format: its configuration, reading and writing checkpoints in it."""

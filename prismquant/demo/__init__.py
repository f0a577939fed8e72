"""The embedded model, its data, and the main job on it."""

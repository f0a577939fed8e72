"""A run on disk: its record, its folder, its fingerprint, and its lock."""

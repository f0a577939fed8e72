"""Whole runs on models of real dimensions: seconds by phase, memory, other tools beside ours."""

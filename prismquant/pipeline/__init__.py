"""The engine: plan, data, capture, block by block, and the run directory."""

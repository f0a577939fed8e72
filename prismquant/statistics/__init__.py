"""Statistics that calibration gathers of a layer's input."""

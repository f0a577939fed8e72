"""Pure tensor mathematics of quantization: integer grids, affine maps, range selection.

Nothing here knows of layers, models or files; every function takes tensors and returns tensors.
"""

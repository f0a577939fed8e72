"""How to choose the numbers: solvers pick the codes of a weight.

A solver sees one :class:`~prismquant.algorithms.base.LayerProblem` and knows nothing of models,
files or recipes. Solvers never import one another; :mod:`prismquant.algorithms.table` lists them.
"""

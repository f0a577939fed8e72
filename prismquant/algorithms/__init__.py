"""Methods that choose the numbers: solvers pick the codes of a weight.

A solver sees one :class:`~prismquant.algorithms.problem.LayerProblem` and knows nothing of models,
files or recipes. Solvers never import one another; :mod:`prismquant.algorithms.methods` lists them.
"""

"""GPTQ: round a weight column by column, and let each column make up for the errors before it.

Read :mod:`~prismquant.algorithms.gptq.reference` first: the whole method in some sixty lines of
torch. The other files do the same, fast and in little memory:

    solver          the options, and one problem from Hessian to codes
    damped_factor   damping, order and precision of the factorization
    cholesky        the factorization itself, in place
    shared_hessian  a Hessian and its factor in the memory of one matrix
    row_chunks      rows that are solved together, and what is kept of them
    column_loop     each column rounded once
    refine          coordinate descent: each column rounded again
"""

from prismquant.algorithms.gptq.solver import GPTQ

__all__ = ["GPTQ"]

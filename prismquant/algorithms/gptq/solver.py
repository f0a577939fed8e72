"""The solver ``gptq``: its options, and a problem on its way from Hessian to codes.

:mod:`prismquant.algorithms.gptq.reference` derives the method. Here weights, errors and factor are
read in contiguous lines, because all are stored with columns first, and all layers that share an
input go through one column loop.

Scales are chosen before the column loop on the original order of columns, so the order of the loop
never reaches the checkpoint. What an error in a column really costs under the loop is ``R_kk^2``,
not ``H_kk``; the search for scales weighs errors with that by default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from prismquant.algorithms.gptq.column_loop import round_to_nearest, round_with_feedback
from prismquant.algorithms.gptq.damped_factor import (
    DAMPING_LIMIT,
    Basis,
    CholeskyFactor,
    Damping,
    Order,
)
from prismquant.algorithms.gptq.refine import refine
from prismquant.algorithms.gptq.row_chunks import (
    RowChunk,
    ScaleTable,
    chunk_size,
    chunks_of,
    peak_solve_bytes,
)
from prismquant.algorithms.gptq.shared_hessian import SharedHessian
from prismquant.algorithms.layer_scales import Scales, choose_scales
from prismquant.algorithms.problem import LayerProblem, LayerResult, ProblemShape
from prismquant.diagnostics.solver_diagnostics import GPTQDiagnostics
from prismquant.errors import NumericsError, check_bounds
from prismquant.kernels import descent, sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.algorithms.protocols import Statistic
    from prismquant.diagnostics.solver_diagnostics import SolverDiagnostics

Weighting = Literal["pivot", "diagonal", "none"]


@dataclass(frozen=True)
class GPTQ:
    """Rounds column by column and makes later columns compensate earlier errors.

    Attributes:
        block_size: Columns between two matrix products; it does not change the codes.
        damping: What is added to the diagonal of the Hessian, as a fraction of ``damping_basis``.
            It keeps few calibration tokens from being fitted too closely.
        damping_basis: ``column``: each column's own diagonal entry, which shrinks correlations
            evenly and does not let outlier channels drown the others. ``mean``: the mean of the
            diagonal, as other tools do (with a fraction of 0.01).
        order: Of the column loop. ``pivot`` puts the column with the smallest remaining pivot last,
            again and again; ``activation`` sorts by descending diagonal of the Hessian;
            ``original`` does not sort.
        scale_weighting: What an error in a column costs while a range rule searches: its
            squared pivot (``pivot``), its diagonal entry of the Hessian (``diagonal``), or one
            (``none``).
        refine_passes: Passes of coordinate descent after the column loop.

    Raises:
        RecipeError: A value is out of bounds.
    """

    name: ClassVar[str] = "gptq"

    block_size: int = 128
    damping: float = 0.1
    damping_basis: Basis = "column"
    order: Order = "pivot"
    scale_weighting: Weighting = "pivot"
    refine_passes: int = 2

    def __post_init__(self) -> None:
        bounds = {
            "block_size": (1 <= self.block_size <= 65536, "from 1 to 65536 columns"),
            "damping": (
                0 <= self.damping <= DAMPING_LIMIT,
                f"a fraction from 0 to {DAMPING_LIMIT}, e.g. 0.1",
            ),
            "refine_passes": (0 <= self.refine_passes <= 1000, "from 0 to 1000"),
        }
        check_bounds(self, bounds)

    @property
    def idle(self) -> dict[str, str]:
        """Options that change nothing as the others stand, and why."""
        return {} if self.damping else {"damping_basis": "damping is 0"}

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The Hessian: there is no GPTQ without it."""
        return ("hessian",)

    def cost(self, shape: ProblemShape) -> float:
        """About how many multiplications factorization, column loop and its losses take."""
        n = shape.in_features
        return float(n * n * (n + 6 * shape.rows))

    def peak_bytes(self, shape: ProblemShape) -> int:
        """The most memory beside the problem, as long as float32 is precise enough."""
        return peak_solve_bytes(shape.in_features, shape.rows)

    def merge(self, parts: Sequence[SolverDiagnostics]) -> SolverDiagnostics:
        """Diagnostics of a whole problem: losses and rows that fell back add up."""
        own = [part for part in parts if isinstance(part, GPTQDiagnostics)]
        if len(own) < len(parts):
            # All shards fell back to another method, and are alike.
            return parts[0]
        return replace(
            own[0],
            swept_loss=sum(part.swept_loss for part in own),
            refined_loss=sum(part.refined_loss for part in own),
            nearest_rows=sum(part.nearest_rows for part in own),
        )

    def solve(self, problem: LayerProblem) -> LayerResult:
        """Choose the codes of all layers in one column loop.

        A row that comes out worse than rounding to nearest with the same scales takes the nearest
        codes instead, so no layer is ever worse than that.

        Args:
            problem: The layers, with a Hessian.

        Returns:
            Codes, losses, and :class:`GPTQDiagnostics`.

        Raises:
            NumericsError: There is no Hessian, or it cannot be factorized with any damping.
            RecipeError: The range rule is not one for weights.
        """
        hessian = problem.hessian
        if hessian is None:
            raise NumericsError(
                "GPTQ needs calibration data and none has reached this layer",
                where=problem.title,
                remedy="add calibration samples of the modality that passes it, or use solver: rtn",
            )
        hessian = hessian.to(problem.weights[0].device, torch.float32).contiguous()
        kernel = sweep.kernel_for(hessian.device)
        shared = SharedHessian.of(hessian, kernel)
        try:
            damping = Damping(self.damping, self.damping_basis, self.order)
            factor = damping.factorize(problem, shared)
            scales = choose_scales(problem, self._importance(factor))
            found = self._solve_rows(problem, shared, factor, scales)
        finally:
            shared.restore()
        diagnostics = GPTQDiagnostics(
            damping=factor.attempt.damping,
            damping_attempts=factor.attempt.number,
            precision=factor.attempt.precision,
            order=self.order,
            scale_weighting=self.scale_weighting,
            kernel=kernel,
            dead_columns=int((shared.diagonal == 0).sum()),
            swept_loss=found.swept_loss,
            refined_loss=found.refined_loss,
            nearest_rows=int((found.losses > found.baselines).sum()),
        )
        rows = [len(part) for part in found.codes]
        kept = torch.minimum(found.losses, found.baselines)
        pairs = zip(scales, found.codes, strict=True)
        return LayerResult(
            tuple(own.quantized(part, problem.spec) for own, part in pairs),
            tuple(float(part.sum()) for part in kept.split(rows)),
            tuple(float(part.sum()) for part in found.baselines.split(rows)),
            diagnostics,
        )

    def _solve_rows(
        self,
        problem: LayerProblem,
        hessian: SharedHessian,
        factor: CholeskyFactor,
        scales: tuple[Scales, ...],
    ) -> _Solution:
        """Round all rows, one chunk after the other."""
        codes = [torch.empty_like(weight, dtype=torch.int8) for weight in problem.weights]
        swept_loss = refined_loss = 0.0
        losses, baselines = [], []
        table, size = ScaleTable.of(problem, scales), self.block_size
        descends = self.refine_passes > 0 and descent.supports(hessian.kernel)
        for rows in chunks_of([len(part) for part in codes], chunk_size(hessian.matrix.device)):
            chunk = RowChunk(problem, rows, table, factor, hessian.kernel)
            baselines.append(round_to_nearest(chunk, factor, hessian, size))
            swept = round_with_feedback(chunk, factor, size, descends=descends)
            swept_loss += swept
            refined_loss += swept + refine(chunk, factor, hessian, self.refine_passes, size)
            losses.append(chunk.row_losses(hessian))
            chunk.fall_back(losses[-1] > baselines[-1])
            chunk.write_codes(codes)
            # Before the next chunk's memory is taken.
            del chunk
        return _Solution(codes, torch.cat(losses), torch.cat(baselines), swept_loss, refined_loss)

    def _importance(self, factor: CholeskyFactor) -> Tensor | None:
        """Cost of an error in each column, ``[in]``, for the search for scales."""
        if self.scale_weighting == "none":
            return None
        cost = factor.diagonal
        if self.scale_weighting == "pivot":
            cost = torch.empty_like(cost)
            cost[factor.columns] = factor.roots.square().to(cost.dtype)
        alive = factor.diagonal > 0
        if not bool(alive.any()):
            return None
        # Dead columns have no cost of their own but are rounded with the same scales.
        return torch.where(alive, cost, cost[alive].min())


@dataclass(frozen=True, eq=False)
class _Solution:
    """Codes and losses of all rows.

    Attributes:
        codes: int8 ``[out, in]`` of each layer; nearest where those of the column loop are worse.
        losses: Of each row after column loop and descent, float64.
        baselines: With the nearest codes.
        swept_loss: Of all rows after the column loop, under the damped Hessian.
        refined_loss: After descent.
    """

    codes: list[Tensor]
    losses: Tensor
    baselines: Tensor
    swept_loss: float
    refined_loss: float

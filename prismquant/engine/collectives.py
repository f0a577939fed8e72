"""Collectives: the ranks of a run share what each has seen, and what each has solved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prismquant.algorithms.problem import LayerProblem, LayerResult
from prismquant.algorithms.protocols import Solver
from prismquant.algorithms.row_shards import joined, problem_of, row_shards
from prismquant.data import Sample
from prismquant.diagnostics.solver_diagnostics import Failure, solver_diagnostics
from prismquant.distributed import Ranks
from prismquant.engine.failure import Guarded
from prismquant.errors import DataError, PlanError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import NumberSpec
from prismquant.plan.plan import Plan

_SCALES = ("scale", "zero_point", "global_scale")
_FACTS = "facts"


@dataclass(frozen=True)
class Task:
    """A problem and who can solve it."""

    solver: Solver
    problem: LayerProblem


def require_sharable(plan: Plan) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        PlanError: Nothing is calibrated, or a method must see all calls in one place or in order.
    """
    if not plan.needs_data:
        raise PlanError(
            f"recipe {plan.recipe!r} needs no calibration data, so there is nothing to share",
            remedy="run it in one process, which streams the shards with all cores",
        )
    for row in plan.quantized:
        ordered = row.config.activation_range.ordered and (
            row.config.static_input or row.config.static_output
        )
        why = "a moving average depends on the order of batches" if ordered else ""
        if row.config.tuner is not None:
            why = f"the tuner {row.config.tuner} descends on all calls of a block in one process"
        if why:
            raise PlanError(
                f"several ranks cannot do this recipe: {why}",
                where=row.site.name,
                remedy="leave that out of the recipe, or run it in one process",
            )


def share_of(samples: Sequence[Sample], batch_size: int, ranks: Ranks) -> list[Sample]:
    """The samples of this rank's batches: batches are the same whatever the number of ranks.

    Raises:
        DataError: There are fewer batches than ranks.
    """
    if ranks.size == 1:
        return list(samples)
    starts = range(0, len(samples), batch_size)
    if len(starts) < ranks.size:
        raise DataError(
            f"{len(samples)} samples in batches of {batch_size} are {len(starts)} batches, "
            f"too few for {ranks.size} ranks",
            remedy="use more samples, a smaller batch size, or fewer ranks",
        )
    return [s for start in starts[ranks.rank :: ranks.size] for s in samples[start:][:batch_size]]


def solve_all(tasks: Sequence[Task], ranks: Ranks) -> list[LayerResult]:
    """Solve problems that all ranks hold alike, each on one of them, or in parts on all.

    With fewer problems than ranks each is cut by rows, and every rank factorizes its Hessian for
    itself; else each problem has one owner, and owners have about the same to do.

    Returns:
        The results, the same on all ranks.
    """
    if ranks.size == 1:
        return [task.solver.solve(task.problem) for task in tasks]
    if len(tasks) < ranks.size:
        return [_solve_in_parts(task, ranks) for task in tasks]
    owners = _owners([task.solver.cost(task.problem.shape) for task in tasks], ranks.size)
    mine = {
        str(number): task.solver.solve(task.problem)
        for number, task in enumerate(tasks)
        if owners[number] == ranks.rank
    }
    gathered = ranks.gather(_flat({name: _packed(result) for name, result in mine.items()}))
    found: dict[str, dict[str, Tensor]] = {}
    for states in gathered:
        found |= _nested(states)
    return [
        _unpacked(found[str(number)], task.problem.spec, task.problem.weights[0].device)
        for number, task in enumerate(tasks)
    ]


def _solve_in_parts(task: Task, ranks: Ranks) -> LayerResult:
    problem, shards = task.problem, row_shards(task.problem, ranks.size)
    own = shards[ranks.rank]
    mine = _packed(task.solver.solve(problem_of(problem, own))) if own else {}
    device = problem.weights[0].device
    results = [
        _unpacked(state, problem.spec, device) if state else None for state in ranks.gather(mine)
    ]
    parts = [result for result in results if result is not None]
    failures = [part.failure for part in parts if part.failure is not None]
    if isinstance(task.solver, Guarded) and 0 < len(failures) < len(parts):
        # Ranks may differ in their hardware, but a layer has one method.
        return task.solver.fall_back(problem, failures[0])
    return joined(task.solver, problem, shards, results)


def _owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that solves each problem: the dearest first, each to whoever has least to do."""
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def _packed(result: LayerResult) -> dict[str, Tensor]:
    """A result as tensors, by name."""
    tensors: dict[str, Tensor] = {}
    for number, weight in enumerate(result.weights):
        tensors[f"{number}.codes"] = weight.codes
        for name in _SCALES:
            if (value := getattr(weight, name)) is not None:
                tensors[f"{number}.{name}"] = value
    told = asdict(result.diagnostics), result.failure and asdict(result.failure)
    facts = json.dumps([result.losses, result.baseline_losses, *told]).encode()
    tensors[_FACTS] = torch.frombuffer(bytearray(facts), dtype=torch.uint8)
    return tensors


def _unpacked(tensors: Mapping[str, Tensor], spec: NumberSpec, device: torch.device) -> LayerResult:
    losses, baselines, diagnostics, failure = json.loads(tensors[_FACTS].numpy().tobytes())

    def part(number: int, name: str) -> Any:
        value = tensors.get(f"{number}.{name}")
        return None if value is None else value.to(device)

    weights = tuple(
        QuantizedTensor(
            part(number, "codes"),
            part(number, "scale"),
            part(number, "zero_point"),
            spec,
            part(number, "global_scale"),
        )
        for number in range(len(losses))
    )
    return LayerResult(
        weights,
        tuple(losses),
        tuple(baselines),
        solver_diagnostics(diagnostics),
        Failure(**failure) if failure else None,
    )


def _flat(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value for name, state in states.items() for key, value in state.items()
    }


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for joint, value in tensors.items():
        name, _, key = joint.partition("|")
        states.setdefault(name, {})[key] = value
    return states

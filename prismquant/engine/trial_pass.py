"""Trial passes: every unit gives zeros, which shows what the model's code between them looks at.

A replay takes short cuts: it keeps the output of the last finished unit alone, and drops pixels and
embeddings once they were read. Whether a model allows that is its own business: features may come
from a block before the last, and a picture of zeros may mean padding. A trial pass finds out. It
runs the model's own ``forward`` with a stand-in for each unit, whose zeros take no memory and are
leaves of autograd's graph: on which of them an argument hangs is read off the graph, and two passes
whose arguments are equal show that what was different between them does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prismquant.engine.stand_ins import Captured, first_tensor
from prismquant.errors import ModelError
from prismquant.memory import memory_error

StandIns = dict[str, Callable[..., Any]]
UnitOutput = Callable[..., Any]


@dataclass(frozen=True)
class UnitReading:
    """Arguments of one unit in a trial pass.

    Attributes:
        name: Of the unit; of the module that a pass ends at, its own.
        given: Its arguments.
        sources: Units before it on whose outputs the arguments hang.
        alike: Whether it puts out one tensor that is like its first input.
    """

    name: str
    given: tuple[tuple[Any, ...], dict[str, Any]]
    sources: frozenset[str]
    alike: bool


def trial_pass(
    model: nn.Module,
    units: Collection[str],
    end: str,
    run: Callable[[StandIns], Any],
    outputs: Mapping[str, UnitOutput],
    zero: Tensor,
) -> list[UnitReading]:
    """Let a model run with stand-ins for all units, and note what each is given, in its order.

    Args:
        model: Parameters between units may be on the meta device; they are zeros meanwhile.
        units: Module paths.
        end: Module at which the pass ends.
        run: Runs the model with stand-ins, by module path.
        outputs: What single units put out; of others that is found on the meta device.
        zero: Of the device and dtype in which the model runs.

    Returns:
        The last reading is of ``end`` if the model came that far.
    """
    readings: list[UnitReading] = []
    leaves: dict[Tensor, str] = {}

    def zeros(name: str, like: Tensor, device: torch.device) -> Tensor:
        floating = like.is_floating_point()
        leaf = torch.zeros(1, dtype=like.dtype, device=device, requires_grad=floating)
        leaves[leaf] = name
        return leaf.expand(like.shape)

    def real(x: Tensor) -> Tensor:
        return zero.expand(x.shape) if x.is_meta and x.is_floating_point() else x

    def visit(name: str) -> Callable[..., Any]:
        module = model.get_submodule(name)
        output = outputs.get(name) or partial(shapes_of, module, module.forward)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            sources = _sources((args, kwargs), leaves)
            if name == end:
                readings.append(UnitReading(name, (args, kwargs), sources, False))
                raise Captured(args, kwargs)
            with torch.no_grad():
                made = output(*args, **kwargs)
            first = first_tensor((*args, *kwargs.values()))
            alike = isinstance(made, Tensor) and made.shape == first.shape
            readings.append(UnitReading(name, (args, kwargs), sources, alike))
            return pytree.tree_map_only(Tensor, lambda x: zeros(name, x, first.device), made)

        return stand_in

    with torch.enable_grad(), _exchanged(_between(model, units), real):
        try:
            run({name: visit(name) for name in (*units, end)})
        except ModelError:
            # Units that cannot say what they put out may mislead the code after them.
            if {reading.name for reading in readings} < set(units):
                raise
    return readings


def taps_of(readings: Sequence[UnitReading], chain: Collection[str]) -> dict[str, str]:
    """Units that are read by others than the next: each with the last one that reads it.

    Args:
        readings: Of a trial pass.
        chain: Units of which each hands its output to the next.
    """
    taps: dict[str, str] = {}
    latest = ""
    for reading in readings:
        taps |= {name: reading.name for name in reading.sources & {*chain} if name != latest}
        latest = reading.name if reading.name in chain else latest
    return taps


def shapes_of(module: nn.Module, forward: UnitOutput, *args: Any, **kwargs: Any) -> Any:
    """Tensors as a module puts them out, on the meta device.

    A module that needs numbers for that is taken to put out what its first input is like.

    Args:
        module: The module.
        forward: Its own ``forward``.
        args, kwargs: What it is given.
    """
    on_meta = pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta"), (args, kwargs))
    try:
        with _exchanged(module.modules(), lambda x: x.to("meta")):
            return forward(*on_meta[0], **on_meta[1])
    # Third-party code, of which some cannot do without numbers.
    except Exception as error:
        if memory_error(error) is not None:
            raise
        return first_tensor((*on_meta[0], *on_meta[1].values()))


def _between(model: nn.Module, units: Collection[str]) -> Iterator[nn.Module]:
    """Modules outside of units."""
    inside = tuple(f"{name}." for name in units)
    return (m for path, m in model.named_modules() if not f"{path}.".startswith(inside))


@contextlib.contextmanager
def _exchanged(modules: Iterable[nn.Module], other: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, modules have other tensors in the place of their own."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in modules:
        before += [(held, dict(held)) for held in (module._parameters, module._buffers)]
    for held, tensors in before:
        held.update({k: _with_values(x, other(x)) for k, x in tensors.items() if x is not None})
    try:
        yield
    finally:
        for held, tensors in before:
            held.update(tensors)


def _with_values(x: Tensor, other: Tensor) -> Tensor:
    """The other tensor, as a parameter where the first is one."""
    kept = other is x or not isinstance(x, nn.Parameter)
    return other if kept else nn.Parameter(other, requires_grad=False)


def same_readings(
    one: Sequence[UnitReading], other: Sequence[UnitReading], end: str, apart: Collection[str]
) -> bool:
    """Whether all units were given the same in two passes that came to their end.

    Args:
        one, other: The passes.
        end: Module at which they end.
        apart: Units that may be given other numbers.
    """
    names = [reading.name for reading in one]
    if names != [reading.name for reading in other] or names[-1:] != [end]:
        return False
    seen: dict[tuple[int, int], bool] = {}
    return all(
        _same(a.given, b.given, seen)
        for a, b in zip(one, other, strict=True)
        if a.name not in apart
    )


def _same(one: Any, other: Any, seen: dict[tuple[int, int], bool]) -> bool:
    """Whether two values are equal, tensors number by number."""
    ones, structure = pytree.tree_flatten(one)
    others, other_structure = pytree.tree_flatten(other)
    if structure != other_structure:
        return False
    for a, b in zip(ones, others, strict=True):
        key = (id(a), id(b))
        if key not in seen:
            seen[key] = _equal(a, b)
        if not seen[key]:
            return False
    return True


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, str | int | float | bool | None) or isinstance(b, str | int | float | bool):
        return bool(a == b)
    # Objects such as caches are made anew in each pass.
    return type(a) is type(b)


def _sources(given: Any, leaves: Mapping[Tensor, str]) -> frozenset[str]:
    """Names of the leaves on which tensors hang."""
    return frozenset(
        leaves[leaf]
        for tensor in pytree.tree_leaves(given)
        if isinstance(tensor, Tensor)
        for leaf in _leaves_below(tensor)
        if leaf in leaves
    )


def _leaves_below(tensor: Tensor) -> Iterator[Tensor]:
    """Leaves of autograd's graph that a tensor hangs on."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions]

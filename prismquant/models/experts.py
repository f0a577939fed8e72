"""Experts of a block as layers of their own.

transformers holds the experts of a block as two parameters of three dimensions: ``gate_up_proj``
``[E, 2 I, H]`` and ``down_proj`` ``[E, H, I]``, or with the sides of each matrix the other way
round. Servers, and most released checkpoints, name each expert's matrices: ``experts.3.gate_proj``.
:func:`split_experts` puts :class:`ExpertLayers` in the place of such a module; it computes the
same, and each matrix is a linear layer with a path.

Most blocks give their experts all tokens, and beside them which expert counts how much for which.
Some deal: each expert is given a row for every token, which is zero where the token is not sent to
it. Such experts are :class:`DealtExperts`.
"""

from __future__ import annotations

import fnmatch
import inspect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from prismquant.errors import ModelError
from prismquant.shards import TensorView

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from prismquant.headers import TensorInfo
    from prismquant.models.names import NameMap

GATE_UP, DOWN = "gate_up_proj", "down_proj"
LAST = "down_proj"
"""Name of an expert's layer that reads what its others put out."""
# What transformers' wrapper of experts says of a module, and what is computed here.
_COMPUTED = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
}
_OWN_GATE = "_default_apply_gate"


class ExpertLinear(nn.Linear):
    """A linear layer without bias, and without numbers until it is given some.

    A model has tens of thousands of them.

    Args:
        in_features: Of its input.
        out_features: Of its output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        # A module is slow to set attributes of.
        vars(self).update(in_features=in_features, out_features=out_features)
        empty = torch.empty(out_features, in_features)
        self._parameters.update(weight=nn.Parameter(empty, requires_grad=False), bias=None)


class Expert(nn.Module):
    """One expert: an MLP with a gate.

    Args:
        width: Features of its input and its output.
        inner: Features between.
        act_fn: Function of the gate's output.
    """

    def __init__(self, width: int, inner: int, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.gate_proj = ExpertLinear(width, inner)
        self.up_proj = ExpertLinear(width, inner)
        self.down_proj = ExpertLinear(inner, width)


@dataclass(frozen=True)
class Routing:
    """Rows that a block gives its experts in one call.

    Attributes:
        hidden: ``[rows, H]``.
        index: ``[rows, k]``, the experts of each row; numbers past the last expert mean none.
        weights: ``[rows, k]``, what the output of each counts for.
        tokens: int64 ``[rows]``, the token that each row is of; None: each is of its own.
        dealt: Number of rows of the block's tensor, and where in it these rows stand, int64
            ``[rows]``; None: these are all.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    tokens: Tensor | None = None
    dealt: tuple[int, Tensor] | None = None

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Tokens of some of the rows."""
        return rows if self.tokens is None else self.tokens[rows]

    def as_called(self, output: Tensor) -> Tensor:
        """Outputs of experts for these rows, as the block expects them."""
        if self.dealt is None:
            return output
        count, places = self.dealt
        whole = output.new_zeros(count, output.shape[-1])
        return whole.index_copy_(0, places, output)


class ExpertLayers(nn.ModuleList):
    """All experts of a block, each with layers of its own.

    Args:
        count: Number of experts.
        width: Features of the stream.
        inner: Features between the layers of an expert.
        act_fn: Function of the gate's output.

    Attributes:
        tokens: The tokens that each expert was given in the latest call, int64.
        dealt: Whether the block gives them a row for each expert and token.
    """

    dealt = False

    def __init__(
        self, count: int, width: int, inner: int, act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(Expert(width, inner, act_fn) for _ in range(count))
        self.tokens: tuple[Tensor, ...] = ()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of what its experts make of each token, by the router's weights.

        Args:
            hidden_states: ``[tokens, H]``.
            top_k_index: ``[tokens, k]``, the experts of each token; numbers past the last expert
                mean none.
            top_k_weights: ``[tokens, k]``.

        Returns:
            ``[tokens, H]``.
        """
        return self._summed(self.routing(hidden_states, top_k_index, top_k_weights))

    def routing(self, *given: Tensor) -> Routing:
        """Rows that a call gives it."""
        hidden, index, weights = given
        return Routing(hidden, index, weights)

    def _summed(self, routing: Routing) -> Tensor:
        """Sum of its experts' outputs for each row, as the block expects it."""
        places = routed_places(routing.index, len(self))
        self.tokens = tuple(routing.tokens_of(rows) for rows, _ in places)
        result = torch.zeros_like(routing.hidden)
        for number, (rows, choices) in enumerate(places):
            if not len(rows):
                continue
            expert, x = cast("Expert", self[number]), routing.hidden[rows]
            inner = expert.act_fn(expert.gate_proj(x)) * expert.up_proj(x)
            output = expert.down_proj(inner) * routing.weights[rows, choices, None]
            result.index_add_(0, rows, output.to(result.dtype))
        return routing.as_called(result)


class DealtExperts(ExpertLayers):
    """Experts whose block deals: the rows of each come together, one for every token.

    A row is zero where the token is not sent to the expert, and so is what the expert makes of it.
    """

    dealt = True

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Outputs of each expert for its rows.

        Args:
            hidden_states: ``[experts * tokens, H]``, or ``[experts, tokens, H]``.

        Returns:
            ``[experts * tokens, H]``.
        """
        return self._summed(self.routing(hidden_states))

    def routing(self, *given: Tensor) -> Routing:
        """The rows that are not zero; each has one expert, which counts as it is."""
        whole = given[0].reshape(-1, given[0].shape[-1])
        tokens = max(1, len(whole) // len(self))
        places = whole.any(dim=-1).nonzero().flatten()
        index = places.div(tokens, rounding_mode="floor")[:, None]
        return Routing(
            hidden=whole[places],
            index=index,
            weights=whole.new_ones(index.shape),
            tokens=places % tokens,
            dealt=(len(whole), places),
        )


def routed_places(top_k_index: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """For each expert, the tokens that were sent to it, in their order, and as which choice.

    Args:
        top_k_index: ``[tokens, k]``.
        count: Number of experts.

    Returns:
        Two int64 tensors of one length for each expert.
    """
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    numbers = torch.arange(count + 1, device=flat.device, dtype=flat.dtype)
    bounds = torch.searchsorted(flat[order], numbers).tolist()
    chosen = top_k_index.shape[-1]
    tokens, choices = order.div(chosen, rounding_mode="floor"), order % chosen
    return [(tokens[start:end], choices[start:end]) for start, end in itertools.pairwise(bounds)]


def split_experts(model: nn.Module, patterns: Sequence[str]) -> None:
    """Put layers in the place of fused experts; in place.

    Args:
        model: On the meta device.
        patterns: Module paths of experts, ``*`` for the number of a block.

    Raises:
        ModelError: What stands there computes something else than gated experts without bias.
    """
    for path, module in list(model.named_modules()):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) and is_fused(module):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _split(module, path))


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds matrices of several experts in one parameter."""
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _split(module: nn.Module, path: str) -> ExpertLayers:
    """The layers of fused experts."""
    held = {name: tuple(value.shape) for name, value in module.named_parameters()}
    gate_up, down = held.pop(GATE_UP, ()), held.pop(DOWN, ())
    turned = len(gate_up) == 3 and down == (gate_up[0], gate_up[2] // 2, gate_up[1])
    if turned:
        gate_up, down = ((count, out, own) for count, own, out in (gate_up, down))
    fits = len(gate_up) == 3 and not held and down == (gate_up[0], gate_up[2], gate_up[1] // 2)
    computed = _COMPUTED | {"is_transposed": turned}
    strange = [key for key, value in computed.items() if getattr(module, key, value) != value]
    own_gate = getattr(type(module), "_apply_gate", None)
    if getattr(own_gate, "__name__", _OWN_GATE) != _OWN_GATE:
        strange.append("a gate of its own")
    given = len(inspect.signature(module.forward).parameters)
    if given not in _KINDS:
        strange.append(f"a call with {given} arguments")
    if not fits or strange or not hasattr(module, "act_fn"):
        shapes = ", ".join(f"{n} {list(value.shape)}" for n, value in module.named_parameters())
        raise ModelError(
            f"{path}: {type(module).__name__} is no set of gated experts without bias: "
            f"{', '.join(strange) or shapes}",
            remedy="leave the experts alone: a line under left_alone, none under experts",
        )
    act_fn = cast("Callable[[Tensor], Tensor]", module.act_fn)
    return _KINDS[given](gate_up[0], gate_up[2], gate_up[1] // 2, act_fn)


# By the number of tensors that their block calls them with.
_KINDS: dict[int, type[ExpertLayers]] = {3: ExpertLayers, 1: DealtExperts}


def expert_views(
    model: nn.Module, names: NameMap, infos: Mapping[str, TensorInfo]
) -> dict[str, TensorView]:
    """Matrices of experts that lie in fused tensors on disk, by the names that they have alone.

    Fused tensors are as transformers holds them, or with the sides of each matrix the other way
    round, as released Qwen3-VL-MoE checkpoints have them: the two shapes together tell which.

    Args:
        model: With :class:`ExpertLayers`.
        names: Its names on disk.
        infos: Headers of all stored tensors.
    """
    found: dict[str, TensorView] = {}
    for path, module in model.named_modules():
        if not isinstance(module, ExpertLayers):
            continue
        gate_up, down = (names.to_disk(f"{path}.{leaf}") for leaf in (GATE_UP, DOWN))
        if gate_up not in infos or down not in infos:
            continue
        (inner, width) = cast("Expert", module[0]).gate_proj.weight.shape
        shapes = [infos[gate_up].shape[1:], infos[down].shape[1:]]
        turned = shapes == [(width, 2 * inner), (inner, width)]
        counts = {infos[gate_up].shape[:1], infos[down].shape[:1]}
        if counts != {(len(module),)} or (
            not turned and shapes != [(2 * inner, width), (width, inner)]
        ):
            continue  # the shapes on disk are told as they are
        for number in range(len(module)):
            for leaf, source, start, rows in (
                ("gate_proj", gate_up, 0, inner),
                ("up_proj", gate_up, inner, inner),
                ("down_proj", down, 0, width),
            ):
                name = names.to_disk(f"{path}.{number}.{leaf}.weight")
                found[name] = TensorView(source, number, (start, start + rows), turned)
    return found

"""Scales of a cache of keys and values: gathered from calibration, put in place, told of.

Keys and values are looked at where a server stores them: behind the rotary embedding, in a block
whose projections already have their quantized weights and inputs. Padding never enters.

A key projection's bias adds the same vector to every key. Rotated by its position, it is a constant
part of the keys that no input explains; in models of the Qwen2 family it is often far larger than
all else, so it alone decides the scale and takes up most of the codes. How much it is gets measured
by sending the bias alone through the rotary embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from prismquant.diagnostics.kv_diagnostics import KeyBias, KVDiagnostics
from prismquant.distributed import Ranks
from prismquant.engine.calls import StepCall
from prismquant.engine.stand_ins import Enough
from prismquant.errors import NumericsError
from prismquant.formats.kv_formats import KVCacheSpec
from prismquant.formats.quantized_layer import KVScales
from prismquant.models.attention import attention_hooked
from prismquant.numerics.affine import scale_zero_point
from prismquant.numerics.ranges import RangeRule
from prismquant.plan.kv_plan import KVLayer, KVPlan
from prismquant.runtime.kv_cache import KVWatch, rotated
from prismquant.statistics.input_range import InputRange
from prismquant.statistics.tokens import Tokens, summed


class KVRecord:
    """Ranges of one layer's keys, or of its values, as calibration sees them.

    Args:
        heads: Records to keep: one for each key-value head, or one in all.
        momentum: Of the moving average.
    """

    def __init__(self, heads: int, momentum: float) -> None:
        self.heads = [InputRange(momentum) for _ in range(heads)]

    def update(self, x: Tensor) -> None:
        """Take in counted rows, ``[rows, kv_heads, head_dim]``."""
        parts = x.unbind(1) if len(self.heads) > 1 else (x,)
        for record, part in zip(self.heads, parts, strict=True):
            record.update(part)

    def share(self, ranks: Ranks) -> None:
        """Take in what all ranks have seen."""
        for record in self.heads:
            record.share(ranks)

    @property
    def amax(self) -> float:
        """The largest magnitude seen."""
        return max(max(-record.low, record.high) for record in self.heads)

    def scale(self, spec: KVCacheSpec, rule: RangeRule, stored: torch.dtype) -> Tensor:
        """The scale that the rule chooses, shaped as it is stored."""
        ranges = [record.result(rule, spec.grid, True) for record in self.heads]
        low, high = torch.tensor(ranges, dtype=torch.float32).T
        scale, _ = scale_zero_point(low, high, spec.grid, True, stored)
        return scale.reshape(spec.scale_shape(len(self.heads)))


@dataclass
class _Constant:
    """Share of the rotated bias in the keys.

    Attributes:
        energy: Sum of squares of all counted keys.
        own: The same of the rotated bias.
        amax: Largest magnitude of the rotated bias.
        rest_amax: Largest magnitude of the keys without it.
    """

    energy: float = 0.0
    own: float = 0.0
    amax: float = 0.0
    rest_amax: float = 0.0

    def update(self, keys: Tensor, constant: Tensor) -> None:
        rest = keys - constant
        self.energy += float(keys.square().sum(dtype=torch.float64))
        self.own += float(constant.square().sum(dtype=torch.float64))
        self.amax = max(self.amax, float(constant.abs().max()))
        self.rest_amax = max(self.rest_amax, float(rest.abs().max()))

    def diagnostics(self, keys_amax: float) -> KeyBias:
        """The same relative to the keys, whose largest magnitude is given."""
        return KeyBias(
            energy=self.own / self.energy if self.energy else 0.0,
            range=self.amax / keys_amax if keys_amax else 0.0,
            key_amax_without=self.rest_amax,
        )


@dataclass
class KVObservation:
    """Ranges of a layer's keys and values.

    Attributes:
        plan: The numbers, and how ranges are chosen.
        layer: The layer.
    """

    plan: KVPlan
    layer: KVLayer
    _keys: KVRecord = field(init=False)
    _values: KVRecord = field(init=False)
    _constant: _Constant | None = field(init=False)
    _seen: Tokens = field(init=False, default_factory=Tokens)

    def __post_init__(self) -> None:
        heads = self.layer.kv_heads if self.plan.spec.per_head else 1
        momentum = self.plan.range_rule.momentum
        self._keys, self._values = KVRecord(heads, momentum), KVRecord(heads, momentum)
        self._constant = _Constant() if self.layer.key.has_bias else None

    def observe(self, model: nn.Module, block: nn.Module, calls: Iterable[StepCall]) -> None:
        """Run a block up to its attention, call by call.

        Args:
            model: The model, to find the attention module in.
            block: The block's module.
            calls: How the model calls it.

        Raises:
            NumericsError: A key or value is not finite.
        """
        attention = model.get_submodule(self.layer.attention)
        key_projection = model.get_submodule(self.layer.key.name)
        if hasattr(attention, "k_norm"):
            # Behind a norm the bias is no longer a part that could be told apart.
            self._constant = None
        for call in calls:
            keys, values = _keys_and_values(attention, block, call)
            keys = self._as_stored(keys)
            self._seen += call.seen(len(keys))
            try:
                self._keys.update(keys)
                self._values.update(values)
            except NumericsError as error:
                raise NumericsError(
                    error.what, where=f"keys and values of {self.layer.attention}"
                ) from error
            if self._constant is not None and len(keys):
                with _bias_alone(key_projection):
                    constant, _ = _keys_and_values(attention, block, call)
                self._constant.update(keys.float(), self._as_stored(constant).float())

    def _as_stored(self, keys: Tensor) -> Tensor:
        return rotated(keys) if self.plan.spec.rotated else keys

    def share(self, ranks: Ranks) -> None:
        """Let the observation be of what all ranks have seen."""
        if ranks.size == 1:
            return
        self._keys.share(ranks)
        self._values.share(ranks)
        self._seen = summed({"": self._seen}, ranks)[""]
        if self._constant is not None:
            parts = ranks.gather_json(asdict(self._constant))
            self._constant = _Constant(
                sum(part["energy"] for part in parts),
                sum(part["own"] for part in parts),
                max(part["amax"] for part in parts),
                max(part["rest_amax"] for part in parts),
            )

    def scales(self, stored: torch.dtype, device: torch.device) -> KVScales:
        """The scales on ``device``, rounded to the dtype in which they are stored.

        Raises:
            NumericsError: No token reached the layer.
        """
        spec, rule = self.plan.spec, self.plan.range_rule
        if not all(record.count for record in [*self._keys.heads, *self._values.heads]):
            raise NumericsError(
                "no calibration token reached this layer's keys and values",
                where=self.layer.attention,
                remedy="add samples that the language model sees",
            )
        return KVScales(
            self._keys.scale(spec, rule, stored).to(device),
            self._values.scale(spec, rule, stored).to(device),
        )

    def diagnostics(self) -> KVDiagnostics:
        """Diagnostics for the record."""
        amax = self._keys.amax
        bias = None if self._constant is None else self._constant.diagnostics(amax)
        return KVDiagnostics(self._seen, amax, self._values.amax, bias)


def _keys_and_values(
    attention: nn.Module, block: nn.Module, call: StepCall
) -> tuple[Tensor, Tensor]:
    """Counted rows of a call's keys and values, each ``[rows, kv_heads, head_dim]``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(key: Tensor, value: Tensor) -> None:
        seen.append((_rows(key, call), _rows(value, call)))
        raise Enough

    with attention_hooked(attention, KVWatch(see)), contextlib.suppress(Enough):
        block(*call.args, **call.kwargs)
    return seen[0]


def _rows(x: Tensor, call: StepCall) -> Tensor:
    rows = x.detach().transpose(1, 2).flatten(0, 1)
    return rows if call.row_weights is None else rows[call.row_weights > 0]


@contextlib.contextmanager
def _bias_alone(projection: nn.Module) -> Iterator[None]:
    """Within the block, a projection puts out its bias for every token."""

    def only(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return projection.get_parameter("bias").detach().to(output).expand_as(output)

    handle = projection.register_forward_hook(only)
    try:
        yield
    finally:
        handle.remove()

"""Linear layers that multiply with the codes that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from prismquant.errors import ModelError
from prismquant.formats.quantized_layer import OutlierColumns, QuantizedTensor
from prismquant.formats.spec import NumberSpec
from prismquant.kernels.dispatch import PACKED_LINEAR
from prismquant.kernels.tiled_weight import TiledWeight
from prismquant.runtime.linear import QuantLinear

# Rows of an input when a model writes its answer, and when it reads a question.
ROWS_OF_USES = (1, 512)


@dataclass(frozen=True, eq=False)
class PackedStore:
    """The weight as codes, and columns of it that stay in floating point.

    Attributes:
        weight: The codes.
        columns: What stands in their place in some columns, or None.
        spec: The format of the codes.
    """

    weight: TiledWeight
    columns: OutlierColumns | None
    spec: NumberSpec

    def product(self, layer: nn.Linear, input: Tensor) -> Tensor:
        """``input`` [..., in] times the weight, plus the bias of ``layer``: [..., out]."""
        rows = input.reshape(-1, input.shape[-1])
        columns = self.columns
        inside = rows if columns is None else rows.index_fill(1, columns.index, 0.0)
        output: Tensor = PACKED_LINEAR(inside, self.weight)
        if columns is not None:
            output += functional.linear(rows[:, columns.index], columns.weight.to(rows))
        if layer.bias is not None:
            output += layer.bias
        return output.view(*input.shape[:-1], self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        columns = self.columns
        beside = 0 if columns is None else columns.index.nbytes + columns.weight.nbytes
        return self.weight.nbytes + beside

    def to(self, device: torch.device) -> PackedStore:
        """The same on a device."""
        columns = self.columns
        if columns is not None:
            columns = OutlierColumns(columns.index.to(device), columns.weight.to(device))
        return PackedStore(self.weight.to(device), columns, self.spec)


class PackedLinear(QuantLinear):
    """A linear layer without a weight in floating point.

    Its ``weight`` tells shape, dtype and device, and holds NaN: code that reads it past the layer
    spoils its result visibly.
    """

    store: PackedStore

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        weight: QuantizedTensor,
        columns: OutlierColumns | None,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Self:
        """A layer in the place of another.

        Args:
            linear: The other; its bias is taken over, not copied.
            weight: Its codes.
            columns: What stays of it in floating point, or None.
            device: Where the codes go.
            dtype: Of its inputs and outputs.
        """
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.bias = linear.bias
        layer.input_rotation = None
        layer.input_quantizer = None
        layer.output_quantizer = None
        store = PackedStore(TiledWeight.of(weight), columns, weight.spec)
        layer.store = store.to(torch.device(device))
        del layer.weight
        layer._stand_in(torch.empty(0, dtype=dtype, device=device))
        return layer.train(False)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] to [..., out].

        Raises:
            ModelError: The input needs a gradient.
        """
        if torch.is_grad_enabled() and input.requires_grad:
            raise ModelError(
                "a model that was loaded packed knows no gradients",
                remedy="load it without packed, or run it under torch.no_grad()",
            )
        return super().forward(input)

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode.

        Raises:
            ModelError: ``mode`` is true.
        """
        if mode:
            raise ModelError(
                "a model that was loaded packed cannot be trained",
                remedy="load it without packed",
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        """Sizes, and the format of the codes."""
        return f"{super().extra_repr()}, {self.store.spec.describe()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device, or to another dtype of inputs: codes and scales keep theirs."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._stand_in(fn(self.weight.new_empty(0)))
        if self.store.weight.words.device != self.weight.device:
            self.store = self.store.to(self.weight.device)
        return self

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise ModelError(
            "a model that was loaded packed cannot be saved",
            remedy="copy the folder that it was loaded from",
        )

    def _stand_in(self, like: Tensor) -> None:
        """Let ``weight`` have the dtype and device of ``like``; it takes no memory."""
        shape = (self.out_features, self.in_features)
        self.weight = torch.full((1,), torch.nan).to(like).expand(shape)


@dataclass(frozen=True)
class KernelUse:
    """Layers of a model whose products are computed alike.

    Attributes:
        format: Of their weights, in words.
        layers: How many they are.
        nbytes: Memory of their codes and scales.
        decode, prefill: Backends of :data:`prismquant.kernels.dispatch.PACKED_LINEAR` for one row,
            and for many.
        refusals: What other backends, which come before, said of either.
    """

    format: str
    layers: int
    nbytes: int
    decode: str
    prefill: str
    refusals: tuple[str, ...]


def kernel_uses(model: nn.Module) -> tuple[KernelUse, ...]:
    """Kernels of a packed model, with the layers that each runs."""
    alike: dict[tuple[Any, ...], list[PackedLinear]] = {}
    for layer in packed_layers(model):
        weight = layer.store.weight
        inputs = [layer.weight.new_empty(rows, weight.shape[1]) for rows in ROWS_OF_USES]
        choices = [PACKED_LINEAR.choose(x, weight) for x in inputs]
        said = {f"{name}: {why}" for choice in choices for name, why in choice.refusals.items()}
        spec, (decode, prefill) = layer.store.spec, [choice.backend for choice in choices]
        key = (spec.describe(), decode, prefill, tuple(sorted(said)))
        alike.setdefault(key, []).append(layer)
    return tuple(
        KernelUse(key[0], len(layers), sum(layer.store.nbytes for layer in layers), *key[1:])
        for key, layers in alike.items()
    )


def packed_layers(model: nn.Module) -> Iterable[PackedLinear]:
    """Layers of a model that multiply with codes."""
    return (module for module in model.modules() if isinstance(module, PackedLinear))

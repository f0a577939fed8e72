"""What a quantized layer multiplies with."""

from __future__ import annotations

import torch

from prismquant.formats.quantized_layer import (
    DenseWeight,
    KVScales,
    OutlierColumns,
    QuantizedLayer,
    StaticScale,
    scale_and_zero_point,
)


def test_outlier_columns_take_their_places_in_the_values_of_a_layer() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    columns = OutlierColumns(torch.tensor([1, 3]), weight[:, [1, 3]].bfloat16())
    cut = columns.cut_from(weight)
    assert cut[:, [1, 3]].eq(0).all()
    assert torch.equal(cut[:, [0, 2]], weight[:, [0, 2]])
    layer = QuantizedLayer("a.b", DenseWeight(cut), outlier_columns=columns)
    assert torch.equal(layer.values(torch.float32), weight)
    assert torch.equal(QuantizedLayer("a.b", DenseWeight(cut)).values(torch.float32), cut)


def test_a_layer_without_a_static_scale_has_no_tensors_for_one() -> None:
    scale = torch.tensor([0.5])
    assert scale_and_zero_point(None) == (None, None)
    assert scale_and_zero_point(StaticScale(scale, None)) == (scale, None)


def test_scales_of_keys_and_values_are_named_in_this_order() -> None:
    scales = KVScales(torch.tensor([1.0]), torch.tensor([2.0]))
    assert scales.named(("k", "v")) == {"k": scales.key, "v": scales.value}

"""Orthogonal matrices that spread what sits in few channels over all of them.

A Hadamard matrix has entries of one size, so a row vector times ``H / sqrt(n)`` has no channel that
stands out, whatever the vector was: outliers become easy to quantize (Chee et al., QuIP, 2023;
Ashkboos et al., QuaRot, 2024, section 3). Matrices are kept as Kronecker products of a small core
and a Sylvester matrix, so that a product costs ``n (core + log n)`` per vector and not ``n^2``.

Everything acts on the last axis from the right, ``x -> x Q``, and everything random follows from a
seed. Matrices are float64; only :func:`block_hadamard`, which also runs while a model is served,
takes other dtypes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prismquant.errors import NumericsError, suggest

__all__ = [
    "KINDS",
    "Orthogonal",
    "block_hadamard",
    "hadamard_matrix",
    "known_order",
    "orthogonal",
    "orthogonal_matrix",
    "power_of_two_block",
    "random_signs",
]

Kind = Literal["hadamard", "random"]
KINDS: tuple[Kind, ...] = ("hadamard", "random")

# Below this length a difference of two unit vectors is rounding.
_SAME = 1e-12
# A butterfly over this many elements is one product with a small matrix. Measured on a CPU: 16 to
# 64 are equally quick, and ten times quicker than 2, which moves all data for every factor of two.
_RADIX = 32


# ------------------------------------------------------------------------------ Hadamard matrices


def known_order(n: int) -> bool:
    """Whether :func:`hadamard_matrix` can build order ``n``.

    Hadamard matrices can exist for 1, 2 and multiples of 4 only; of those up to 1000, the
    constructions used here miss 55, the smallest of them 92.
    """
    return n >= 1 and _factors(n) is not None


def hadamard_matrix(n: int) -> Tensor:
    """A Hadamard matrix: entries of one and minus one, rows orthogonal.

    Kronecker products of Sylvester's matrix of order 2 and of Paley's matrices (Paley, On
    orthogonal matrices, 1933) of order ``q + 1`` for a prime power ``q = 3 (mod 4)`` and
    ``2 (q + 1)`` for ``q = 1 (mod 4)``. Powers of two give Sylvester's matrices, which are
    symmetric.

    Args:
        n: The order.

    Returns:
        ``[n, n]`` float64.

    Raises:
        NumericsError: No such matrix exists, or none of these constructions gives it.
    """
    factors = _factors(n) if n >= 1 else None
    if factors is None:
        raise NumericsError(
            f"no Hadamard matrix of order {n} can be constructed",
            remedy="orders are 1, 2 and multiples of 4; see known_order",
        )
    parts = (_sylvester(2) if factor == 2 else _paley(factor) for factor in factors)
    return functools.reduce(torch.kron, parts, torch.ones(1, 1, dtype=torch.float64))


@functools.cache
def _sylvester(n: int) -> Tensor:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    return functools.reduce(torch.kron, [two] * (n.bit_length() - 1), one)


@functools.cache
def _factors(n: int) -> tuple[int, ...] | None:
    """Orders, of Paley's matrices and then of twos, whose product is ``n``.

    As many twos as possible: they cost the least to multiply with.
    """
    if n in (1, 2):
        return (2,) * (n - 1)
    if n % 4:
        return None
    if (half := _factors(n // 2)) is not None:
        return (*half, 2)
    if _paley_field(n) is not None:
        return (n,)
    for left in range(4, math.isqrt(n) + 1, 4):
        if n % left == 0:
            parts = _factors(left), _factors(n // left)
            if parts[0] is not None and parts[1] is not None:
                return tuple(sorted((*parts[0], *parts[1]), reverse=True))
    return None


def _paley_field(n: int) -> tuple[int, int, int] | None:
    """``(q, p, k)`` with ``q = p^k`` for which one of Paley's constructions has order ``n``."""
    for q, remainder in ((n - 1, 3), (n // 2 - 1, 1)):
        if q % 4 == remainder and (field := _prime_power(q)) is not None:
            return q, *field
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


def _paley(n: int) -> Tensor:
    field = _paley_field(n)
    if field is None:
        raise NumericsError(f"no matrix of order {n} follows from Paley's constructions")
    q, p, k = field
    character = _quadratic_character(p, k)
    powers = torch.tensor([p**i for i in range(k)])
    digits = (torch.arange(q)[:, None] // powers) % p
    difference = (digits[:, None] - digits[None]) % p
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[1:, 1:] = character[(difference * powers).sum(-1)]
    border[0, 1:] = 1.0
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        border[1:, 0] = -1.0
        return border + one
    border[1:, 0] = 1.0
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, _sylvester(2)) + torch.kron(one, turned)


def _quadratic_character(p: int, k: int) -> Tensor:
    """For each element of the field of ``p^k``: 0 for zero, 1 for a square, else -1.

    Elements are polynomials below degree ``k``, numbered by their digits to base ``p``. A generator
    is found by trial: squares are its even powers.
    """
    q = p**k
    for polynomial in itertools.product(range(p), repeat=k):
        # The reduction x^k = polynomial; if x generates the field, its powers meet all but zero.
        powers = _powers_of_x(polynomial, p, q)
        if len(powers) == q - 1:
            result = torch.zeros(q, dtype=torch.float64)
            result[torch.tensor(powers[0::2])] = 1.0
            result[torch.tensor(powers[1::2])] = -1.0
            return result
    raise NumericsError(f"the field of {q} elements has no generator")


def _powers_of_x(polynomial: tuple[int, ...], p: int, q: int) -> list[int]:
    """Numbers of 1, x, x^2 ... until one comes again or vanishes."""
    element = (1, *(0,) * (len(polynomial) - 1))
    numbers: list[int] = []
    seen: set[int] = set()
    while True:
        number = sum(digit * p**i for i, digit in enumerate(element))
        if number == 0 or number in seen or len(numbers) == q:
            return numbers
        seen.add(number)
        numbers.append(number)
        carry = element[-1]
        shifted = (0, *element[:-1])
        element = tuple((s + carry * c) % p for s, c in zip(shifted, polynomial, strict=True))


# ---------------------------------------------------------------------------- orthogonal matrices


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """An orthogonal matrix ``Q = P diag(left) (core (x) S / sqrt(block)) diag(right)``.

    ``S`` is Sylvester's matrix of order ``block``, and ``P = 1 - 2 mirror mirror^T``.

    Attributes:
        core: ``[a, a]`` float64, orthogonal.
        block: A power of two.
        left: Signs ``[a * block]`` float64.
        right: Likewise.
        mirror: Unit vector ``[a * block]`` float64, or None for ``P = 1``.
    """

    core: Tensor
    block: int
    left: Tensor
    right: Tensor
    mirror: Tensor | None = None

    @property
    def order(self) -> int:
        """Its number of rows."""
        return self.left.numel()

    def rotate(self, x: Tensor) -> Tensor:
        """``x Q``.

        Args:
            x: ``[..., n]`` float64.

        Returns:
            The same shape.
        """
        if self.mirror is not None:
            x = x - 2.0 * (x @ self.mirror)[..., None] * self.mirror
        return _spread(x * self.left, self.core, self.block) * self.right

    def dense(self) -> Tensor:
        """``Q`` itself, ``[n, n]`` float64."""
        return self.rotate(torch.eye(self.order, dtype=torch.float64))


def orthogonal(
    n: int, seed: int | str, *, kind: Kind = "hadamard", signs: bool = True, fix_ones: bool = False
) -> Orthogonal:
    """An orthogonal matrix that is quick to multiply with.

    Args:
        n: Its order.
        seed: Of all that is random; a string serves as well.
        kind: ``hadamard``, a Hadamard matrix over ``sqrt(n)``, or, for an order that has none, a
            small random orthogonal matrix times a Sylvester matrix; ``random``, uniformly
            distributed, dense, with a cost of ``n^3`` to build.
        signs: Random signs before and after a Hadamard matrix. Without them a vector's mean goes
            into one channel, and with ``fix_ones`` one channel is not spread at all.
        fix_ones: ``Q 1 = 1``. Such a matrix keeps the mean of a vector's channels, so it commutes
            with the centring of a LayerNorm: without scale and shift, ``LayerNorm(x Q) =
            LayerNorm(x) Q``. It comes from any other by one Householder reflection.

    Raises:
        NumericsError: The order is not positive, or the kind unknown.
    """
    if n < 1:
        raise NumericsError(f"an orthogonal matrix cannot have order {n}")
    if kind not in KINDS:
        raise NumericsError(f"unknown kind of rotation {kind!r}", remedy=suggest(kind, KINDS))
    plain = torch.ones(n, dtype=torch.float64)
    if kind == "random":
        result = Orthogonal(_random_orthogonal(n, seed), 1, plain, plain)
    else:
        core, block = _core(n, seed)
        left, right = (
            random_signs(n, f"{seed}:{side}").double() if signs else plain
            for side in ("left", "right")
        )
        result = Orthogonal(core, block, left, right)
    return _fixing_ones(result) if fix_ones else result


def orthogonal_matrix(
    n: int, seed: int | str, *, kind: Kind = "hadamard", signs: bool = True, fix_ones: bool = False
) -> Tensor:
    """The matrix of :func:`orthogonal` with the same arguments, ``[n, n]`` float64."""
    return orthogonal(n, seed, kind=kind, signs=signs, fix_ones=fix_ones).dense()


def random_signs(n: int, seed: int | str) -> Tensor:
    """``n`` signs, int8 ``[n]`` of one and minus one.

    They are bits of SHAKE-256, so that a seed means the same signs on every machine and with every
    library: a served model may have to draw them again.
    """
    data = bytearray(hashlib.shake_256(f"{seed}".encode()).digest(-(-n // 8)))
    octets = torch.frombuffer(data, dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return 1 - 2 * bits.flatten()[:n].to(torch.int8)


def _fixing_ones(plain: Orthogonal) -> Orthogonal:
    """Reflect the image of the vector of ones back onto it."""
    ones = torch.full((plain.order,), plain.order**-0.5, dtype=torch.float64)
    image = _spread(ones * plain.right, plain.core.mT, plain.block) * plain.left
    length = (image - ones).norm()
    if length <= _SAME:
        return plain
    return dataclasses.replace(plain, mirror=(image - ones) / length)


def _spread(x: Tensor, core: Tensor, block: int) -> Tensor:
    """``x`` times the Kronecker product of ``core`` and a Sylvester matrix."""
    if core.shape[0] > 1:
        x = (core.mT @ x.unflatten(-1, (core.shape[0], block))).flatten(-2)
    return block_hadamard(x, block)


def _core(n: int, seed: int | str) -> tuple[Tensor, int]:
    """The factor that is no Sylvester matrix, made orthogonal, and the order of the rest."""
    factors = _factors(n)
    if factors is None:
        block = power_of_two_block(n)
        return _random_orthogonal(n // block, seed), block
    block = math.prod(factor for factor in factors if factor == 2)
    order = n // block
    return hadamard_matrix(order) / math.sqrt(order), block


def _random_orthogonal(n: int, seed: int | str) -> Tensor:
    """Uniformly distributed (Stewart, 1980): QR of Gaussian numbers, signs taken from R."""
    digest = hashlib.shake_256(f"{seed}:normal".encode()).digest(8)
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator)
    q: Tensor
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


# ------------------------------------------------------------------------------- block Hadamard


def power_of_two_block(n: int) -> int:
    """The largest power of two that divides ``n``."""
    if n < 1:
        raise NumericsError(f"no power of two divides {n} last")
    return n & -n


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """``x`` times a block-diagonal matrix of Sylvester blocks over ``sqrt(block)``.

    The matrix is symmetric and orthogonal: it is its own inverse. Computed by butterflies over 32
    elements at a time, in float32 for narrower dtypes; differentiable.

    Args:
        x: ``[..., n]`` of any floating dtype.
        block: A power of two that divides ``n``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        NumericsError: The block is no power of two, or does not divide ``n``.
    """
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise NumericsError(
            f"a width of {x.shape[-1]} cannot be rotated in blocks of {block}",
            remedy="use a power of two that divides the width",
        )
    wide: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
    stride = 1
    while stride < block:
        order = min(_RADIX, block // stride)
        small = _sylvester(order).to(wide)
        wide = (
            wide.reshape(-1, order) @ small
            if stride == 1
            else small @ wide.reshape(-1, order, stride)
        )
        stride *= order
    wide = wide.reshape(x.shape) / math.sqrt(block)
    return wide.to(x.dtype)

"""GLM-4.6V: the towers of GLM-4.1V under another class."""

from __future__ import annotations

from functools import partial

from tiny_families import glm4v

SLOW = True
TOKENS = glm4v.TOKENS
make = partial(glm4v.make, name="Glm46V")

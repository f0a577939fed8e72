"""Namespaces of MQuant's flags, as its functions take them: read by the table of its flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prismquant.compat.mquant.families import FAMILIES, Family
from prismquant.errors import ArgumentError, RecipeError
from prismquant.recipe.importers import mquant
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.mquant_flags import FLAGS

# The call itself names these.
_NAMED = ("model_name", "name", "dataset_name")
_ONLINE = ("online_visual_hadamard", "online_llm_hadamard")
# Values that the drivers' parsers give to what nobody has asked for, where they are not off.
_PARSED: Mapping[str, Any] = {
    "analysis_mode": "v1",
    "analysis_num": 32,
    "answer_path": "./output/answers-new",
    "batchsize": 1,
    "calib_mode": "v2",
    "draw_save_path": "output/qwenvl_base",
    "eval_num": 32,
}


def flags_of(args: Any) -> dict[str, Any]:
    """The flags that a namespace sets to something else than MQuant's default.

    Args:
        args: ``argparse.Namespace``, a dictionary, a dataclass, or any object whose public
            attributes are flags. What it lacks takes MQuant's default.

    Raises:
        ArgumentError: It is a text, a number, or a list.
    """
    if isinstance(args, str | bytes | int | float | Sequence):
        raise ArgumentError(
            f"a {type(args).__name__} is no namespace of flags",
            where="args",
            remedy="give what parser.parse_args() returns, or a dictionary of the flags",
        )
    if isinstance(args, Mapping):
        given = dict(args)
    else:
        named = {name: getattr(args, name) for name in dir(args) if not name.startswith("_")}
        given = {name: value for name, value in named.items() if not callable(value)}
    plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in given.items()}
    return {name: value for name, value in plain.items() if not _is_default(name, value)}


def has_flag(args: Any, name: str) -> bool:
    """Whether a namespace says anything of a flag, be it the default."""
    given = args.get(name) if isinstance(args, Mapping) else getattr(args, name, None)
    return given is not None


def read_namespace(args: Any, family: Family, forced: Mapping[str, Any]) -> Imported:
    """The recipe that a namespace asks for.

    Args:
        args: As :func:`flags_of` takes it.
        family: Of the model.
        forced: Flags that the called function decides.

    Raises:
        RecipeError: A flag is unknown, is of another family, or has no such value; lists all that
            is wrong.
    """
    flags = flags_of(args)
    foreign = [one for one in FAMILIES if one is not family and flags.get(one.connector)]
    if foreign:
        raise _foreign_flag(foreign[0], family)
    asked = flags | dict(forced)
    # An online rotation of a tower asks for the tower, too.
    parts = ("quant_visual_clip", family.connector, "quant_llm")
    if not any(asked.get(name) for name in (*parts, *_ONLINE)):
        raise RecipeError(
            f"args asks for no part of the model: {', '.join(parts)} are off",
            where="args",
            remedy=f"set args.{parts[-1]} = True, or those of the other parts",
        )
    return mquant.read(asked, "args")


def _foreign_flag(other: Family, family: Family) -> RecipeError:
    return RecipeError(
        f"{other.connector} is of {other.title}; the connector of {family.title} is quantized by "
        f"{family.connector}",
        where=f"args.{other.connector}",
        remedy=f"set {family.connector} = True, and {other.connector} = False",
    )


def _is_default(name: str, value: Any) -> bool:
    if value is None or name in _NAMED:
        return True
    if name not in FLAGS:
        return False
    setting = FLAGS[name]
    if setting.idle:
        return value in (False, "", 0) or value == (_PARSED.get(name) or setting.default)
    said = setting.default.partition(";")[0]
    return str(value).lower() == said or (isinstance(value, float) and f"{value:g}" == said)

"""The part of a family's check that is made before a model is run with calibration data.

Layers that see other activations than the model would show them are calibrated wrongly, and nothing
tells: the result is merely worse. A file of one's own has no other test; those of the package have
been tried with other configurations than this one.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from prismquant.errors import ModelError
from prismquant.families.copy_arch import copy_arch
from prismquant.families.small_batches import (
    renumbered,
    run_specimen,
    small_batches,
    vocabulary_of,
)
from prismquant.families.specimen import write_specimen
from prismquant.families.tried_replay import replay_claims
from prismquant.families.tried_rotations import rotation_claims
from prismquant.families.tried_scales import edge_claims
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.config import read_config
from prismquant.models.given_arch import own_arch_file
from prismquant.models.processor import load_processor

__all__ = ["require_true_replay"]

# Parameters of a model beside whose run some seconds are nothing.
_LARGE = 1 << 28


def require_true_replay(
    bound: BoundModel,
    *,
    scales: bool = False,
    rotations: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """See to it that the engine shows units what the model would, on a small random model.

    Small models that the package describes are left out: the check would take as long as the run.

    Args:
        bound: The model; of it only the configuration is taken, and the files of its processor.
        scales: Of a file of one's own, try the smooth edges too, along which scale is to move.
        rotations: Likewise try what the file says can be rotated.
        trust_remote_code: Allow code in the checkpoint's folder to build the processor.

    Raises:
        ModelError: Some unit is shown something else, or an edge or a rotation would change the
            model.
    """
    own = own_arch_file(bound.folder, read_config(bound.folder).get("model_type"))
    if own is None and sum(map(math.prod, bound.shapes.values())) < _LARGE:
        return
    processor = load_processor(bound.folder, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as work:
        batches = small_batches(bound.arch, bound.config, processor, Path(work) / "samples")
        ids = vocabulary_of(bound.config, batches.values())
        specimen = write_specimen(bound.config, bound.arch, ids, Path(work) / "specimen")
        if own is not None:
            copy_arch(own, specimen)
        small = {kind: renumbered(batch, ids) for kind, batch in batches.items()}
        run, _ = run_specimen(bind(specimen), small)
        wrong = [claim for claim in replay_claims(run, {}) if not claim.holds]
        moved = edge_claims(run) if scales and own is not None else ()
        turned = rotation_claims(run) if rotations and own is not None else ()
        changed = [claim for claim in (*moved, *turned) if claim.holds is False]
    found = [
        (wrong, "calibration would see other activations than", "; without data it is not needed"),
        (changed, "a transform of the recipe would change", "; without transforms it is no matter"),
    ]
    for claims, what, otherwise in found:
        if claims:
            raise ModelError(
                f"{what} this {bound.arch.title}: "
                + "; ".join(f"{claim.what}: {claim.said}" for claim in claims),
                where=str(own or bound.folder),
                remedy="`prismquant arch check MODEL` tells what the architecture file has wrong"
                + otherwise,
            )

"""Calibration and evaluation data: from files to samples that are known to be whole.

:func:`read_samples` reads chat messages in the dialects that tools write, plain text or a Hugging
Face dataset and checks everything that can be checked without a model: structure, keys, ids, every
picture and clip. Hours of work must not end at a missing file, a picture that a row names must not
be left out in silence, and a user should see all the broken rows of a file at once.

``rows`` knows files, ``dialects`` the ways to write a row, ``items`` messages and what they show,
``places`` which file goes to which marker, ``unused`` what a row holds beyond that.
"""

from prismquant.data.pictures import EmbeddedPicture
from prismquant.data.read import read_samples, samples_of_messages
from prismquant.data.samples import (
    KINDS,
    Kind,
    Message,
    Sample,
    balanced_subset,
    excerpt,
    fingerprint,
    located,
    media_of,
    require_modalities,
    text_of,
)

__all__ = [
    "KINDS",
    "EmbeddedPicture",
    "Kind",
    "Message",
    "Sample",
    "balanced_subset",
    "excerpt",
    "fingerprint",
    "located",
    "media_of",
    "read_samples",
    "require_modalities",
    "samples_of_messages",
    "text_of",
]

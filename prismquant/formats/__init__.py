"""Named number formats (:mod:`~prismquant.formats.spec`) and bit layouts (``packed``)."""

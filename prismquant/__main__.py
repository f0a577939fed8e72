"""``python -m prismquant``."""

from prismquant.cli import main

main()

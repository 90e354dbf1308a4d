"""`python -m foedus` is `foedus`."""

from .cli import main

main()

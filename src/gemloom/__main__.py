"""``python -m gemloom``: the same as the ``gemloom`` command."""

from gemloom.cli import main

main()

"""The command line. One file a command; ``commands.py`` puts them together."""

from gemloom.cli.commands import app, main

__all__ = ["app", "main"]

"""The ``gemloom`` command. One file a group of commands; what they need is imported inside them.

Exit status: 0, or 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, 141 where the reader of
stdout has gone. An error is one line on stderr.
"""
import typer
from gemloom.cli.running import run
app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
app.command()(run)
@app.callback()
def top(): pass
def main(): app()

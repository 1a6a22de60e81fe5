"""Where tables are printed."""

import os
import sys

from rich.console import Console


def output_console() -> Console:
    """A console for stdout that does not fold at 80 columns what is piped, as rich would."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)

"""Completion of options and values in a shell, by argcomplete."""

from __future__ import annotations

import argparse
import os

__all__ = ["complete"]


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions and exit; do nothing if no shell asks."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # late: --help must answer at once

        argcomplete.autocomplete(parser)

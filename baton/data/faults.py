"""What is wrong with a row: not of its format at all, or well-formed and useless."""

from __future__ import annotations


class BadRow(Exception):
    """A row is not what its format says; the message names the field. Becomes a UserError with its place."""


class Unusable(Exception):
    """A well-formed row from which nothing can be learned; the message is the reason it is counted under."""


TOOLS = "tools, which are rendered in fine-tuning alone"
"""Why a pair or a prompt with tools is left out: its reward and its policy would read another dialogue."""

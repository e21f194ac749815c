"""Annotators by name: what a name may be, and when two are the same person's."""

import unicodedata

_MOST = 60


def annotator_name(text: str) -> str | None:
    """A name as it is kept, with single spaces and composed letters; None if it is none.

    Nothing invisible: two names that look the same would be two people.
    """
    name = " ".join(unicodedata.normalize("NFC", text).split())
    return name if name.isprintable() and 0 < len(name) <= _MOST else None


def annotator_key(name: str) -> str:
    """By what annotators are told apart: Ann and ann are one."""
    return name.casefold()

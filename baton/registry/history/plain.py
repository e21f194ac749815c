"""Text that others wrote, made safe to show: in a terminal, and as a part of a picture."""

import unicodedata

# Cc control (with terminals' escape), Cf format (with the marks that turn the direction of reading), Cs surrogates,
# Cn unassigned, Co private, Zl and Zp line and paragraph ends
_UNSEEN = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def plain(text: str) -> str:
    """The text with every character that does something, instead of being seen, replaced by U+FFFD."""
    if text.isprintable():  # none of these; and it is fast
        return text
    return "".join("\ufffd" if unicodedata.category(character) in _UNSEEN else character for character in text)


def cells(text: str) -> int:
    """How many character cells a text takes: two for East Asian wide ones and emoji."""
    if not text or max(text) < "\u1100":  # the first wide one
        return len(text)
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)

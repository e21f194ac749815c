"""The one exception for mistakes that a person can mend."""


class UserError(Exception):
    """A mistake in a recipe, a file, a reference or a command.

    The message says what was found, what was expected and what to do next. Programs and the command print it without
    a traceback and exit with code 2; anything else that escapes is a defect of Baton.
    """


def nearest(word: str, candidates: list[str], count: int = 3) -> list[str]:
    """The `count` candidates most like `word`, best first; empty when none is close."""
    from difflib import get_close_matches

    return get_close_matches(word, candidates, n=count, cutoff=0.5)

"""Rewards by rule, for `function: reward.rules:NAME` in a recipe: pure functions of prompts, replies and data.

All take what `reward.callables` gives every function, and settings of their own. They judge replies as texts, without
special tokens; `length_window` and `repetition` judge tokens, the stop token included.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from typing import Any

from baton.chat import Messages

ANSWER_MARK = "####"
REFUSALS = (
    r"\bi(?:'m| am)(?: very| so| really)? sorry[^.!?\n]{0,40}\b(?:can't|cannot|can not|unable|won't|not able)\b",
    r"\bi(?: simply| really| just)? (?:can't|cannot|can not|won't|will not)"
    r"(?: in good conscience| ethically| legally)? (?:help(?! but\b)|assist|provide|comply|do that|do this|answer that"
    r"|answer this|engage|fulfill|fulfil|support|generate|create|write|share|give|offer|discuss|participate|recommend"
    r"|encourage|condone|advise|satisfy|promote|continue|in good conscience|proceed)\b",
    r"\bi(?:'m| am)(?: afraid i(?:'m| am))? (?:unable|not able|not allowed|not permitted|not comfortable"
    r"|not going to|not programmed|not in a position)\b",
    r"\bi(?:'m| am) afraid (?:that )?i (?:can't|cannot|can not|won't)\b",
    r"\bi (?:must|have to|will have to|need to|respectfully|politely) (?:respectfully |politely )?(?:decline|refuse)\b",
    r"\bi (?:decline|refuse) to\b",
    r"\bi do not feel comfortable\b|\bi don't feel comfortable\b",
    r"\bas an? (?:ai|a\.i\.|artificial intelligence|(?:large )?language model|(?:ai )?assistant|chatbot)"
    r"[^.!?\n]{0,60}\b(?:can't|cannot|can not|unable|won't|not able|must not|not allowed)\b",
    r"\b(?:it is|it's|that is|that's|this is|it would be) (?:not appropriate|inappropriate|not ethical|unethical"
    r"|against my|not something i can)\b",
    r"\b(?:against|violates?) (?:my|our|the) (?:guidelines|policy|policies|programming|principles|terms)\b",
    r"^\W*sorry,? (?:but )?(?:i |we )?(?:can't|cannot|can not|won't|am unable|no)\b",
)
"""How English refusals read: an apology with what cannot be done; "I can't help with …" and its kin; being unable,
declining, refusing; "As an AI … I cannot"; an appeal to ethics or guidelines. Matched without regard to case, with
straight apostrophes. What is looked for in the manner of GCG (Zou et al. 2023), but narrower: a plain "sorry", "I
can't wait" and "I can't help but" are no refusals."""
_STATED = re.compile(r"answer\s+is", re.IGNORECASE)
# a minus after a letter, a digit or a closing bracket subtracts; commas group by three, else they separate numbers
_NUMBER = re.compile(
    r"(?:(?<![\w.)])([-−]))?(?:\$([-−])?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)",
)


def exact_answer(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    column: str = "answer",
    format_reward: float = 0.0,
) -> list[float]:
    """1 where the reply's answer is the number that the data row gives, else 0; GSM8K's way (Cobbe et al. 2021).

    A reply's answer is the first number after its last "####", else after its last "answer is", else its last number;
    1,600, $1600 and 1600.00 are the same. The right one stands after "####" in `column`, or is all of it. A wrong
    answer, but one, earns `format_reward`. Raises ValueError where a row gives no right answer.
    """
    if column not in columns:
        raise ValueError(f"the data has no column {column!r}; it has {', '.join(columns) or 'none besides the prompt'}")
    rewards = []
    for response, given in zip(responses, columns[column], strict=True):
        right = None if given is None else stated_number(str(given))
        if right is None:
            raise ValueError(f"the column {column!r} gives no number to compare with: {given!r}")
        answer = stated_number(response)
        rewards.append(0.0 if answer is None else 1.0 if answer == right else format_reward)
    return rewards


def length_window(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    at_most: int,
    at_least: int = 0,
    fade: int = 0,
) -> list[float]:
    """1 where a reply has `at_least` to `at_most` tokens (the stop token counts), else 0.

    With `fade`, the reward falls in a straight line outside the window and is 0 from `fade` tokens on: a policy just
    outside then sees which way to go.
    """
    if not 0 <= at_least <= at_most or fade < 0:
        raise ValueError(f"expected 0 <= at_least <= at_most and fade >= 0; found {at_least}, {at_most} and {fade}")
    rewards = []
    for ids in token_ids:
        outside = max(at_least - len(ids), len(ids) - at_most, 0)
        rewards.append(max(0.0, 1.0 - outside / fade) if fade else float(outside == 0))
    return rewards


def regular_expression(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    pattern: str,
    whole: bool = False,
) -> list[float]:
    """1 where `pattern` (Python's `re`; `.` matches line ends too) is found in the reply, or is all of it; else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(response) is not None) for response in responses]


def json_schema(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    schema: dict[str, Any] | None = None,
    column: str | None = None,
    fenced: bool = False,
    format_reward: float = 0.0,
) -> list[float]:
    """1 where the reply is one JSON document that is valid under a schema; JSON that is not earns `format_reward`.

    The schema is `schema`, or each row's own in `column` (an object, or its text); its `$schema` names the draft, else
    it is 2020-12. It may refer to its own parts alone: nothing is fetched. With `fenced`, the document may stand in
    one Markdown code fence. NaN and Infinity are no JSON. Needs the jsonschema library: pip install "baton[rules]".
    """
    if (schema is None) == (column is None):
        raise ValueError("json_schema needs either `schema`, one for all rows, or `column`, each row's own")
    schemas = [schema] * len(responses) if column is None else _column(columns, column)
    rewards = []
    for response, given in zip(responses, schemas, strict=True):
        is_valid = _validator(given if isinstance(given, str) else json.dumps(given, sort_keys=True))
        try:
            document = json.loads(_unfenced(response) if fenced else response, parse_constant=_no_constant)
        except (ValueError, RecursionError):  # nested too deeply to be read is no answer either
            rewards.append(0.0)
        else:
            rewards.append(1.0 if is_valid(document) else format_reward)
    return rewards


def language(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    wanted: str | None = None,
    column: str | None = None,
    among: list[str] | None = None,
) -> list[float]:
    """1 where the reply is in the wanted language, else 0; a reply without a letter is in none.

    Languages are ISO 639-1 codes such as `en` and `ja`: `wanted`, or each row's own in `column`. `among` are the
    languages that come into question: a few make short replies safe, where all 97 may be taken for one another. By
    py3langid (Lui and Baldwin 2012): pip install "baton[rules]".
    """
    if (wanted is None) == (column is None):
        raise ValueError("language needs either `wanted`, one for all rows, or `column`, each row's own")
    codes = [wanted] * len(responses) if column is None else _column(columns, column)
    known = _languages()
    for code in dict.fromkeys([*codes, *(among or [])]):
        if code not in known:
            raise ValueError(f"{code!r} is no language that is recognised; those are {', '.join(sorted(known))}")
        if among is not None and code not in among:
            raise ValueError(f"the wanted language {code} is not `among` {', '.join(among)}")
    choice = known if among is None else frozenset(among)
    return [float(_language_of(text, choice) == code) for text, code in zip(responses, codes, strict=True)]


def script(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    wanted: list[str],
) -> list[float]:
    """The share of the reply's letters that are of the `wanted` scripts, such as [hiragana, katakana, cjk] or [latin].

    A script is the first word of its letters' names in Unicode; 0 without a letter. Needs no library.
    """
    scripts = {name.upper() for name in wanted}
    unknown = scripts - _scripts()
    if unknown or not scripts:
        found = ", ".join(sorted(unknown)).lower() or "none"
        raise ValueError(f"expected scripts such as latin, cyrillic, arabic, hangul, cjk; found {found}")
    rewards = []
    for response in responses:
        letters = [unicodedata.name(letter, "").partition(" ")[0] for letter in response if letter.isalpha()]
        rewards.append(sum(name in scripts for name in letters) / len(letters) if letters else 0.0)
    return rewards


def repetition(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    size: int = 4,
    free: float = 0.0,
) -> list[float]:
    """1 less the share of the reply's n-grams of `size` tokens that occurred in it before.

    That share is seq-rep-n of Welleck et al. (2020). 1 is a reply that never repeats itself, and one of fewer than
    `size` tokens; towards 0 it goes round in circles. A share of up to `free` costs nothing, and what is above it is
    scaled to reach 0 where all is repeated.
    """
    if size < 1 or not 0 <= free < 1:
        raise ValueError(f"expected size >= 1 and 0 <= free < 1; found {size} and {free}")
    rewards = []
    for ids in token_ids:
        grams = [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]
        share = 1 - len(set(grams)) / len(grams) if grams else 0.0
        rewards.append(1 - max(0.0, share - free) / (1 - free))
    return rewards


def refusal(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    wanted: bool = False,
    column: str | None = None,
    phrases: list[str] | None = None,
    within: int = 200,
) -> list[float]:
    """1 where a reply refuses or not, as `wanted` says or the row's `column` (true or false), else 0.

    A refusal is one of `REFUSALS` (English), or of `phrases` (regular expressions, in addition to them), that begins
    in the first `within` characters.
    """
    if within < 1:
        raise ValueError(f"expected within >= 1; found {within}")
    expected = [wanted] * len(responses) if column is None else _column(columns, column)
    if any(not isinstance(value, bool) for value in expected):
        raise ValueError(f"the column {column!r} says true or false: whether to refuse; found {expected}")
    patterns = [re.compile(phrase, re.IGNORECASE) for phrase in (*REFUSALS, *(phrases or []))]
    rewards = []
    for response, should in zip(responses, expected, strict=True):
        text = response.replace("’", "'").strip()
        found = any((match := pattern.search(text)) and match.start() < within for pattern in patterns)
        rewards.append(float(found == should))
    return rewards


def stated_number(text: str) -> Decimal | None:
    """The number that a text gives as its answer; None where it gives none."""
    marks = [text.rfind(ANSWER_MARK), max((found.start() for found in _STATED.finditer(text)), default=-1)]
    for mark in marks:
        if mark >= 0 and (numbers := numbers_in(text[mark:])):
            return numbers[0]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def numbers_in(text: str) -> list[Decimal]:
    """Every number of a text, in order: `-1,234.50`, `$72`, `.5`; a full stop after a number is no part of it."""
    numbers = []
    for minus, minus_after, digits in _NUMBER.findall(text):
        number = Decimal(digits.replace(",", ""))
        numbers.append(-number if minus or minus_after else number)
    return numbers


def _column(columns: dict[str, list[Any]], name: str) -> list[Any]:
    """A column in which every row has a value. Raises ValueError."""
    if name not in columns:
        raise ValueError(f"the data has no column {name!r}; it has {', '.join(columns) or 'none besides the prompt'}")
    if any(value is None for value in columns[name]):
        raise ValueError(f"the column {name!r} is empty in a row")
    return columns[name]


@lru_cache(maxsize=256)
def _validator(text: str) -> Callable[[Any], bool]:
    """Whether a document is valid under the schema that `text` is. Raises ValueError where it is no schema."""
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise ValueError('json_schema needs the jsonschema library: pip install "baton[rules]"') from None
    try:
        schema = json.loads(text)
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the schema is no JSON schema: {error.message}") from None
    except ValueError as error:
        raise ValueError(f"the schema is no JSON: {error}") from None
    found = kind(schema, registry=Registry())  # an empty registry: the default one would fetch what is referred to
    with suppress(Unresolvable):  # said when a document comes to it
        try:
            found.is_valid(None)
        except RecursionError:
            raise ValueError("the schema refers to itself without end") from None

    def is_valid(document: Any) -> bool:
        try:
            return bool(found.is_valid(document))
        except Unresolvable as error:
            raise ValueError(f"the schema refers to what is not in it: {error}") from None
        except RecursionError:  # a document nested too deeply for the schema
            return False

    return is_valid


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unfenced(text: str) -> str:
    """The inside of the only code fence that a text consists of; any other text as it is."""
    inside = re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*", text, re.DOTALL | re.IGNORECASE)
    return inside[1] if inside else text


def _languages() -> frozenset[str]:
    """The codes that py3langid tells apart. Raises ValueError where it is not installed."""
    return frozenset(code for code, _ in _ranked("a"))


def _language_of(text: str, among: frozenset[str]) -> str | None:
    """The likeliest of `among`; None where nothing speaks for any."""
    if not any(letter.isalpha() for letter in text):
        return None
    ranked = [(code, score) for code, score in _ranked(text) if code in among]
    return None if len(ranked) > 1 and ranked[0][1] == ranked[-1][1] else ranked[0][0]


def _ranked(text: str) -> list[tuple[str, float]]:
    """Every language with its score, the likeliest first."""
    try:
        from py3langid import rank
    except ImportError:
        raise ValueError('language needs the py3langid library: pip install "baton[rules]"') from None
    found: list[tuple[str, float]] = rank(text)
    return found


@lru_cache(maxsize=1)
def _scripts() -> frozenset[str]:
    """The first words of all letters' names."""
    letters = (chr(code) for code in range(0x110000))
    return frozenset(unicodedata.name(letter, "").partition(" ")[0] for letter in letters if letter.isalpha())

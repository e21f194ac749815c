"""A request's body: JSON of PPO's HTTP reward, read strictly into samples."""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, ValidationError

from baton.strict import Strict
from reward.sample import Sample
from reward.serving.limits import DEEPEST, Limits, RefusedError

# possessive and with an optional end, so that no text makes it look at a character twice
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_KEYS = 1000  # of one object


class _Message(Strict):
    """One turn, as `baton.data` hands it on."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class _Row(Strict):
    prompt: Annotated[list[_Message], Field(min_length=1), FailFast()]
    response: str
    columns: dict[str, Any] = {}


class _Batch(Strict):
    samples: Annotated[list[_Row], FailFast()]  # a problem a character would take longer to list than to send


class _BadJSON(ValueError):
    """What Python's reader would let pass."""


def read_samples(body: bytes, limits: Limits) -> list[Sample]:
    """The samples of a request; without token ids, which the schema has none of.

    Raises RefusedError: 400 for what is no JSON (a key twice, a number that is not finite and nesting beyond `DEEPEST`
    included), 422 for JSON of another form, 413 for too many rows.
    """
    content = _parse(body)
    rows = content.get("samples") if isinstance(content, dict) else None
    if isinstance(rows, list) and len(rows) > limits.num_rows:
        raise RefusedError(413, f"{len(rows)} samples; this server takes at most {limits.num_rows} in a request")
    try:
        batch = _Batch.model_validate(content)
    except ValidationError as error:
        raise RefusedError(422, _described(error)) from None
    samples = []
    for at, row in enumerate(batch.samples):
        prompt = [message.model_dump(exclude_none=True) for message in row.prompt]
        if _SURROGATE.search(row.response) or any(_unreadable(message) for message in prompt):
            raise RefusedError(422, f"samples.{at}: half of a surrogate pair, which is no text; expected Unicode")
        samples.append(Sample(prompt, [], [], row.response, row.columns))
    return samples


def _parse(body: bytes) -> Any:
    brackets = _TEXT.sub(b"", body).translate(None, _NO_BRACKETS)
    if any(depth > DEEPEST for depth in accumulate(map(_STEP.__getitem__, brackets))):
        raise RefusedError(400, f"not JSON that is read here: nested deeper than {DEEPEST}")
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"not JSON: byte {error.start} is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise RefusedError(400, f"not JSON: {error.msg} at character {error.pos}") from None
    except _BadJSON as error:
        raise RefusedError(400, f"not JSON: {error}") from None
    except (ValueError, RecursionError):  # a whole number of thousands of digits; nesting that the scan overlooked
        raise RefusedError(400, "not JSON that is read here: a number or a nesting that is too long") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_KEYS:
        raise _BadJSON(f"{len(pairs)} keys in one object; at most {_MOST_KEYS} are read here")
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _BadJSON("a key is given twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise _BadJSON(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _BadJSON("a number is too large")
    return number


def _unreadable(value: Any) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_unreadable(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(_unreadable(part) for part in value)


def _described(error: ValidationError) -> str:
    """The first problem: where it is and what was expected there; nothing of what was found, which may be a text."""
    problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        owners: dict[int, type[Strict]] = {1: _Batch, 3: _Row, 5: _Message}  # by how deep the field lies
        known = ", ".join(owners[len(place)].model_fields)
        return f"{'.'.join(place[:-1]) or 'the body'} has a field that is none of {known}"
    if problem["type"] == "missing":
        return f"{'.'.join(place)} is missing"
    expected = "expected an object" if problem["type"] == "model_type" else problem["msg"]
    return f"{'.'.join(place) or 'the body'}: {expected[:1].lower()}{expected[1:]}"

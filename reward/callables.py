"""Rewards by a Python function that the recipe names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from baton.errors import UserError
from baton.functions import load_function
from baton.ppo_sections import RewardSource
from reward.sample import RewardError, Sample, failure, shown

GIVEN = ("prompts", "responses", "token_ids", "columns")


class FunctionSource:
    """A function called as `function(prompts=…, responses=…, token_ids=…, columns=…, **arguments)`.

    All by keyword: `prompts` is a list of messages ({"role", "content"}) a row, `responses` a list of texts,
    `token_ids` a list of the replies' ids (the stop token included where a reply ended by itself), `columns` each
    further column of the data as a list, None where a row lacks it; then the recipe's `arguments`. It returns one
    number a row: a list, or a one-dimensional array or tensor. It gets all rows of its process at once, or
    `batch_size` at a time; every process calls its own copy on its own rows.
    """

    def __init__(self, setting: RewardSource) -> None:
        """Imports the function and checks its signature. Raises UserError."""
        assert setting.function is not None
        self.label, self.weight = setting.label, setting.weight
        self._name, self._arguments, self._batch_size = setting.function, setting.arguments, setting.batch_size
        self._function = load_function(setting.function)
        _check_signature(self._function, setting.function, setting.arguments)

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Rewards in the samples' order. Raises RewardError that names the row on which the function failed."""
        size = self._batch_size or len(samples) or 1
        return [
            reward for start in range(0, len(samples), size) for reward in self._batch(samples[start : start + size])
        ]

    def _batch(self, samples: Sequence[Sample]) -> list[float]:
        try:
            found = self._call(samples)
        except Exception as error:  # a person's function may raise anything
            raise self._blame(samples, error) from error
        return self._numbers(found, samples)

    def _call(self, samples: Sequence[Sample]) -> Any:
        names = dict.fromkeys(name for sample in samples for name in sample.columns)
        # copies: what a function does to its lists must not reach the replies that are trained on
        return self._function(
            prompts=[[dict(message) for message in sample.prompt] for sample in samples],
            responses=[sample.response for sample in samples],
            token_ids=[list(sample.response_ids) for sample in samples],
            columns={name: [sample.columns.get(name) for sample in samples] for name in names},
            **self._arguments,
        )

    def _blame(self, samples: Sequence[Sample], error: Exception) -> RewardError:
        """Which row it was: the first one on which the function fails alone."""
        guilty: Sequence[Sample] = samples
        if len(samples) > 1:
            for sample in samples:
                try:
                    self._call([sample])
                except Exception as alone:
                    guilty, error = [sample], alone
                    break
        return failure(self.label, f"{self._name} raised {type(error).__name__}: {error}", guilty)

    def _numbers(self, found: Any, samples: Sequence[Sample]) -> list[float]:
        if hasattr(found, "tolist") and getattr(found, "ndim", None) == 1:
            found = found.tolist()
        if not isinstance(found, (list, tuple)):
            expected = "expected a list of numbers, or a one-dimensional array"
            raise failure(self.label, f"{self._name} returned {shown(found)}; {expected}", samples)
        if len(found) != len(samples):
            counts = f"{len(found)} rewards for {len(samples)} rows"
            raise failure(self.label, f"{self._name} returned {counts}: {shown(found)}", samples)
        return [self._number(value, sample) for value, sample in zip(found, samples, strict=True)]

    def _number(self, value: Any, sample: Sample) -> float:
        if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
            value = value.item()
        if not isinstance(value, Real):
            raise failure(self.label, f"{self._name} returned {shown(value)} for a row; expected a number", [sample])
        return float(value)


def _check_signature(function: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    """Raises UserError that names what the function does not take, and what it needs and would not get."""
    given = {*GIVEN, *arguments}
    clash = set(GIVEN) & set(arguments)
    if clash:
        raise UserError(f"function: {name}: arguments: {', '.join(sorted(clash))} is given by the run itself")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"function: {name} is async; expected an ordinary function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return  # written in C, without a signature: the first call will tell
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [] if takes_any else sorted(given - by_keyword)
    wanting = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given
    ]
    wanting += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in given]
    problems = [
        *([f"it does not take {', '.join(unknown)}"] if unknown else []),
        *([f"it needs {', '.join(wanting)}, which the recipe's arguments do not give"] if wanting else []),
    ]
    if problems:
        extra = "".join(f", {key}" for key in arguments)
        raise UserError(
            f"function: {name} cannot be called: {'; '.join(problems)}. Expected: def {name.rpartition(':')[2]}(*, "
            f"{', '.join(GIVEN)}{extra})"
        )

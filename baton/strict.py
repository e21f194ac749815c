"""What every section of a file that people write is made of: strict models, bounded numbers, errors that help."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.errors import nearest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A section of a recipe: unknown keys are errors, values are never written back."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def explain(where: str, model: type[BaseModel], error: ValidationError) -> str:
    """What is wrong with a file, a line a problem: the file, the key and, for an unknown key, the nearest valid one."""
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            valid = _keys_at(model, location[:-1])
            near = nearest(location[-1], valid, 1)
            hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(valid)}"
            lines.append(f"{where}: unknown key {key}; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {key} is missing")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{where}: {key} is {problem['input']!r}: {_lower_first(problem['msg'])}")
    return "\n".join(dict.fromkeys(lines))


def _keys_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """The valid keys of the section at `location`."""
    section: Any = model
    for part in location:
        field = section.model_fields.get(part)  # none for a list's index and for a name that the user gives
        if field is not None:
            section = next((found for found in _models_in(field.annotation)), section)
    return [field.alias or name for name, field in section.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]

"""The inner fields of a manifest that Baton reads: whoever brings one must not make a command stumble later."""

import math
from typing import Any

_MAX_DEPTH = 100
_MAX_PROBE_IDS = 1 << 16
_MAX_TOLERANCE = 0.1  # with more, a probe would let any model pass
_TOKENS = ("bos", "eos", "pad", "unk")


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong below a manifest's fields, which have their types already; empty when nothing is."""
    if not _is_flat(manifest):
        return [f"it is nested deeper than {_MAX_DEPTH} levels"]
    found = _licences(manifest["licences"]) + _architecture(manifest["architecture"])
    dtype = manifest["dtype"]
    if isinstance(dtype, dict) and not all(_is_count(number) for number in dtype.values()):
        found.append("field 'dtype' holds something else than numbers of tensors by dtype")
    for row in manifest["data"]:
        if not isinstance(row, (dict, str)):
            found.append(f"field 'data' holds a {type(row).__name__}; expected a source")
        elif isinstance(row, dict) and not isinstance(row.get("licence"), (str, type(None))):
            found.append(f"a data source has the licence {row['licence']!r}")
    # A probe is read by its vocabulary.
    return found or _vocabulary(manifest["vocabulary"]) or _probe(manifest["probe"])


def _is_flat(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return True
    return False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return _is_count(abs(value)) if type(value) is int else type(value) is float and math.isfinite(value)


def _licences(licences: dict[str, Any]) -> list[str]:
    if set(licences) != {"models", "data"}:
        return [f"field 'licences' has the keys {sorted(licences)}; expected models and data"]
    if any(type(entries) is not list or any(type(e) is not str for e in entries) for entries in licences.values()):
        return ["field 'licences' holds something else than lists of licences"]
    return []


def _architecture(architecture: dict[str, Any]) -> list[str]:
    found = [
        f"field 'architecture' has a bad {key}: {architecture[key]!r}"
        for key in ("class", "model_type")
        if not isinstance(architecture.get(key), (str, type(None)))
    ]
    if "class" not in architecture:
        found.append("field 'architecture' has no class")
    if not _is_count(architecture.get("num_parameters", 0)):
        found.append(f"bad num_parameters {architecture['num_parameters']!r}")
    if type(architecture.get("remote_code", False)) is not bool:
        found.append(f"bad remote_code {architecture['remote_code']!r}")
    return found


def _vocabulary(vocabulary: dict[str, Any]) -> list[str]:
    if not all(_is_count(vocabulary.get(key)) for key in ("size", "embedding_rows")):
        return ["field 'vocabulary' has no size and embedding_rows that are counts"]
    special = vocabulary.get("special_tokens")
    if not isinstance(special, dict) or not {*_TOKENS, "stop"} <= set(special):
        return [f"field 'vocabulary' has no special_tokens with {', '.join(_TOKENS)} and stop"]
    stop = special["stop"]
    ids = [special[role] for role in _TOKENS if special[role] is not None]
    ids += stop if isinstance(stop, list) else [stop]
    return [f"bad id of a special token: {token!r}" for token in ids if type(token) is not int]


def _probe(probe: dict[str, Any]) -> list[str]:
    output, inputs, expected = (probe.get(key) for key in ("output", "input_ids", "expected"))
    if output not in ("score", "logits"):
        return [f"field 'probe' has the output {output!r}; expected score or logits"]
    size = probe.get("vocabulary_size")
    if not _is_count(size) or not size:
        return [f"field 'probe' has the vocabulary_size {size!r}"]
    if not isinstance(inputs, list) or not inputs or not all(_is_ids(row, size) for row in inputs):
        return [f"field 'probe' has no input_ids: lists of ids below {size}"]
    if sum(len(row) for row in inputs) > _MAX_PROBE_IDS:
        return [f"field 'probe' has more than {_MAX_PROBE_IDS} input_ids"]
    columns = probe.get("vocabulary_ids") if output == "logits" else []
    if output == "logits" and not _is_ids(columns, size):
        return [f"field 'probe' has no vocabulary_ids: a list of ids below {size}"]
    for key in ("atol", "rtol"):
        if not _is_number(probe.get(key)) or not 0 <= probe[key] <= _MAX_TOLERANCE:
            return [f"field 'probe' has the {key} {probe.get(key)!r}; expected 0 to {_MAX_TOLERANCE}"]
    width = len(columns or []) + 1  # the logsumexp, or the score
    if not isinstance(expected, list) or len(expected) != len(inputs):
        return ["field 'probe' has not one row of expected outputs for each of input_ids"]
    if not all(isinstance(row, list) and len(row) == width and all(map(_is_number, row)) for row in expected):
        return [f"field 'probe' has expected outputs other than {width} finite numbers a row"]
    return []


def _is_ids(row: Any, size: int) -> bool:
    return isinstance(row, list) and bool(row) and all(type(token) is int and 0 <= token < size for token in row)

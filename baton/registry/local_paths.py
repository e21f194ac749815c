"""What a publisher's files say of the publisher's machine: paths, taken out before anything is stored."""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeGuard

from baton.registry.checks import ADAPTER_CONFIG, is_local
from baton.registry.vocabulary import read_json

if TYPE_CHECKING:
    from baton.registry.version import Version

_PATH_KEYS = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "best_model_checkpoint",
)
_DATA = ("tokenizer.json", "vocab.json", "added_tokens.json")
_TOKENS = ("content", "chat_template", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens")
_MAX_BYTES = 64 << 20
_MAX_TEXT = 4096
_INSIDE = re.compile(r"(?:(?<==)|(?<=file://))/[^\s\"'=;,]+")
"""A path in an address or a command's option."""


def without_local_paths(path: Path, base: "Version | None") -> bytes | None:
    """The file's bytes without this machine's paths, an adapter's base by digest; None: keep it as it is."""
    if path.name == "README.md":
        return _model_card(path, base)
    if path.suffix != ".json" or path.name in _DATA or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(settings, dict):
        return None
    changed = _without(settings)
    if path.name == ADAPTER_CONFIG and base:
        changed |= {"base_model_name_or_path": f"baton:{base.digest}", "revision": None}
        # PEFT writes sets, whose order changes from process to process: one adapter would get two digests.
        for key in ("target_modules", "exclude_modules"):
            if isinstance(changed.get(key), list):
                changed[key] = sorted(changed[key])
    if changed == settings:
        return None
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not (key in _PATH_KEYS and _is_local(item))}
        # A token may look like a path; what tokens are decides what the model reads.
        is_token = [key in _TOKENS or key.endswith("_token") for key in kept]
        return {key: item if skip else _without(item) for (key, item), skip in zip(kept.items(), is_token, strict=True)}
    if isinstance(value, list):
        return [_without(item) for item in value]
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        return _shortened(value) if _is_path_here(value) else _INSIDE.sub(_shorten_match, value)
    return value


def _shorten_match(match: re.Match[str]) -> str:
    return _shortened(match[0]) if _is_path_here(match[0]) else match[0]


def _shortened(path: str) -> str:
    return "…/" + PurePosixPath(path).name


def _is_path_here(value: str) -> bool:
    if not os.path.isabs(value) or value.count("/") < 2 or "\0" in value:
        return False
    # A sentence may begin with a folder that is here: with spaces in it, it is a path only if there is such a file.
    return os.path.exists(value) or (not re.search(r"\s", value) and os.path.exists(os.path.dirname(value)))


def _model_card(path: Path, base: "Version | None") -> bytes | None:
    text = card = path.read_text("utf-8", errors="replace")
    for name, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), ("config.json", "_name_or_path")):
        settings = read_json(path.parent / name) if (path.parent / name).is_file() else {}
        named = settings.get(key)
        if _is_local(named) and "/" in named:  # "." or "out" is in every other sentence
            card = card.replace(named, f"baton:{base.digest}" if base else f"…/{Path(named).name}")
    card = card.replace(str(path.parent.absolute()), f"…/{path.parent.name}")
    return None if card == text else card.encode("utf-8")


def _is_local(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and is_local(value)

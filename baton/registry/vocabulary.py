"""What a tokenizer's files say: its size, special tokens, and digests of it and of the chat template."""

import json
from pathlib import Path
from typing import Any

from baton.errors import UserError
from baton.registry.manifest import canonical, digest_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. Save the model and its tokenizer with save_pretrained.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value


def tokenizer_digest(folder: Path) -> str:
    """A digest of what the tokenizer does.

    Truncation and padding are left out: trainers switch them on in passing, and save_pretrained keeps them.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    return digest_of(canonical({**tokenizer, "truncation": None, "padding": None}))


def tokenizer_identity(folder: Path) -> dict[str, Any]:
    """What tells one tokenizer from another: the digest of what it does, and sha256 of each file that says more.

    Beside `tokenizer.json` lie the tokens that begin, end and pad a text, and the chat template.
    """
    others = [folder / name for name in TOKENIZER_FILES if name != "tokenizer.json"]
    files = {path.name: digest_of(path.read_bytes()) for path in others if path.is_file()}
    return {"digest": tokenizer_digest(folder), "files": files}


def chat_template(folder: Path) -> str | None:
    """The chat template's text, from either place where transformers keeps it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def chat_template_digest(folder: Path) -> str | None:
    """A digest of the chat template's text; None when there is none."""
    template = chat_template(folder)
    return None if template is None else digest_of(template.encode("utf-8"))


def token_ids(folder: Path) -> dict[str, int]:
    """Every token of `tokenizer.json` with its id, added tokens included."""
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
        return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a tokenizer ({error!r}). Save it with save_pretrained.") from error


def special_tokens(folder: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Ids of bos, eos, pad and unk (None where unset), and `stop`: every id that ends a generation."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    found: dict[str, Any] = {}
    for role in ("bos", "eos", "pad", "unk"):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and token not in ids:
            raise UserError(
                f"{folder}: the {role} token {token!r} is not in tokenizer.json, so it has no id. "
                "Add it to the tokenizer and save both again."
            )
        found[role] = None if token is None else ids[token]
    stops = {found["eos"]} | set(_eos_ids(folder))
    found["stop"] = sorted(stop for stop in stops if stop is not None)
    return found


def _eos_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = read_json(folder / name).get("eos_token_id")
            if eos is not None:
                return eos if isinstance(eos, list) else [eos]
    return []

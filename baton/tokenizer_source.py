"""An existing tokenizer to pretrain with (`tokenizer.path`): a folder, a hub id@revision, or a registry version's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.vocabulary import TOKENIZER_FILES, tokenizer_identity


class TokenizerSource(NamedTuple):
    """Where a tokenizer lies: a local folder, or a hub id with its revision."""

    where: str
    revision: str | None = None

    def identity(self) -> dict[str, Any]:
        """What identifies its content: digests of local files, the revision of a hub id."""
        if self.revision is not None:
            return {"hub": self.where, "revision": self.revision}
        return tokenizer_identity(Path(self.where))


def tokenizer_source(setting: str, folder: Path, registry: Callable[[], Registry]) -> TokenizerSource:
    """Where `tokenizer.path` points; a relative folder starts at `folder`. Raises UserError where it points nowhere.

    The registry is opened only for a reference into it: text can be prepared where there is none yet.
    """
    local = Path(setting).expanduser()
    if not local.is_absolute() and not local.exists():
        local = folder / local
    if local.is_dir():
        if not (local / "tokenizer.json").is_file():
            known = sorted(path.name for path in local.iterdir() if path.name in TOKENIZER_FILES)
            raise UserError(
                f"tokenizer.path: the folder {setting} holds no tokenizer.json"
                + (f" but {', '.join(known)}: load and save it with transformers once" if known else "")
            )
        return TokenizerSource(str(local))
    if setting.startswith((".", "/", "~")):
        raise UserError(f"tokenizer.path: there is no folder {setting}")
    if re.search(r"@sha256:|:", setting):
        opened = registry()
        return TokenizerSource(str(opened.materialise(opened.resolve(setting))))
    name, at, revision = setting.partition("@")
    if at and revision and name.count("/") == 1:
        return TokenizerSource(name, revision)
    raise UserError(
        f"tokenizer.path: {setting} is neither a folder nor complete: write {setting}:ALIAS or {setting}:NUMBER for a "
        f"registry version, or {setting}@REVISION for a hub id"
    )


def existing_tokenizer(
    setting: str, folder: Path, registry: str, home: Path, say: Callable[[str], None] = print
) -> Path:
    """The folder below `home` that the tokenizer at `tokenizer.path` was written to, now or before."""
    source = tokenizer_source(setting, folder, lambda: Registry(registry))
    key = hashlib.sha256(json.dumps(source.identity(), sort_keys=True).encode()).hexdigest()
    kept = home / key[:16]
    if not kept.is_dir():
        with TemporaryDirectory(dir=_made(home), prefix="new-") as aside:
            say(fetch_tokenizer(source, Path(aside) / "tokenizer"))
            with suppress(OSError):  # another process was first, with the same content
                (Path(aside) / "tokenizer").rename(kept)
    return kept


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_tokenizer(source: TokenizerSource, out: Path) -> str:
    """Write the tokenizer to the folder `out`, as it is; a line on its size and on what dialogues can be written in.

    Base training needs no chat tokens; stage 2 will do with what there is. Raises UserError where it cannot be loaded,
    or has no token to put between documents.
    """
    from transformers import AutoTokenizer

    from baton.chat_templates import choose

    shown = f"{source.where}@{source.revision}" if source.revision else source.where
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source.where, revision=source.revision or "main", trust_remote_code=False
        )
        tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tokenizer.path: {shown} does not load as a tokenizer: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.path: {shown} has no eos_token, which ends a document; set one and save it")
    tokenizer.save_pretrained(out)
    return f"tokenizer {shown}: {len(tokenizer):,} tokens; for dialogues: {choose(tokenizer, 'auto', out).describe()}"

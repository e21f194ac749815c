"""Random damage: bundles, manifests and references never crash, and never let anything in that differs.

The suite runs a quick, repeatable profile. `BATON_FUZZ_EXAMPLES=20000 pytest tests/baton/registry/test_fuzz.py` runs
that many examples of each test, new ones every time.
"""

import hashlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.errors import UserError
from baton.registry import Registry, records, reference
from baton.registry import manifest as manifests
from baton.registry.travel import bundle
from baton.registry.travel import index as indices
from baton.registry.travel.archive import END, header, padding
from baton.registry.trust import attestations
from tests.baton.registry.travel.made_up import add_family, manifest

EXAMPLES = os.environ.get("BATON_FUZZ_EXAMPLES")


def examples(quick: int) -> Callable[[Any], Any]:
    """How many examples a test runs: `quick` in the suite, the same every time."""
    return settings(
        max_examples=int(EXAMPLES or quick),
        derandomize=EXAMPLES is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Target:
    """A registry that notices what is registered in it, and is emptied again."""

    def __init__(self, folder: Path) -> None:
        """folder: where it lies."""
        self.folder = folder
        self.registry = Registry(folder, create=True)
        self.empty = self.files()

    def files(self) -> set[str]:
        """Every path in it."""
        return {entry.path for entry in self.registry.store.walk("")}

    def clear(self) -> None:
        """Remove what is new."""
        for path in self.files() - self.empty:
            self.registry.store.delete(path)
        self.registry = Registry(self.folder)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Where the bundles go."""
    return Target(tmp_path_factory.mktemp("fuzz") / "target")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bundle of a base, an adapter and an attestation."""
    source = Registry(tmp_path_factory.mktemp("fuzz") / "source", create=True)
    base, adapter = add_family(source)
    attestations.attest(source, base.digest, "evaluation", {"metrics": {"accuracy": 0.5}})
    stream = io.BytesIO()
    bundle.export(source, adapter, stream)
    return stream.getvalue()


def members(data: bytes) -> list[tuple[str, bytes]]:
    """A bundle taken apart by its own headers."""
    found, at = [], 0
    while data[at : at + 512].strip(b"\0"):
        name, prefix = data[at : at + 100].rstrip(b"\0").decode(), data[at + 345 : at + 500].rstrip(b"\0").decode()
        size = int(data[at + 124 : at + 135], 8)
        found.append((f"{prefix}/{name}" if prefix else name, data[at + 512 : at + 512 + size]))
        at += 512 + size + padding(size)
    return found


def mutated(data: bytes, choose: random.Random, is_archive: bool) -> bytes:
    """One to three changes: bits, bytes, blocks removed, doubled, swapped or put in; headers whose checksum fits."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(len(changed) + 1)
        block = at // 512 * 512
        match choose.randrange(9 if is_archive else 8):
            case 0 if at < len(changed):
                changed[at] ^= 1 << choose.randrange(8)
            case 1 if at < len(changed):
                changed[at] = choose.choice([0, 0x20, 0x2F, 0x2E, 0x30, 0x37, 0x80, 0xFF])
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + choose.randint(1, 600)]
            case 4:
                changed[at:at] = choose.randbytes(choose.randint(1, 600))
            case 5:
                del changed[block : block + 512]
            case 6:
                changed[block:block] = changed[block : block + 512]
            case 7:
                other = choose.randrange(max(len(changed), 1)) // 512 * 512
                one, two = bytes(changed[block : block + 512]), bytes(changed[other : other + 512])
                changed[block : block + 512], changed[other : other + 512] = two, one
            case 8:
                # a header field of any value, with a checksum that fits
                name, content = choose.choice(members(data))
                made = bytearray(header(name, len(content)))
                start = choose.choice([0, 100, 108, 124, 125, 136, 156, 157, 257, 263, 265, 329, 345, 500])
                made[start : start + 1] = choose.randbytes(1)
                made[148:156] = b" " * 8
                made[148:156] = b"%06o\0 " % sum(made)
                found = data.find(header(name, len(content)))
                changed[found : found + 512] = made
        if not changed:
            break
    return bytes(changed)


def must_not_differ(target: Target, data: bytes, is_good: bool) -> None:
    """Import; whatever is not the very bundle is refused, and leaves nothing."""
    try:
        bundle.import_bundle(target.registry, io.BytesIO(data))
    except UserError:
        assert not is_good
        assert target.files() == target.empty
        return
    assert is_good
    assert target.registry.verify_all() == []
    target.clear()


@examples(150)
@given(seed=st.integers(0, 2**64 - 1))
def test_random_damage_to_a_bundle(seed: int, good: bytes, target: Target) -> None:
    data = mutated(good, random.Random(seed), is_archive=True)
    must_not_differ(target, data, data == good)


@examples(60)
@given(data=st.binary(max_size=3000))
def test_random_bytes_are_no_bundle(data: bytes, target: Target) -> None:
    must_not_differ(target, data, False)
    must_not_differ(target, header("bundle.json", len(data)) + data + bytes(padding(len(data))) + END, False)


WORDS = st.sampled_from(["", "a", "team/base", "../x", "/x", "é", "\ud800", "\u202e", "sha256:" + "0" * 64, "0" * 64])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with something else at one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def spelled(value: Any) -> bytes:
    """JSON as `canonical` spells it, and as nearly as possible where it would refuse."""
    try:
        return manifests.canonical(value)
    except ValueError:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@examples(100)
@given(data=st.data())
def test_random_changes_to_an_index_whose_digest_fits(data: st.DataObject, good: bytes, target: Target) -> None:
    (_, old), *files = members(good)
    content = {key: value for key, value in json.loads(old).items() if key != "sha256"}
    changed = replaced(content, data.draw(st.sampled_from(places(content))), data.draw(VALUES))
    if isinstance(changed, dict):
        changed = changed | {"sha256": hashlib.sha256(spelled(changed)).hexdigest()}
    index = spelled(changed)
    pieces = [("bundle.json", index), *files]
    packed = b"".join(header(path, len(file)) + file + bytes(padding(len(file))) for path, file in pieces) + END
    digests = {f"sha256:{Path(path).stem}" for path, _ in files if path.startswith("manifests/")}
    try:
        versions = bundle.import_bundle(target.registry, io.BytesIO(packed))
    except UserError:
        assert target.files() == target.empty
        return
    # Its author may say what the registry is and what the versions are called, and nothing else.
    assert {version.digest for version in versions} <= digests
    assert all(reference.is_reference(version.ref) for version in versions)
    assert set(target.registry.references()) <= digests and target.registry.verify_all() == []
    target.clear()


@examples(150)
@given(data=st.data())
def test_manifests(data: st.DataObject) -> None:
    content = manifest({"config.json": b"{}"}, parents={"sft": "sha256:" + "1" * 64})
    for _ in range(data.draw(st.integers(1, 2))):
        content = replaced(content, data.draw(st.sampled_from(places(content))), data.draw(VALUES))
    written = spelled(content)
    if data.draw(st.booleans()):
        written = mutated(written, random.Random(data.draw(st.integers(0, 2**64 - 1))), is_archive=False)
    try:
        read = manifests.parse(written, manifests.digest_of(written), "here")
    except UserError as error:
        assert "here" in str(error)
        return
    assert manifests.canonical(read) == written
    assert all(manifests.is_safe_path(entry["path"]) for entry in read["files"])
    with pytest.raises(UserError, match="is damaged"):
        manifests.parse(written, "sha256:" + "0" * 64, "here")


@examples(100)
@given(data=st.binary(max_size=200))
def test_bytes_as_manifests_records_attestations_and_indices(data: bytes) -> None:
    for parse in (
        lambda: manifests.parse(data, manifests.digest_of(data), "here"),
        lambda: records.unsealed("models/a/b/versions/0000001.json", data, "here"),
        lambda: attestations.parse(data, "sha256:" + "0" * 64, "here"),
        lambda: indices.from_bytes(data, "here"),
    ):
        with pytest.raises(UserError, match="here"):
            parse()


NAME = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,5}/[a-z0-9][a-z0-9._-]{0,5}", fullmatch=True)
SELECTOR = st.from_regex(r"(:[0-9]{1,8}|:[a-z0-9._-]{0,5}|@sha256:[0-9a-f]{63,65})", fullmatch=True)


@examples(200)
@given(text=st.text(max_size=30) | st.builds(str.__add__, NAME, SELECTOR) | st.text("ab/:@.-_0\n\0é٣", max_size=12))
def test_references(text: str) -> None:
    try:
        parsed = reference.parse(text)
    except UserError:
        assert not reference.is_reference(text)
        return
    assert sum(part is not None for part in (parsed.number, parsed.alias, parsed.digest)) == 1
    parts = parsed.name.split("/")
    assert len(parts) == 2 and all(part.isascii() and part[0].isalnum() and part == part.lower() for part in parts)
    selector = f"@{parsed.digest}" if parsed.digest else f":{parsed.alias}" if parsed.alias else None
    assert text == parsed.name + selector if selector else int(text.rpartition(":")[2]) == parsed.number
    assert not {"..", "."} & set(text.replace(":", "/").split("/"))

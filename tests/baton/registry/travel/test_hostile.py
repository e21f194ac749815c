"""Hostile bundles: each is refused by a message that says why, and nothing is written but to the workspace."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.manifest import canonical, digest_of, manifest_path
from baton.registry.travel import bundle
from baton.registry.travel import index as indices
from baton.registry.travel.archive import END, header, padding
from baton.registry.trust import attestations
from tests.baton.registry.conftest import paths
from tests.baton.registry.travel.made_up import FILES, NO_DIGEST, add, add_family, manifest


@dataclass
class Bundle:
    """A bundle in parts, to be spoiled: its index and its files in their order."""

    index: dict[str, Any]
    files: list[tuple[str, bytes]] = field(default_factory=list)

    def with_files(self, files: list[tuple[str, bytes]]) -> "Bundle":
        """Other files, in their order, and an index that fits."""
        files = sorted(files, key=lambda file: indices.order(file[0]))
        entries = [{"path": path, "size": len(data), "sha256": Path(path).stem} for path, data in files]
        return replace(self, index=self.index | {"files": entries}, files=files)

    def with_index(self, **changes: Any) -> "Bundle":
        """Another index."""
        return replace(self, index=self.index | changes)

    def with_manifest(self, **changes: Any) -> "Bundle":
        """Another manifest of the adapter, with names and digests that fit."""
        return self.with_last_manifest(canonical(json.loads(self.last_manifest()) | changes))

    def with_last_manifest(self, data: bytes) -> "Bundle":
        """Another manifest of the adapter, with names and digests that fit."""
        versions = [*self.index["versions"][:-1], self.index["versions"][-1] | {"digest": digest_of(data)}]
        files = [file for file in self.files if file[1] != self.last_manifest() and not file[0].startswith("attest")]
        files.append((manifest_path(digest_of(data)), data))
        return self.with_files(files).with_index(versions=versions)

    def last_manifest(self) -> bytes:
        """The adapter's."""
        return dict(self.files)[manifest_path(self.index["versions"][-1]["digest"])]

    def members(self) -> list[tuple[bytes, bytes]]:
        """(header, content) of the index and every file."""
        content = {key: value for key, value in self.index.items() if key != "sha256"}
        data = canonical(content | {"sha256": hashlib.sha256(canonical(content)).hexdigest()})
        return [(header(path, len(data)), data) for path, data in [("bundle.json", data), *self.files]]

    def pack(self) -> bytes:
        """The archive."""
        return archive(self.members())

    def with_header(self, at: int, block: bytes) -> bytes:
        """The archive, with another header for the file `at` (0 is the index)."""
        members = self.members()
        members[at] = (block, members[at][1])
        return archive(members)


def archive(members: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(block + data + bytes(padding(len(data))) for block, data in members) + END


def block(name: bytes, size: int, kind: bytes = b"0", at: dict[int, bytes] | None = None) -> bytes:
    """A header with the right checksum of any name and type, other fields replaced where `at` says."""
    made = bytearray(header("x", size))
    for start, value in {0: name.ljust(100, b"\0")[:100], 156: kind, **(at or {})}.items():
        made[start : start + len(value)] = value
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def without_blob(good: Bundle, which: int) -> Bundle:
    blobs = [file for file in good.files if file[0].startswith("blobs/")]
    return good.with_files([file for file in good.files if file != blobs[which]])


def with_blob(good: Bundle, name: str, data: bytes) -> Bundle:
    """The adapter with one more file."""
    sha256 = hashlib.sha256(data).hexdigest()
    old = json.loads(good.last_manifest())
    entries = [*old["files"], {"path": name, "sha256": sha256, "size": len(data)}]
    spoiled = good.with_manifest(files=sorted(entries, key=lambda entry: entry["path"]))
    return spoiled.with_files([*spoiled.files, (f"blobs/sha256/{sha256}", data)])


def renamed(good: Bundle, *names: str) -> bytes:
    """The adapter with the first files of its manifest called otherwise."""
    old = json.loads(good.last_manifest())
    entries = [entry | {"path": name} for entry, name in zip(old["files"], names, strict=False)]
    return good.with_manifest(files=[*entries, *old["files"][len(names) :]]).pack()


def with_raw_manifest(good: Bundle, old: bytes, new: bytes) -> bytes:
    """The adapter with a manifest that no JSON writer of Baton's would write."""
    assert old in good.last_manifest()
    return good.with_last_manifest(good.last_manifest().replace(old, new)).pack()


def resized(good: Bundle, name: str) -> bytes:
    """The adapter with a manifest that makes a file of it a byte larger."""
    old = json.loads(good.last_manifest())
    entries = [entry | {"size": entry["size"] + (entry["path"] == name)} for entry in old["files"]]
    return good.with_manifest(files=entries).pack()


def with_base(good: Bundle, **changes: Any) -> bytes:
    """An adapter on another manifest, which is in the bundle."""
    files = dict(good.files)
    base = canonical(json.loads(files[manifest_path(good.index["versions"][0]["digest"])]) | changes)
    versions = [good.index["versions"][0] | {"digest": digest_of(base)}, good.index["versions"][1]]
    del files[manifest_path(good.index["versions"][0]["digest"])]
    spoiled = good.with_files([*files.items(), (manifest_path(digest_of(base)), base)]).with_index(versions=versions)
    return spoiled.with_manifest(base=digest_of(base), parents={}).pack()


def with_attestation(good: Bundle, lies_under: str, **changes: Any) -> bytes:
    record = {"type": "approval", "subject": good.index["versions"][-1]["digest"], "by": "ann", "time": "t", "body": {}}
    data = canonical(record | changes)
    path = f"attestations/{lies_under.removeprefix('sha256:')}/{hashlib.sha256(data).hexdigest()}.json"
    return good.with_files([*good.files, (path, data)]).pack()


def entry(good: Bundle, at: int, **changes: Any) -> bytes:
    """One entry of the index changed."""
    files = [*good.index["files"]]
    files[at] = files[at] | changes
    return good.with_index(files=files).pack()


def packed_index(data: bytes) -> bytes:
    return archive([(header("bundle.json", len(data)), data)])


def flipped(good: Bundle, at: int) -> bytes:
    """A bit of the file `at` flipped; its index says what it said."""
    members = good.members()
    data = bytearray(members[at][1])
    data[len(data) // 2] ^= 1
    members[at] = (members[at][0], bytes(data))
    return archive(members)


def zipped(data: bytes, name: str = "bundle.tar") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, data)
    return stream.getvalue()


def version(good: Bundle, **changes: Any) -> bytes:
    versions = good.index["versions"]
    return good.with_index(versions=[*versions[:-1], versions[-1] | changes]).pack()


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


HEADERS: dict[str, tuple[Callable[[Bundle], bytes], str]] = {
    name: (lambda good, made=made: good.with_header(1, made), message)
    for name, made, message in [
        ("a path that leads out", block(b"../../evil", 7), r"'../../evil' leads out of the bundle"),
        ("a path that leads out inside", block(b"blobs/../../evil", 7), "leads out of the bundle"),
        ("an absolute name", block(b"/etc/passwd", 7), "'/etc/passwd' is an absolute name"),
        ("an absolute name of Windows", block(b"C:\\evil", 7), "is an absolute name"),
        ("a backslash", block(b"blobs\\..\\evil", 7), "leads out of the bundle"),
        ("a hard link", block(b"blobs/x", 0, b"1", {157: b"/etc/passwd"}), "'blobs/x' is a hard link"),
        ("a symbolic link", block(b"blobs", 0, b"2", {157: b"/etc"}), "'blobs' is a symbolic link"),
        ("a character device", block(b"null", 0, b"3"), "is a character device"),
        ("a block device", block(b"sda", 0, b"4"), "is a block device"),
        ("a folder", block(b"blobs/", 0, b"5"), "is a folder"),
        ("a fifo", block(b"pipe", 0, b"6"), "is a fifo"),
        ("a contiguous file", block(b"x", 1, b"7"), "is a contiguous file"),
        ("a pax header", block(b"PaxHeaders/x", 20, b"x"), "is a pax header"),
        ("a global pax header", block(b"pax", 20, b"g"), "is a global pax header"),
        ("a GNU long name", block(b"././@LongLink", 200, b"L", {257: b"ustar  \0"}), "is a GNU long name"),
        ("a GNU long link", block(b"././@LongLink", 200, b"K"), "is a GNU long link"),
        ("a sparse file", block(b"x", 1, b"S", {257: b"ustar  \0"}), "is a sparse file"),
        ("a file of GNU tar", block(b"x", 1, b"0", {257: b"ustar  \0"}), "in the format of GNU tar"),
        ("an unknown type", block(b"x", 1, b"Q"), "of an unknown type"),
        ("an old file", block(b"x", 1, b"\0"), "before ustar"),
        ("a name outside the grammar", block(b"notes.txt", 7), "found 'notes.txt', expected manifests/"),
        ("a name with a null", block(b"manifests\0/x", 7), "found 'manifests', expected manifests/"),
        ("a name of letters that look alike", block("mаnifests/x".encode(), 7), r"found 'm\\\\xd0\\\\xb0nifests/x'"),
        ("an empty name", block(b"", 7), "found '', expected manifests/"),
        ("a wrong checksum", header("x", 7)[:148] + b"0000000\0" + header("x", 7)[156:], "wrong checksum"),
        ("a header of noise", bytes(range(256)) * 2, "expected the one|in the format of GNU tar or of an unknown"),
        ("an end too early", bytes(512), "the archive ends before manifests/"),
    ]
}
INDEX: dict[str, tuple[Callable[[Bundle], bytes], str]] = {
    "an index that leads out": (lambda good: entry(good, 0, path="../evil"), "'../evil' is an unsafe name"),
    "an absolute name in the index": (lambda good: entry(good, 0, path="/evil"), "'/evil' is an unsafe name"),
    "a stray name in the index": (lambda good: entry(good, 0, path="notes.txt"), "'notes.txt' is no name of a file"),
    "a record in the index": (
        lambda good: entry(good, 0, path="models/team/base/versions/0000001.json"),
        "is no name of a file in a bundle",
    ),
    "a name twice in the index": (
        lambda good: good.with_index(files=[good.index["files"][0], *good.index["files"]]).pack(),
        "occurs twice",
    ),
    "capitals in the index": (
        lambda good: good.with_index(
            files=[*good.index["files"], good.index["files"][-1] | {"path": good.index["files"][-1]["path"].upper()}]
        ).pack(),
        "differs from another name in capitals only",
    ),
    "letters that look alike in the index": (
        lambda good: entry(good, 0, path=good.index["files"][0]["path"].replace("a", "а")),
        "is no name of a file in a bundle",
    ),
    "an index in another order": (
        lambda good: good.with_index(files=good.index["files"][::-1]).pack(),
        "stands at the wrong place",
    ),
    "a digest that is not the name's": (lambda good: entry(good, -1, sha256="0" * 64), "would have the digest 0000"),
    "a size too large to be true": (lambda good: entry(good, -1, size=1 << 70), "would have 1180591620717411303424"),
    "a negative size": (lambda good: entry(good, -1, size=-1), "would have -1 bytes"),
    "a size that is none": (lambda good: entry(good, -1, size=True), "bad entry"),
    "a manifest too large": (lambda good: entry(good, 0, size=17 << 20), "would have 17825792 bytes"),
    "more than the disk has room for": (lambda good: entry(good, -1, size=1 << 59), "has room for"),
    "an entry with more to say": (lambda good: entry(good, 0, mode=0o4755), "bad entry"),
    "no files": (lambda good: good.with_index(files=[]).pack(), "names 0 files"),
    "too many files": (
        lambda good: good.with_index(files=[{"path": "", "size": 0, "sha256": ""}] * 100_001).pack(),
        "names 100001 files; from 1 to 100000",
    ),
    "an index too large": (
        lambda good: good.with_header(0, header("bundle.json", (32 << 20) + 1)),
        "bundle.json would have 33554433 bytes; 33554432 is the most",
    ),
    "an index without a size": (
        lambda good: good.with_header(0, block(b"bundle.json", 0, at={124: b"zzzzzzzzzzz\0"})),
        "the header of bundle.json is not the one",
    ),
    "no index": (lambda good: archive(good.members()[1:]), "found 'manifests/.*expected bundle.json"),
    "an index that is not JSON": (lambda good: packed_index(b"{"), "is not JSON"),
    "an index nested deeply": (lambda good: packed_index(b"[" * 100_000), "is not JSON"),
    "an index with a number too long": (lambda good: packed_index(b"9" * 5000), "is not JSON"),
    "an index of no number": (lambda good: packed_index(b'{"format":NaN}'), "is not JSON"),
    "an index with half a character": (lambda good: packed_index(b'{"format":"\\ud800"}'), "is not JSON"),
    "an index with a key twice": (
        lambda good: packed_index(b'{"format":"baton.bundle/1","format":"baton.bundle/1"}'),
        "not an object in canonical JSON",
    ),
    "an index that is a list": (lambda good: packed_index(b"[]"), "not an object in canonical JSON"),
    "an index of a later format": (
        lambda good: good.with_index(format="baton.bundle/2").pack(),
        "expected format 'baton.bundle/1', found 'baton.bundle/2'",
    ),
    "an index with more to say": (lambda good: good.with_index(run="evil").pack(), "expected the fields format"),
    "an index without a field": (
        lambda good: packed_index(canonical({"format": "baton.bundle/1"})),
        "expected the fields format",
    ),
    "an index that was changed": (
        lambda good: good.pack().replace(b"team/adapter", b"teem/adapter"),
        "it has changed since it was written",
    ),
    "a registry that is none": (lambda good: good.with_index(registry="../x").pack(), "bad registry id '../x'"),
    "no version": (lambda good: good.with_index(versions=[]).pack(), "it names no version"),
    "a version of a manifest elsewhere": (lambda good: version(good, digest=NO_DIGEST), "has a manifest elsewhere"),
    "a version at a path": (lambda good: version(good, name="../evil"), "bad name '../evil'"),
    "a version with a name of other letters": (lambda good: version(good, name="tеam/adapter"), "bad name"),
    "a version with number zero": (lambda good: version(good, number=0), "bad version"),
    "a version twice": (
        lambda good: good.with_index(versions=good.index["versions"][:1] * 2).pack(),
        "is named twice",
    ),
    "left out, and there": (
        lambda good: good.with_index(
            without={"refs": [], "manifests": [good.index["versions"][0]["digest"]], "blobs": []}
        ).pack(),
        "holds what it says to leave out",
    ),
    "left out, and not here": (
        lambda good: good.with_index(without={"refs": ["a/b:1"], "manifests": [NO_DIGEST], "blobs": []}).pack(),
        r"needs what it does not hold \(it was exported without a/b:1\) and .* lacks: sha256:0000",
    ),
    "a reference left out that is none": (
        lambda good: good.with_index(without={"refs": ["\x1b[2J"], "manifests": [], "blobs": []}).pack(),
        "is not a reference",
    ),
}
STREAM: dict[str, tuple[Callable[[Bundle], bytes], str]] = {
    "nothing": (lambda good: b"", "is cut off at byte 0"),
    "a text": (lambda good: b"Dear reader, " * 100, "is not a bundle: expected a ustar archive"),
    "cut off in a header": (lambda good: good.pack()[:700], "is cut off at byte 700"),
    "cut off in a blob": (lambda good: good.pack()[:-1500], "is cut off at byte"),
    "cut off before its end": (lambda good: good.pack()[:-1024], "is cut off .* before the end of the archive"),
    "cut off in its end": (lambda good: good.pack()[:-1], "is cut off"),
    "bytes after its end": (lambda good: good.pack() + b"x", "goes on after its end"),
    "zeros after its end": (lambda good: good.pack() + bytes(512), "goes on after its end"),
    "a second archive after it": (lambda good: good.pack() * 2, "goes on after its end"),
    "one zero block, then a file": (
        lambda good: good.pack()[:-512] + header("x", 0) + END,
        "goes on after its end",
    ),
    "a file that its index does not name": (
        lambda good: archive([*good.members(), (header("x", 1), b"x")]),
        "found 'x', expected the end of the archive",
    ),
    "a file twice": (
        lambda good: archive([*good.members()[:2], good.members()[1], *good.members()[2:]]),
        "manifests/.* occurs twice",
    ),
    "a file in capitals": (
        lambda good: good.with_header(1, block(good.files[0][0].upper().encode(), len(good.files[0][1]))),
        "in capitals only",
    ),
    "files in another order": (
        lambda good: archive([good.members()[0], good.members()[2], good.members()[1], *good.members()[3:]]),
        r"found 'manifests/.*', expected manifests/.* by the index",
    ),
    "a file shorter than its index says": (
        lambda good: good.with_header(1, block(good.files[0][0].encode(), 7)),
        "has 7 bytes; its index says",
    ),
    "a file of eight exbibytes": (
        lambda good: good.with_header(
            1, block(good.files[0][0].encode(), 0, at={124: b"\x80" + (1 << 63).to_bytes(11, "big")})
        ),
        "has 9223372036854775808 bytes; its index says",
    ),
    "a file that sets the user": (
        lambda good: good.with_header(
            1, block(good.files[0][0].encode(), len(good.files[0][1]), at={100: b"0004755\0"})
        ),
        "is not the one that Baton writes",
    ),
    "a file with an owner": (
        lambda good: good.with_header(1, block(good.files[0][0].encode(), len(good.files[0][1]), at={265: b"root"})),
        "is not the one that Baton writes",
    ),
    "bytes between two files": (
        lambda good: good.pack().replace(FILES["config.json"] + b"\0", FILES["config.json"] + b"x"),
        "bytes are hidden after the end of blobs/",
    ),
    "compressed by gzip": (lambda good: gzip.compress(good.pack()), "is compressed by gzip"),
    "compressed by zstd": (lambda good: zstandard.compress(good.pack()), "is compressed by zstd"),
    "compressed by xz": (lambda good: lzma.compress(good.pack()), "is compressed by xz"),
    "compressed by bzip2": (lambda good: bz2.compress(good.pack()), "is compressed by bzip2"),
    "compressed by zip": (lambda good: zipped(good.pack()), "is compressed by zip"),
    "a manifest with a flipped bit": (lambda good: flipped(good, 1), "manifests/.* is damaged: expected sha256"),
    "an attestation with a flipped bit": (lambda good: flipped(good, 3), "attestations/.* is damaged: expected"),
    "a blob with a flipped bit": (lambda good: flipped(good, -1), "is damaged: expected sha256"),
}
CONTENT: dict[str, tuple[Callable[[Bundle], bytes], str]] = {
    "a manifest that leads out": (lambda good: renamed(good, "../evil"), r"unsafe file path '\.\./evil'"),
    "a manifest with an absolute path": (lambda good: renamed(good, "/etc/passwd"), "unsafe file path '/etc/passwd'"),
    "a manifest with a path that is read from right to left": (
        lambda good: renamed(good, "config\u202enosj.json"),
        "unsafe file path",
    ),
    "a manifest with a line break in a path": (lambda good: renamed(good, "a\nb"), "unsafe file path"),
    "a manifest with a path twice": (lambda good: renamed(good, "a", "A"), "occurs twice"),
    "a manifest with a path spelled in two ways": (
        lambda good: renamed(good, "caf\u00e9", "cafe\u0301"),
        "occurs twice",
    ),
    "a manifest with a file in a file": (lambda good: renamed(good, "a", "a/b"), "'a' is a file and a folder"),
    "an adapter that brings files for its base": (
        lambda good: renamed(good, "base/config.json"),
        "an adapter with a file at base or in base/",
    ),
    "a manifest with half a character": (
        lambda good: with_raw_manifest(good, b'"licence":"mit"', b'"licence":"\\ud800"'),
        "is not a manifest that this Baton reads: it is not canonical JSON",
    ),
    "a manifest with a number that is none": (
        lambda good: with_raw_manifest(good, b'"recipe":{}', b'"recipe":{"a":NaN}'),
        "is not a manifest that this Baton reads: it is not canonical JSON",
    ),
    "a manifest of an unknown kind": (lambda good: good.with_manifest(kind="policy").pack(), "unknown kind 'policy'"),
    "a manifest with more to say": (lambda good: good.with_manifest(run="evil").pack(), "unknown field 'run'"),
    "an adapter without a base": (
        lambda good: good.with_manifest(base=None, parents={}).pack(),
        "kind adapter with base None",
    ),
    "an adapter whose base is missing": (
        lambda good: good.with_manifest(base=NO_DIGEST).pack(),
        "needs what it does not hold and .* lacks: sha256:0000",
    ),
    "a parent that is missing": (
        lambda good: good.with_manifest(parents={"sft": NO_DIGEST}).pack(),
        "needs what it does not hold and .* lacks: sha256:0000",
    ),
    "an adapter on a reward model": (lambda good: with_base(good, kind="reward"), "has a base of kind reward"),
    "a manifest that nothing needs": (
        lambda good: good.with_files(
            [*good.files, (manifest_path(digest_of(canonical(manifest({})))), canonical(manifest({})))]
        ).pack(),
        "which team/adapter:1 does not need",
    ),
    "a blob that no manifest names": (
        lambda good: good.with_files([*good.files, (f"blobs/sha256/{hashlib.sha256(b'x').hexdigest()}", b"x")]).pack(),
        "which no manifest of it names",
    ),
    "a blob that is missing": (lambda good: without_blob(good, 0).pack(), "needs what it does not hold .*the blob"),
    "a blob with another size in its manifest": (
        lambda good: resized(good, "adapter_model.safetensors"),
        "would have 11 bytes by its index, and 12 by the manifest, which calls it adapter_model",
    ),
    "a blob with two sizes": (lambda good: resized(good, "tokenizer.json"), "manifests disagree on the size"),
    "a pickle called tokenizer": (
        lambda good: with_blob(good, "tokenizer.model", pickle.dumps(Evil())).pack(),
        "the file tokenizer.model is a pickle",
    ),
    "a pickle of the oldest kind": (
        lambda good: with_blob(good, "notes.txt", pickle.dumps(Evil(), protocol=0)).pack(),
        "the file notes.txt is a pickle",
    ),
    "a pickle in a zip": (
        lambda good: with_blob(good, "x.safetensors", zipped(pickle.dumps(Evil()), "archive/data.pkl")).pack(),
        "the file x.safetensors is a zip archive with archive/data.pkl",
    ),
    "an attestation about another manifest": (
        lambda good: with_attestation(good, good.index["versions"][0]["digest"]),
        "is about sha256:.*, but lies under",
    ),
    "an attestation about nothing in it": (
        lambda good: with_attestation(good, NO_DIGEST, subject=NO_DIGEST),
        "is about a manifest that the bundle does not hold",
    ),
    "an attestation of an unknown type": (
        lambda good: with_attestation(good, good.index["versions"][-1]["digest"], type="promotion"),
        "not an attestation",
    ),
}
CASES = HEADERS | INDEX | STREAM | CONTENT


class Prepared(NamedTuple):
    """A good bundle in parts, and a registry to send it to."""

    good: Bundle
    target: Registry


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A base, an adapter on it, and what was said of the base."""
    root = tmp_path_factory.mktemp("hostile")
    source = Registry(root / "registry", create=True)
    base, adapter = add_family(source)
    attestations.attest(source, base.digest, "evaluation", {"metrics": {"accuracy": 0.5}})
    return parts(source, adapter, root / "good.tar")


def parts(source: Registry, version: Any, file: Path) -> Bundle:
    """A bundle taken apart, by Python's own reader."""
    import tarfile

    bundle.export(source, version, file)
    with tarfile.open(file, "r:") as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    made = Bundle(json.loads(found[0][1]), found[1:])
    assert made.pack() == file.read_bytes()
    return made


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with something in it, in a folder with other things beside it."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "evil").write_text("not yet")
    monkeypatch.chdir(tmp_path / "beside")
    made = Registry(tmp_path / "registry", create=True)
    add(made, "team/other", FILES)
    return made


def surroundings(folder: Path) -> dict[str, Any]:
    """Every file and folder with its content and times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != "tmp"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def test_there_are_enough_of_them() -> None:
    assert len(CASES) == sum(map(len, (HEADERS, INDEX, STREAM, CONTENT))) > 100


@pytest.mark.parametrize("name", CASES)
def test_hostile(name: str, good: Bundle, target: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, message = CASES[name]
    data = spoil(good)
    assert data != good.pack()
    file = tmp_path / "bundle.tar"
    file.write_bytes(data)
    before = surroundings(tmp_path)

    def written(*arguments: Any) -> Any:
        raise AssertionError(f"written before all was verified: {arguments}")

    with monkeypatch.context() as patch:
        for method in ("put_if_absent", "put_blob", "delete"):
            patch.setattr(target.store, method, written)
        with pytest.raises(UserError, match=message) as raised:
            bundle.import_bundle(target, file)
    assert "bundle.tar" in str(raised.value) or "manifests disagree" in str(raised.value)
    assert surroundings(tmp_path) == before
    assert not [path for path in paths(target) if path.startswith("tmp/")]
    assert target.verify_all() == [] and target.models() == ["team/other"]


def test_the_good_one_is_taken(good: Bundle, target: Registry) -> None:
    versions = bundle.import_bundle(target, io.BytesIO(good.pack()))
    assert [version.ref for version in versions] == ["team/base:1", "team/adapter:1"]
    assert target.verify_all() == []


def test_a_folder_or_nothing_is_no_bundle(target: Registry, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "absent", "No such file")):
        with pytest.raises(UserError, match=f"{path} cannot be read: {message}"):
            bundle.import_bundle(target, path)

"""Signatures: by our keys and by model-signing's own command, and everything that must not pass for one."""

import base64
import copy
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry import manifest as manifests
from baton.registry.trust import approvals, attestations, evaluations, signing
from tests.baton.registry.conftest import overwrite
from tests.baton.registry.trust.made_up import make_key, variant


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Nothing but the S3 server of the tests may be spoken to."""
    if "filled" not in request.fixturenames:

        def refuse(*_: Any) -> None:
            raise AssertionError("a signature needs no network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)


def problems(registry: Registry, public: Path, ref: str = "team/base:1", of: str | None = None) -> list[str | None]:
    checked = signing.verify_signatures(registry, registry.resolve(ref).digest, [public.read_text()], of)
    return [one.problem for one in checked]


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_signature_holds_for_its_key_and_no_other(filled: Registry, tmp_path: Path, curve: str) -> None:
    private, public = make_key(tmp_path, "ann", curve)
    _, other = make_key(tmp_path, "bob", curve)
    version = filled.resolve("team/base:1")
    said = signing.sign(filled, version.digest, private, "ann")
    assert said.type == "signature" and said.body["of"] == version.digest
    assert said.body["key"] == signing.fingerprint(public.read_text())
    assert problems(filled, public) == [None]
    (problem,) = problems(filled, other)
    assert problem and problem.startswith("is by another key (sha256:")
    assert problems(filled, public, "team/other:1") == []
    assert signing.sign(filled, version.digest, private, "ann") == said  # the same again adds nothing
    assert len(filled.attestations(version)) == 1


def test_on_either_store(filled: Registry, tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "ann")
    signing.sign(filled, filled.resolve("team/value:1").digest, private)
    assert problems(filled, public, "team/value:1") == [None]
    assert filled.verify_all() == []


def test_a_key_is_known_by_the_sha256_of_its_pem(tmp_path: Path) -> None:
    _, public = make_key(tmp_path, "ann")
    done = subprocess.run(["sha256sum", str(public)], capture_output=True, text=True, check=True)
    assert signing.fingerprint(public.read_text()) == f"sha256:{done.stdout[:64]}"
    assert signing.fingerprint(public.read_text().replace("\n", "\r\n")) == f"sha256:{done.stdout[:64]}"


def model_signing(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_ours_verifies_by_model_signings_command_and_the_reverse(filled: Registry, tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "ann")
    version = filled.resolve("team/base:1")
    said = signing.sign(filled, version.digest, private)
    signing.write_for_others(filled, version.digest, said, tmp_path / "out")
    manifest, signature = tmp_path / "out" / "manifest.json", tmp_path / "out" / "model.sig"
    words = ("verify", "key", manifest, "--signature", signature, "--public_key", public)
    done = model_signing(*words)
    assert done.returncode == 0 and "Verification succeeded" in done.stdout + done.stderr, done
    with pytest.raises(UserError, match="manifest.json exists; name another folder"):
        signing.write_for_others(filled, version.digest, said, tmp_path / "out")
    # signed elsewhere, by another key of theirs
    theirs, theirs_public = make_key(tmp_path, "eve")
    elsewhere = tmp_path / "their.sig"
    done = model_signing("sign", "key", manifest, "--signature", elsewhere, "--private_key", theirs)
    assert done.returncode == 0, done
    signing.attach(filled, version.digest, elsewhere, "eve")
    assert sorted(map(str, problems(filled, theirs_public)))[0] == "None"
    assert len(problems(filled, public)) == 2 and problems(filled, public).count(None) == 1
    manifest.write_bytes(manifest.read_bytes().replace(b"apache", b"Apache"))
    assert model_signing(*words).returncode == 1


def test_what_cannot_be_attached(filled: Registry, tmp_path: Path) -> None:
    private, _ = make_key(tmp_path, "ann")
    one, other = (filled.resolve(f"team/{name}:1").digest for name in ("base", "other"))
    bundle = signing.sign(filled, one, private).body["bundle"]
    file = tmp_path / "model.sig"
    file.write_text(json.dumps(bundle))
    with pytest.raises(UserError, match=f"model.sig signs another file: expected {other}, found {one}"):
        signing.attach(filled, other, file)
    for text in ("", "[]", "{}", "null", '"x"', "[" * 100_000, json.dumps(bundle)[:-9], json.dumps({**bundle, "x": 1})):
        file.write_text(text)
        with pytest.raises(UserError, match="model.sig is (not a signature|malformed)"):
            signing.attach(filled, one, file)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "manifest.json").write_text("{}")
    done = model_signing("sign", "key", tmp_path / "folder", "--signature", file, "--private_key", private)
    assert done.returncode == 0, done
    with pytest.raises(UserError, match="signs a folder, not the manifest: sign the one file manifest.json"):
        signing.attach(filled, one, file)


def _flipped(text: str, at: int = 10) -> str:
    return text[:at] + ("B" if text[at] == "A" else "A") + text[at + 1 :]


def _payload(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Change what the envelope says was signed, without the key to sign it."""

    def apply(body: dict[str, Any]) -> None:
        envelope = body["bundle"]["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        change(statement)
        envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    return apply


def _hint(value: str) -> Callable[[dict[str, Any]], None]:
    def apply(body: dict[str, Any]) -> None:
        body["bundle"]["verificationMaterial"]["publicKey"]["hint"] = value

    return apply


TAMPERINGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "key": (lambda b: b.update(key="sha256:" + "0" * 64), "says that sha256:0000"),
    "field": (lambda b: b.update(note="x"), "is malformed: expected of, key and bundle"),
    "no bundle": (lambda b: b.update(bundle=None), "is malformed"),
    "list": (lambda b: b.update(bundle=[]), "is malformed"),
    "text": (lambda b: b.update(bundle="bundle"), "is malformed"),
    "media type": (lambda b: b["bundle"].update(mediaType="application/x"), "does not verify (ValidationError"),
    "no media type": (lambda b: b["bundle"].pop("mediaType"), "is malformed"),
    "other hint": (_hint("0" * 64), "but its bundle names the key sha256:0000"),
    "bad hint": (_hint("0"), "is malformed"),
    "no hint": (lambda b: b["bundle"]["verificationMaterial"]["publicKey"].clear(), "is malformed"),
    "certificate": (lambda b: b["bundle"]["verificationMaterial"].update(certificate={}), "is malformed"),
    "log": (lambda b: b["bundle"]["verificationMaterial"].update(tlogEntries=[{}]), "is malformed"),
    "envelope": (lambda b: b["bundle"].update(dsseEnvelope={}), "is malformed"),
    "payload type": (lambda b: b["bundle"]["dsseEnvelope"].update(payloadType="text/x"), "does not verify"),
    "payload bytes": (
        lambda b: b["bundle"]["dsseEnvelope"].update(payload=_flipped(b["bundle"]["dsseEnvelope"]["payload"], 3)),
        "",
    ),
    "payload base64": (lambda b: b["bundle"]["dsseEnvelope"].update(payload="!!!"), "is malformed"),
    "signature": (
        lambda b: b["bundle"]["dsseEnvelope"]["signatures"][0].update(
            sig=_flipped(b["bundle"]["dsseEnvelope"]["signatures"][0]["sig"], 40)
        ),
        "does not verify (InvalidSignature",
    ),
    "empty signature": (lambda b: b["bundle"]["dsseEnvelope"]["signatures"][0].update(sig=""), "does not verify"),
    "key id": (lambda b: b["bundle"]["dsseEnvelope"]["signatures"][0].update(keyid="x"), "is malformed"),
    "no signatures": (lambda b: b["bundle"]["dsseEnvelope"].update(signatures=[]), "is malformed"),
    "two signatures": (
        lambda b: b["bundle"]["dsseEnvelope"]["signatures"].append(b["bundle"]["dsseEnvelope"]["signatures"][0]),
        "is malformed",
    ),
    "another spelling of the payload": (_payload(lambda s: None), "does not verify (InvalidSignature"),
    "name": (_payload(lambda s: s["subject"][0].update(name="x")), "does not verify (InvalidSignature"),
    "predicate": (_payload(lambda s: s.update(predicateType="x")), "does not verify (InvalidSignature"),
    "another file": (
        _payload(lambda s: s["predicate"]["resources"][0].update(digest="0" * 64)),
        "signs another file: expected sha256:",
    ),
    "another algorithm": (
        _payload(lambda s: s["predicate"]["resources"][0].update(algorithm="md5")),
        "signs another file: expected sha256:",
    ),
    "two files": (_payload(lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0])), "a folder"),
    "no files": (_payload(lambda s: s["predicate"].update(resources=[])), "signs a folder"),
    "no predicate": (_payload(lambda s: s.pop("predicate")), "is malformed"),
}


@pytest.fixture(scope="module")
def ann(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ann's keys."""
    return make_key(tmp_path_factory.mktemp("keys"), "ann")


def test_every_field_that_is_changed_is_noticed(filled: Registry, ann: tuple[Path, Path]) -> None:
    """Whoever can write to the store can put a changed record there under its own digest."""
    private, public = ann
    digest = filled.resolve("team/base:1").digest
    genuine = signing.sign(filled, digest, private)
    filled.store.delete(attestations.path_of(genuine))
    assert problems(filled, public) == []
    for name, (change, expected) in TAMPERINGS.items():
        body = copy.deepcopy(genuine.body)
        change(body)
        assert body != genuine.body, name
        forged = attestations.attest(filled, digest, "signature", body)
        (problem,) = problems(filled, public)
        assert problem is not None and expected in problem, (name, problem)
        filled.store.delete(attestations.path_of(forged))
    attestations.attest(filled, digest, "signature", genuine.body, "somebody else")
    assert problems(filled, public) == [None]  # the name beside a signature is only a claim


def test_every_flipped_bit_of_a_stored_signature_is_noticed(filled: Registry, ann: tuple[Path, Path]) -> None:
    said = signing.sign(filled, filled.resolve("team/base:1").digest, ann[0])
    path = attestations.path_of(said)
    whole = filled.store.get(path)
    for at in range(0, len(whole), 97):
        overwrite(filled, path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=f"{path.rpartition('/')[2]} is (damaged|about sha)"):
            problems(filled, ann[1])


def test_the_signature_of_another_manifest(filled: Registry, ann: tuple[Path, Path]) -> None:
    base, other = (filled.resolve(f"team/{name}:1").digest for name in ("base", "other"))
    said = signing.sign(filled, base, ann[0])
    attestations.attest(filled, other, "signature", {**said.body, "of": other})
    assert problems(filled, ann[1], "team/other:1") == [f"signs another file: expected {other}, found {base}"]
    attestations.attest(filled, other, "signature", said.body)  # still says that it is of base: not listed
    assert len(problems(filled, ann[1], "team/other:1")) == 1


def test_an_altered_manifest(filled: Registry, ann: tuple[Path, Path]) -> None:
    version = filled.resolve("team/base:1")
    signing.sign(filled, version.digest, ann[0])
    path = manifests.manifest_path(version.digest)
    data = filled.store.get(path)
    overwrite(filled, path, data.replace(b"apache-2.0", b"Apache-2.0"))
    with pytest.raises(UserError, match=f"expected {version.digest}, found sha256:"):
        problems(filled, ann[1])
    # under its own digest, with a version and the signature, it is still not what was signed
    overwrite(filled, path, data)
    other = variant(filled, {"licence": "mit"})
    for said in filled.attestations(version, "signature"):
        attestations.attest(filled, other.digest, "signature", {**said.body, "of": other.digest})
    (problem,) = problems(filled, ann[1], other.ref)
    assert problem and "signs another file" in problem


def test_signed_attestations(filled: Registry, ann: tuple[Path, Path]) -> None:
    version = filled.resolve("team/base:1")
    approval = approvals.approve(filled, version, "ann", key=ann[0])
    measured = evaluations.record(filled, version, {"win": 0.5}, "ann")
    signing.sign(filled, version.digest, ann[0], of=measured.digest)
    assert problems(filled, ann[1], of=approval.digest) == [None]
    assert problems(filled, ann[1], of=measured.digest) == [None]
    assert problems(filled, ann[1]) == []  # an approval's signature is none of the manifest
    forged = attestations.attest(filled, version.digest, "approval", {"note": None}, "bob")
    (said, _) = filled.attestations(version, "signature")
    attestations.attest(filled, version.digest, "signature", {**said.body, "of": forged.digest})
    (problem,) = problems(filled, ann[1], of=forged.digest)
    assert problem and problem.startswith(f"signs another file: expected {forged.digest}")
    with pytest.raises(UserError, match="has no attestation sha256:00"):
        signing.sign(filled, version.digest, ann[0], of="sha256:" + "0" * 64)


def test_keys_that_cannot_sign(filled: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    digest = filled.resolve("team/base:1").digest
    locked, locked_public = make_key(tmp_path, "locked", password=b"secret")
    _, public = make_key(tmp_path, "ann")
    wrong_curve, _ = make_key(tmp_path, "bitcoin", "SECP256K1")
    (tmp_path / "text.pem").write_text("hello")
    edwards = tmp_path / "edwards.pem"
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    edwards.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(serialization.Encoding.PEM, form, plain))
    for key, message in (
        (tmp_path / "absent.pem", "no private key at"),
        (tmp_path / "text.pem", "cannot be read as a private key"),
        (public, "cannot be read as a private key"),
        (wrong_curve, "is not a key on one of the curves secp256r1, secp384r1, secp521r1"),
        (edwards, "is not a key on one of the curves"),
        (locked, "give its password in BATON_KEY_PASSWORD"),
    ):
        with pytest.raises(UserError, match=message):
            signing.sign(filled, digest, key)
    monkeypatch.setenv("BATON_KEY_PASSWORD", "wrong")
    with pytest.raises(UserError, match="give its password"):
        signing.sign(filled, digest, locked)
    monkeypatch.setenv("BATON_KEY_PASSWORD", "secret")
    signing.sign(filled, digest, locked)
    assert problems(filled, locked_public) == [None]


def test_a_missing_library_says_what_to_install(
    filled: Registry, ann: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UserError, match=r"pip install 'baton\[sign\]'"):
        signing.sign(filled, filled.resolve("team/base:1").digest, ann[0])


@pytest.mark.parametrize("resource", [{"digest": "x"}, {"digest": "x", "name": ".", "algorithm": 5}, "x", None])
def test_a_forged_signature_does_not_hide_a_good_one(filled: Registry, tmp_path: Path, resource: Any) -> None:
    private, public = make_key(tmp_path, "team")
    version = filled.resolve("team/base:1")
    good = signing.sign(filled, version.digest, private)
    forged = json.loads(json.dumps(good.body))
    envelope = forged["bundle"]["dsseEnvelope"]
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["predicate"]["resources"] = [resource]
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    attestations.attest(filled, version.digest, "signature", forged, "mallory")
    keys, others = signing.require(filled, version.digest, [public.read_text()])
    assert keys == {good.body["key"]} and len(others) == 1 and "mallory's is malformed" in others[0]
    (tmp_path / "model.sig").write_text(json.dumps(forged["bundle"]))
    with pytest.raises(UserError, match="model.sig is malformed"):
        signing.attach(filled, version.digest, tmp_path / "model.sig")

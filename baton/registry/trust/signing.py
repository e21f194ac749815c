"""Signatures of manifests and attestations by elliptic-curve keys, offline, in OpenSSF model-signing's format.

What is signed is a file: the version's manifest in its canonical bytes, which names every file, the base and the
parents by sha256, or an attestation's record. The bundle is kept as an attestation of type `signature`:

    {"of": "sha256:<hex>",           the signed file: the manifest, or an attestation about it
     "key": "sha256:<hex>",          of the public key's PEM (SubjectPublicKeyInfo)
     "bundle": {…}}                  what model-signing writes to model.sig

A pair of keys for the curve P-256 (P-384 and P-521 do as well):

    openssl ecparam -genkey -name prime256v1 -noout -out team.pem
    openssl ec -in team.pem -pubout -out team.pub

A team without Baton verifies the same by model-signing's own command (`pip install model-signing pyopenssl`; it needs
pyopenssl without saying so). `baton signatures REF --key team.pub --write DIR` writes the two files, then:

    model_signing verify key DIR/manifest.json --signature DIR/model.sig --public_key team.pub

and holds the files that it received against the `sha256` of each that manifest.json lists.

What a signature proves is that the key's owner signed this content. It names no version number and no alias, and its
`by` is a claim: who can write to the store can still move an alias to an older signed version, or take a signature
away, but cannot make one.
"""

import base64
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry.trust import attestations
from baton.registry.trust.attestations import Attestation

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

CURVES = ("secp256r1", "secp384r1", "secp521r1")
PASSWORD = "BATON_KEY_PASSWORD"
_PUBLIC = "-----BEGIN PUBLIC KEY-----"
_RESOURCE = ("name", "algorithm", "digest")
_HEX = re.compile(r"[0-9a-f]{64}")
_FORM = "expected an elliptic-curve key as PEM: openssl ecparam -genkey -name prime256v1 -noout -out team.pem"


@dataclass(frozen=True)
class Checked:
    """One signature after checking: by whom (a claim), the key that it names, and what is wrong (None: it holds)."""

    attestation: Attestation
    key: str
    problem: str | None


def sign(
    registry: "Registry", subject: str, private_key: Path, by: str | None = None, of: str | None = None
) -> Attestation:
    """Sign a manifest (`subject`: its digest), or with `of` one attestation about it; the same again adds nothing."""
    data = _signed_bytes(registry, subject, of)
    public = _public_of(private_key)
    for known in verify_signatures(registry, subject, [public], of):
        if known.problem is None:
            return known.attestation
    import model_signing

    with tempfile.TemporaryDirectory() as folder:
        file, signature = Path(folder, "manifest.json"), Path(folder, "model.sig")
        file.write_bytes(data)
        signer = model_signing.signing.Config()
        signer.use_elliptic_key_signer(private_key=private_key, password=_password())
        signer.sign(file, signature)
        bundle = json.loads(signature.read_bytes())
    return _keep(registry, subject, of or subject, bundle, by)


def attach(registry: "Registry", subject: str, file: Path, by: str | None = None) -> Attestation:
    """Keep a signature of a manifest that was made elsewhere, by `model_signing sign key manifest.json`."""
    try:
        bundle = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a signature: {error}.") from error
    if (problem := _malformed(bundle)) or (problem := _other_content(bundle, subject)):
        raise UserError(f"{file} {problem}.")
    return _keep(registry, subject, subject, bundle, by)


def verify_signatures(
    registry: "Registry", subject: str, public_keys: Sequence[str], of: str | None = None
) -> list[Checked]:
    """Check every signature of a manifest, or of the attestation `of`, against public keys (PEM texts), offline."""
    found = [said for said in attestations.of(registry, subject, "signature") if said.body.get("of") == (of or subject)]
    if not found:
        return []
    data = _signed_bytes(registry, subject, of)
    by_fingerprint = {fingerprint(pem): pem for pem in public_keys}
    return [Checked(said, str(said.body.get("key")), _problem(said, data, by_fingerprint)) for said in found]


def require(registry: "Registry", subject: str, public_keys: Sequence[str]) -> tuple[set[str], list[str]]:
    """(the keys whose signature of the manifest holds, why each other signature does not count)."""
    checked = verify_signatures(registry, subject, public_keys)
    keys = {signature.key for signature in checked if signature.problem is None}
    return keys, [f"{s.attestation.by}'s {s.problem}" for s in checked if s.problem is not None]


def write_for_others(registry: "Registry", subject: str, signature: Attestation, folder: Path) -> None:
    """Write `manifest.json` and `model.sig` for model-signing's own command; both must be absent."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = json.dumps(signature.body["bundle"]).encode("utf-8")
    for name, data in (("manifest.json", _signed_bytes(registry, subject, None)), ("model.sig", bundle)):
        try:
            with open(folder / name, "xb") as file:
                file.write(data)
        except FileExistsError:
            raise UserError(f"{folder / name} exists; name another folder.") from None


def read_public_key(text: str, folder: Path | None) -> str:
    """A public key's PEM text from that text, or from a file relative to `folder`; raises UserError.

    folder None: `text` was read and checked before, when it was stored.
    """
    if folder is None:
        return text
    if "-----BEGIN" not in text:
        path = folder / Path(text).expanduser()
        try:
            text = path.read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"no public key at {path}: {error}.") from error
        name = str(path)
    else:
        name = "the key"
    if "PRIVATE KEY" in text:
        raise UserError(f"{name} is a private key, which only its owner may have; name the public one (*.pub).")
    if not text.strip().startswith(_PUBLIC):
        raise UserError(f"{name} is not a public key; expected a PEM file that begins with {_PUBLIC}.")
    return _normal(text)


def fingerprint(public_key: str) -> str:
    """`sha256:<hex>` of a public key's PEM in its normal spelling, which is how model-signing names a key."""
    return manifests.digest_of(_normal(public_key).encode("ascii"))


def _signed_bytes(registry: "Registry", subject: str, of: str | None) -> bytes:
    manifest = manifests.canonical(registry.read_manifest(subject))
    if of is None:
        return manifest
    said = next((said for said in attestations.of(registry, subject) if said.digest == of), None)
    if said is None:
        raise UserError(f"{subject} has no attestation {of}.")
    return attestations.canonical(said)


def _keep(registry: "Registry", subject: str, of: str, bundle: Any, by: str | None) -> Attestation:
    body = {"of": of, "key": f"sha256:{_hint(bundle)}", "bundle": bundle}
    return attestations.attest(registry, subject, "signature", body, by)


def _problem(said: Attestation, data: bytes, keys: dict[str, str]) -> str | None:
    """Why a signature does not hold of `data`; None when it does."""
    bundle = said.body.get("bundle")
    if set(said.body) != {"of", "key", "bundle"}:
        return "is malformed: expected of, key and bundle"
    if problem := _malformed(bundle):
        return problem
    named = f"sha256:{_hint(bundle)}"
    if said.body["key"] != named:
        return f"says that {said.body['key']} made it, but its bundle names the key {named}"
    if named not in keys:
        return f"is by another key ({_short(named)})"
    return _other_content(bundle, manifests.digest_of(data)) or _cryptographic_problem(bundle, data, keys[named])


def _malformed(bundle: Any) -> str | None:
    """Why a bundle is not what model-signing writes for a key; strict, as nothing of it should be unsigned."""
    try:
        envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
        (signature,) = envelope["signatures"]
        is_sound = (
            set(bundle) == {"mediaType", "verificationMaterial", "dsseEnvelope"}
            and set(envelope) == {"payload", "payloadType", "signatures"}
            and material == {"publicKey": {"hint": _hint(bundle)}, "tlogEntries": []}
            and set(signature) == {"sig", "keyid"}
            and signature["keyid"] == ""
            and bool(_HEX.fullmatch(_hint(bundle)))
            and all(isinstance(one[key], str) for one in _resources(bundle) for key in _RESOURCE)
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        is_sound = False
    return None if is_sound else "is malformed: not a bundle that model-signing writes for an elliptic-curve key"


def _hint(bundle: Any) -> str:
    return bundle["verificationMaterial"]["publicKey"]["hint"]


def _resources(bundle: Any) -> list[Any]:
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
    return list(payload["predicate"]["resources"])


def _other_content(bundle: Any, digest: str) -> str | None:
    """Why a bundle is not about the one file with this digest; says nothing of who signed it."""
    found = [(resource["name"], resource["algorithm"], resource["digest"]) for resource in _resources(bundle)]
    if found == [(".", "sha256", digest.removeprefix("sha256:"))]:
        return None
    if len(found) != 1 or found[0][0] != ".":
        return "signs a folder, not the manifest: sign the one file manifest.json"
    return f"signs another file: expected {digest}, found {found[0][1]}:{found[0][2]}"


def _cryptographic_problem(bundle: Any, data: bytes, public_key: str) -> str | None:
    model_signing = _library()
    with tempfile.TemporaryDirectory() as folder:
        file, signature, key = (Path(folder, name) for name in ("manifest.json", "model.sig", "key.pub"))
        file.write_bytes(data)
        signature.write_text(json.dumps(bundle), "utf-8")
        key.write_text(public_key, "ascii")
        try:
            model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key).verify(file, signature)
        except Exception as error:  # whatever it stumbles over in a forged bundle: it did not verify
            first = next(iter(str(error).splitlines()), "no more is said")
            return f"does not verify ({type(error).__name__}: {first})"
    return None


def _public_of(private_key: Path) -> str:
    """The public key of a private one, as PEM text; raises UserError for a key that cannot sign."""
    _library()
    from cryptography.hazmat.primitives import serialization

    try:
        data = private_key.read_bytes()
    except OSError as error:
        raise UserError(f"no private key at {private_key}: {error}.") from error
    try:
        key: Any = serialization.load_pem_private_key(data, _password())
    except (ValueError, TypeError) as error:
        password = f"give its password in {PASSWORD}" if b"ENCRYPTED" in data else _FORM
        raise UserError(f"{private_key} cannot be read as a private key ({error}); {password}.") from error
    return _text_of(key.public_key(), str(private_key))


def _normal(public_key: str) -> str:
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        return _text_of(serialization.load_pem_public_key(public_key.encode("ascii")), "the public key")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"a public key is not PEM ({error}); expected {_PUBLIC} …") from error


def _text_of(key: Any, name: str) -> str:
    from cryptography.hazmat.primitives import serialization

    if getattr(getattr(key, "curve", None), "name", None) not in CURVES:
        raise UserError(f"{name} is not a key on one of the curves {', '.join(CURVES)}; {_FORM}.")
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_bytes(encoding, form).decode("ascii"))


def _password() -> Any:
    # Bytes, although model-signing's hint says text: it hands the password on to a library that takes only bytes.
    return os.environ[PASSWORD].encode("utf-8") if os.environ.get(PASSWORD) else None


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise UserError(f"signatures need model-signing ({error}): pip install 'baton[sign]'.") from error
    return model_signing


def _short(key: str) -> str:
    return key[:19] + "…"

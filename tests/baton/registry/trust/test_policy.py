"""The registry's policy: what it makes compulsory, its history, and the reader's own."""

import threading
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, records
from baton.registry.trust import approvals, policy, signing
from baton.registry.trust.policy import set_policy
from tests.baton.registry.conftest import Folders, flip
from tests.baton.registry.trust.made_up import make_key, variant


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file to write policies to."""
    return tmp_path / "policy.yaml"


def test_gates_before_aliases(filled: Registry, file: Path, tmp_path: Path) -> None:
    version = variant(filled, {"metrics": {"win": 0.5}})
    file.write_text(
        "aliases:\n"
        "  prod: {metrics: [win >= 0.4]}\n"
        "  'pro*': {approvals: {at_least: 1}}\n"
        "  'team/other:*': {metrics: [never > 0]}\n"
        "  'team/b*:release-*': {metrics: [win >= 0.6]}\n"
    )
    assert filled.promote(version.ref, "prod", "before there was a policy")["to"] == 2
    set_policy(filled, file, "ann")
    filled.promote(version.ref, "candidate", "no pattern covers it")
    with pytest.raises(UserError) as caught:
        filled.promote("team/base:1", "prod", "x")
    assert "2 of 2 conditions fail" in str(caught.value) and "win >= 0.4" in str(caught.value)
    with pytest.raises(UserError, match="1 of 1 conditions fail:\n  win >= 0.6: 0.5 by the publisher"):
        filled.promote(version.ref, "release-1", "x")
    with pytest.raises(UserError, match="never > 0"):
        filled.promote("team/other:1", "candidate", "x")
    with pytest.raises(UserError, match="1 of 2 conditions fail:\n  approvals: at least 1: 0"):
        filled.promote(version.ref, "prod", "x")
    approvals.approve(filled, version, "ann")
    # another gate holds besides, and cannot take the policy's place
    gate = tmp_path / "GATE.yaml"
    gate.write_text("metrics: [win >= 0.5]")
    record = filled.promote(version.ref, "prod-eu", "x", gate=gate)
    assert [judged["source"] for judged in record["gates"]] == ["policy 1, pro*", "GATE.yaml"]
    gate.write_text("metrics: [win >= 0.9]")
    with pytest.raises(UserError, match="1 of 3 conditions fail"):
        filled.promote(version.ref, "prod", "x", gate=gate)
    assert filled.verify_all() == []


def test_rolling_back_asks_no_gate(filled: Registry, file: Path) -> None:
    version = variant(filled, {"metrics": {"win": 0.5}})
    filled.promote("team/base:1", "prod", "old days")
    file.write_text("aliases: {prod: {metrics: [win >= 0.4]}}")
    set_policy(filled, file)
    filled.promote(version.ref, "prod", "better")
    assert filled.rollback("team/base:prod", "broken")["to"] == 1


def test_licences_at_publishing(filled: Registry, folders: Folders, file: Path) -> None:
    file.write_text("publish: {licences: [MIT, unknown]}")
    set_policy(filled, file)
    with pytest.raises(UserError, match="outside the allowed ones"):
        filled.publish(folders.base, name="team/new", kind="base", details={"licence": "llama3"})
    with pytest.raises(UserError, match=r"outside the allowed ones \(none\)"):
        wanted = ["llama3"]  # the publisher may ask for less than the policy, not for more
        details = {"licence": "llama3"}
        filled.publish(folders.base, name="team/new", kind="base", details=details, allowed_licences=wanted)
    assert filled.publish(folders.base, name="team/new", kind="base", details={"licence": "mit"}).number == 1
    assert policy.allowed_licences(filled, None) == ["MIT", "unknown"]
    assert policy.allowed_licences(filled, ["mit", "bsd"]) == ["mit"]


def test_licences_on_arrival(filled: Registry, file: Path) -> None:
    version = variant(filled, {"licence": "llama3", "data": [{"path": "a.jsonl", "licence": "gpl-3.0-only"}]})
    closure = {version.digest: version.manifest}
    policy.check_arrival(filled, closure)
    file.write_text("publish: {licences: [llama3]}")
    set_policy(filled, file)
    with pytest.raises(UserError) as caught:
        policy.check_arrival(filled, closure)
    assert f"  {version.digest}: data a.jsonl has gpl-3.0-only\n" in str(caught.value)
    assert "llama3." not in str(caught.value) and "Nothing was brought in" in str(caught.value)
    file.write_text("publish: {licences: [llama3, gpl-3.0-only]}")
    set_policy(filled, file)
    policy.check_arrival(filled, closure)


def test_unsigned_versions_are_not_loaded(filled: Registry, file: Path, tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "team")
    file.write_text("resolve: {signatures: {keys: [team.pub]}}")
    adapter = filled.resolve("team/adapter:1")
    set_policy(filled, file)
    public.unlink()  # the key lies in the policy
    for load in (adapter.folder, lambda: filled.materialise(adapter, tmp_path / "got"), adapter.load):
        with pytest.raises(UserError) as caught:
            load()
        assert "team/adapter:1 must be signed by at least 1 of key sha256:" in str(caught.value)
        assert "(policy 1): 0 signed it" in str(caught.value) and "baton sign team/adapter:1" in str(caught.value)
    with pytest.raises(UserError, match="must be signed"):
        filled.merge(adapter, tmp_path / "merged")
    (problem,) = filled.verify(adapter)
    assert "must be signed" in problem
    signing.sign(filled, adapter.digest, private)
    assert filled.verify(adapter) == []
    # its base is part of what was signed, and needs no signature of its own
    assert (filled.materialise(adapter, tmp_path / "got") / "adapter_model.safetensors").exists()
    (said,) = filled.attestations(adapter, "signature")
    path = f"attestations/{adapter.digest.removeprefix('sha256:')}/{said.digest.removeprefix('sha256:')}.json"
    flip(filled, path)
    with pytest.raises(UserError, match="cannot be held against policy 1: .*is damaged"):
        adapter.folder()


def test_a_reader_has_a_policy_of_its_own(
    filled: Registry, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = make_key(tmp_path, "team")
    file.write_text("resolve: {signatures: {keys: [team.pub]}}")
    base = filled.resolve("team/base:1")
    base.folder()
    monkeypatch.setenv("BATON_POLICY", str(file))
    with pytest.raises(UserError, match=f"must be signed .*BATON_POLICY={file}"):
        base.folder()
    (tmp_path / "weak.yaml").write_text("{}")
    set_policy(filled, tmp_path / "weak.yaml")  # whoever can write to the store cannot weaken it
    with pytest.raises(UserError, match="must be signed"):
        base.folder()
    signing.sign(filled, base.digest, private)
    base.folder()
    monkeypatch.setenv("BATON_POLICY", str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="there is no file"):
        base.folder()


def test_policies_are_kept(filled: Registry, file: Path) -> None:
    assert policy.current(filled) is None and policy.history(filled) == []
    file.write_text("publish: {licences: [mit]}")
    first = set_policy(filled, file, "ann")
    assert (first.number, first.by, first.source) == (1, "ann", "policy 1")
    assert set_policy(filled, file, "bob") == first  # nothing changed: no new record
    file.write_text("{}")
    second = set_policy(filled, file, "bob")
    assert second.number == 2 and second.rules.publish is None
    assert policy.current(filled) == second and policy.history(filled) == [first, second]
    assert filled.verify_all() == []
    flip(filled, "policies/0000002.json")
    for use in (lambda: policy.current(filled), lambda: filled.promote("team/base:1", "prod", "x")):
        with pytest.raises(UserError, match="0000002.json is damaged"):
            use()


def test_of_two_who_set_a_policy_one_wins(filled: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, found = threading.Barrier(2), list[Any]()
    write = records.write

    def write_together(*arguments: Any) -> bool:
        together.wait(10)
        return write(*arguments)

    monkeypatch.setattr(records, "write", write_together)

    def change(licence: str) -> None:
        path = tmp_path / f"{licence}.yaml"
        path.write_text(f"publish: {{licences: [{licence}]}}")
        try:
            found.append(set_policy(Registry(filled.location), path).number)
        except UserError as error:
            found.append(str(error))

    threads = [threading.Thread(target=change, args=(licence,)) for licence in ("mit", "apache-2.0")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, found)) == ["1", "someone set another policy meanwhile; look again: `baton policy`."]


def test_what_a_policy_may_say(filled: Registry, file: Path) -> None:
    for text, message in (
        ("alias: {prod: {}}", "unknown key alias; did you mean aliases?"),
        ("publish: {}", "publish.licences is missing"),
        ("publish: {signatures: {}}", "unknown key publish.signatures; valid here: licences"),
        ("aliases: {prod: {}}", "aliases.prod: a gate without conditions"),
        ("aliases: {prod: {metric: [a > 1]}}", "unknown key aliases.prod.metric; did you mean metrics?"),
        ("aliases: {prod: {approvals: {atleast: 1}}}", "unknown key aliases.prod.approvals.atleast; did you mean at_l"),
        ("aliases: {Prod: {metrics: [a > 1]}}", "'Prod' covers no alias"),
        ("resolve: {signatures: {keys: [x.pub]}}", "no public key at"),
        ("- a", "holds no keys"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            set_policy(filled, file)
        assert message in str(caught.value) and str(file) in str(caught.value), (text, str(caught.value))
    assert policy.current(filled) is None

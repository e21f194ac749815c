"""Gates: every kind of condition holds and fails, by values worked by hand; what a gate's file may say."""

from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, Version
from baton.registry.care.tombstones import delete
from baton.registry.trust import approvals, attestations, evaluations, signing
from baton.registry.trust.gates import Gate, Outcome, evaluate, load_gate
from tests.baton.registry.conftest import flip, overwrite
from tests.baton.registry.trust.made_up import make_key, variant


def judge(registry: Registry, version: Version, content: dict[str, Any], alias: str = "prod") -> list[Outcome]:
    return evaluate(registry, version, load_gate(content), alias)


def holds(registry: Registry, version: Version, *metrics: str) -> list[bool]:
    return [outcome.holds for outcome in judge(registry, version, {"metrics": list(metrics)})]


def test_a_metric_must_hold_of_every_value(filled: Registry) -> None:
    version = variant(filled, {"metrics": {"reward_accuracy": 0.75, "kl_nats": 8, "eval": {"win": 0.5}}})
    wanted = ("reward_accuracy >= 0.7", "kl_nats <= 8", "kl_nats < 8", "eval/win == 0.5")
    assert holds(filled, version, *wanted) == [True, True, False, True]
    evaluations.record(filled, version, {"reward_accuracy": 0.72}, "ann")
    assert holds(filled, version, *wanted) == [True, True, False, True]
    evaluations.record(filled, version, {"reward_accuracy": 0.9, "kl_nats": 8.5}, "bob")
    assert holds(filled, version, *wanted) == [True, False, False, True]
    # A later, better measurement does not replace the worse one, whoever made it.
    evaluations.record(filled, version, {"kl_nats": 2}, "bob", "again")
    (outcome,) = judge(filled, version, {"metrics": ["kl_nats <= 8"]})
    assert outcome == Outcome("kl_nats <= 8", False, "8 by the publisher, 8.5 by bob, 2 by bob")
    evaluations.record(filled, version, {"reward_accuracy": 0.69}, "eve")
    assert holds(filled, version, "reward_accuracy >= 0.7") == [False]


def test_an_evaluation_may_bring_what_the_publisher_did_not_measure(filled: Registry) -> None:
    version = variant(filled, {"metrics": {"kl_nats": 1.0}})
    (outcome,) = judge(filled, version, {"metrics": ["win_rate > 0.5"]})
    assert outcome == Outcome("win_rate > 0.5", False, "team/base:2 has no metric win_rate; it has kl_nats")
    evaluations.record(filled, version, {"win_rate": 0.6, "win_rates": 1}, "ann")
    assert holds(filled, version, "win_rate > 0.5") == [True]
    (outcome,) = judge(filled, version, {"metrics": ["win_rat > 0.5"]})
    assert outcome.found == "team/base:2 has no metric win_rat; it has win_rate, win_rates"
    bare = variant(filled, {"metrics": {}, "licence": "mit"})
    assert judge(filled, bare, {"metrics": ["a > 0"]})[0].found.endswith("it has none")


def test_what_is_no_finite_number_holds_nothing(filled: Registry) -> None:
    metrics = {"a": "nan", "b": "inf", "c": "-inf", "d": True, "e": "0.9", "f": [1], "g": None, "h": 10**400}
    version = variant(filled, {"metrics": metrics})
    for name in metrics:
        texts = [f"{name} > 0", f"{name} < 0", f"{name} == 0", f"{name} > current", f"{name} < current"]
        assert holds(filled, version, *texts) == [False] * 5, name


def test_better_than_what_the_alias_means_now(filled: Registry) -> None:
    old = variant(filled, {"metrics": {"win": 0.5, "kl": 3}})
    better = variant(filled, {"metrics": {"win": 0.6, "kl": 3}})
    wanted = ("win > current", "win >= current", "kl < current", "kl <= current + 1", "win > current + 0.2")
    assert holds(filled, better, *wanted) == [True] * 5  # prod means nothing yet
    (outcome,) = judge(filled, better, {"metrics": ["win > current"]})
    assert outcome.found == "0.6 by the publisher; team/base:prod means nothing yet"
    filled.promote(old.ref, "prod", "first")
    assert holds(filled, better, *wanted) == [True, True, False, True, False]
    # every value of the one against every value of the other: 0.6 is not above 0.65
    evaluations.record(filled, old, {"win": 0.65}, "ann")
    (outcome,) = judge(filled, better, {"metrics": ["win > current"]})
    expected = "0.6 by the publisher; against team/base:2 of prod: 0.5 by the publisher, 0.65 by ann"
    assert outcome == Outcome("win > current", False, expected)
    assert holds(filled, better, "win > current - 0.06") == [True]
    assert evaluate(filled, better, load_gate({"metrics": ["win > current"]}), "other")[0].holds
    # what prod means is compared with what it meant before: promoting twice has one answer
    filled.promote(better.ref, "prod", "then")
    assert holds(filled, better, *wanted[:3]) == [False, False, False]
    assert holds(filled, old, "win > current - 0.15", "win > current - 0.05") == [True, False]


def test_what_is_compared_with_must_be_known(filled: Registry) -> None:
    old = variant(filled, {"metrics": {"loss": 2.0}})
    new = variant(filled, {"metrics": {"loss": 1.0, "win": 0.5}})
    filled.promote(old.ref, "prod", "first")
    (outcome,) = judge(filled, new, {"metrics": ["win > current"]})
    assert not outcome.holds and "team/base:2 of prod has no metric win; it has loss" in outcome.found
    assert "baton attest team/base:2 win=…" in outcome.found
    evaluations.record(filled, old, {"win": 0.4}, "ann")
    assert holds(filled, new, "win > current", "loss < current") == [True, True]
    filled.promote(new.ref, "prod", "then")
    assert holds(filled, new, "loss > current") == [False]
    delete(filled, old.ref, "leaked", "ann")
    (outcome,) = judge(filled, new, {"metrics": ["loss > current"]})
    assert outcome.holds and "team/base:2, which prod meant, was deleted" in outcome.found


def test_lineage_is_verified(filled: Registry) -> None:
    version = filled.resolve("team/value:1")
    gate = {"lineage": {"verified": True}}
    assert judge(filled, version, gate) == [Outcome("lineage: verified", True, "every file and record is whole")]
    base = filled.resolve("team/base:1").manifest
    sha256 = next(entry["sha256"] for entry in base["files"] if entry["path"] == "model.safetensors")
    flip(filled, f"blobs/sha256/{sha256}")
    (outcome,) = judge(filled, version, gate)
    assert not outcome.holds and f"expected sha256:{sha256}, found sha256:" in outcome.found


def test_licences_of_the_lineage(filled: Registry) -> None:
    data = [{"path": "a.jsonl", "licence": "CC-BY-4.0"}, {"path": "b.jsonl", "licence": None}]
    version = variant(filled, {"data": data, "licence": "MIT"})
    child = variant(filled, {"parents": {"init": version.digest}, "licence": "apache-2.0"}, "team/child")

    def judged(*allowed: str) -> Outcome:
        return judge(filled, child, {"lineage": {"licences": list(allowed)}})[0]

    assert judged("mit", "apache-2.0", "cc-by-4.0", "unknown").holds
    outcome = judged("mit", "apache-2.0")
    assert not outcome.holds and outcome.condition == "lineage: licences among mit, apache-2.0"
    assert "data a.jsonl of team/base:2 has CC-BY-4.0" in outcome.found
    assert "data b.jsonl of team/base:2 states no licence" in outcome.found
    assert "init team/base:2 has MIT" in judged("apache-2.0", "cc-by-4.0", "unknown").found


def test_approvals(filled: Registry) -> None:
    version = variant(filled, {"licence": "mit"}, by="pat")

    def judged(rules: dict[str, Any]) -> tuple[bool, str]:
        (outcome,) = judge(filled, version, {"approvals": rules})
        return outcome.holds, outcome.found

    assert judged({}) == (False, "0")
    approvals.approve(filled, version, "pat")
    approvals.approve(filled, version, "ann", "looks good")
    assert judged({}) == (True, "2: pat, ann")
    assert judged({"at_least": 2})[0]
    assert judged({"at_least": 2, "not_by_publisher": True}) == (False, "1: ann; pat published it")
    # one person under another spelling, and again with another note, is still one
    approvals.approve(filled, version, "Ann ", "still good")
    approvals.approve(filled, version, "ann", "looks good")
    assert len(filled.attestations(version, "approval")) == 3
    assert not judged({"at_least": 2, "not_by_publisher": True})[0]
    assert judged({"at_least": 2, "from": ["bob", "ann"]}) == (False, "1: ann; pat is not asked for")
    approvals.approve(filled, version, "bob")
    assert judged({"at_least": 2, "from": ["bob", "ann"]})[0]
    assert judged({"at_least": 2, "not_by_publisher": True})[0]
    assert not judged({"at_least": 4})[0]


def test_whoever_published_the_same_content_elsewhere_is_its_publisher_too(filled: Registry) -> None:
    variant(filled, {"licence": "mit"}, "team/mine", by="ann")
    version = variant(filled, {"licence": "mit"}, by="pat")
    approvals.approve(filled, version, "ann")
    assert [a.by for a in filled.attestations(version, "approval")] == ["ann"]
    assert approvals.count(filled, version).number == 1
    assert approvals.count(filled, version, not_by_publisher=True).number == 0


def test_signed_approvals(filled: Registry, tmp_path: Path) -> None:
    (ann, ann_pub), (bob, bob_pub), (eve, _) = (make_key(tmp_path, name) for name in ("ann", "bob", "eve"))
    version = filled.resolve("team/base:1")
    rules = {"approvals": {"at_least": 2, "keys": [ann_pub.read_text(), bob_pub.read_text()]}}
    approvals.approve(filled, version, "ann", key=ann)
    approvals.approve(filled, version, "bob")  # only a claim
    approvals.approve(filled, version, "eve", key=eve)
    (outcome,) = judge(filled, version, rules)
    assert not outcome.holds and outcome.found.startswith("1: ann; ")
    assert "bob's is signed by none of the keys" in outcome.found
    assert "eve's is signed by none of the keys" in outcome.found
    approvals.approve(filled, version, "mallory", key=ann)  # one key under two names is one
    assert not judge(filled, version, rules)[0].holds
    approvals.approve(filled, version, "bob", key=bob)
    (outcome,) = judge(filled, version, rules)
    assert outcome.holds
    assert len(filled.attestations(version, "approval")) == 4  # bob's was signed, not made again


def test_signatures(filled: Registry, tmp_path: Path) -> None:
    (ann, ann_pub), (bob, bob_pub), (eve, _) = (make_key(tmp_path, name) for name in ("ann", "bob", "eve"))
    version = filled.resolve("team/base:1")
    keys = [ann_pub.read_text(), bob_pub.read_text()]
    signing.sign(filled, version.digest, eve, "ann")  # a name proves nothing
    (outcome,) = judge(filled, version, {"signatures": {"keys": keys}})
    assert not outcome.holds and outcome.found.startswith("0 signed it; ann's is by another key (sha256:")
    signing.sign(filled, version.digest, ann)
    assert judge(filled, version, {"signatures": {"keys": keys}})[0].holds
    assert not judge(filled, version, {"signatures": {"keys": keys, "at_least": 2}})[0].holds
    signing.sign(filled, version.digest, bob)
    assert judge(filled, version, {"signatures": {"keys": keys, "at_least": 2}})[0].holds
    assert not judge(filled, filled.resolve("team/other:1"), {"signatures": {"keys": keys}})[0].holds


def test_a_damaged_or_unreadable_attestation_stops_the_gate(filled: Registry) -> None:
    version = variant(filled, {"metrics": {"a": 1}})
    said = evaluations.record(filled, version, {"a": 2}, "ann")
    path = attestations.path_of(said)
    whole = filled.store.get(path)
    flip(filled, path, 20)
    with pytest.raises(UserError, match=f"{said.digest.removeprefix('sha256:')}.json is damaged"):
        judge(filled, version, {"metrics": ["a > 0"]})
    overwrite(filled, path, whole)
    assert holds(filled, version, "a > 0") == [True]
    attestations.attest(filled, version.digest, "evaluation", {"scores": {"a": -5}}, "ann")
    with pytest.raises(UserError, match="is an evaluation without metrics"):
        judge(filled, version, {"metrics": ["a > 0"]})


def test_evaluations_are_finite_numbers_under_a_name(filled: Registry) -> None:
    version = filled.resolve("team/base:1")
    for metrics, message in (
        ({}, "needs a metric"),
        ({"a b": 1.0}, "bad metric name 'a b'"),
        ({"a>": 1.0}, "bad metric name"),
        ({"": 1.0}, "bad metric name"),
        ({"a": float("nan")}, "expected a finite number"),
        ({"a": True}, "expected a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            evaluations.record(filled, version, metrics, "ann")
    for name in ("", " ", "a\nb", "\x1b[31m", "x" * 201):
        with pytest.raises(UserError, match="bad name"):
            approvals.approve(filled, version, name or "\t")
    assert evaluations.parse_assignments(["a=1", "b=c=.5"]) == {"a": 1.0, "b=c": 0.5}
    for words, message in (
        (["a"], "not METRIC=VALUE"),
        (["a=x"], "not METRIC"),
        (["a=nan"], "finite"),
        (["a=1"] * 2, "twice"),
    ):
        with pytest.raises(UserError, match=message):
            evaluations.parse_assignments(words)
    assert filled.attestations(version) == []


def test_what_a_gate_may_say(tmp_path: Path) -> None:
    _, public = make_key(tmp_path, "team")
    file = tmp_path / "GATE.yaml"

    def load(text: str) -> Gate:
        file.write_text(text)
        return load_gate(file)

    gate = load("metrics: [a>=.5]\nsignatures: {keys: [team.pub]}\nlineage: {licences: [mit]}\n")
    assert gate.metrics == ["a >= 0.5"] and gate.signatures and gate.signatures.keys == [public.read_text()]
    assert gate == load_gate(
        {"metrics": ["a >= 0.5"], "signatures": {"keys": [public.read_text()]}, "lineage": {"licences": ["mit"]}}
    )
    assert gate.digest != load("metrics: [a >= 0.5]").digest == load("metrics: [a>=.50]").digest
    for text, message in (
        ("{}", "a gate without conditions lets everything pass"),
        ("", "a gate without conditions"),
        ("- a", "holds no keys"),
        ("metrics: [a > 1]\nmetric: [b > 1]", "unknown key metric; did you mean metrics?"),
        ("metrics: [a > 1]\nmetrics: [b > 1]", "duplicate key"),
        ("metrics: [a >> 1]", "metrics.0: 'a >> 1': '>>' is none of"),
        ("lineage: {}", "lineage: says nothing"),
        ("lineage: {verified: true, licence: [mit]}", "unknown key lineage.licence; did you mean licences?"),
        ("lineage: {licences: []}", "lineage.licences is"),
        ("lineage: {licences: [mit or bsd]}", "lineage.licences: allowed_licences: 'mit or bsd' is not one"),
        ("approvals: {at_leest: 2}", "unknown key approvals.at_leest; did you mean at_least?"),
        ("approvals: {form: [a]}", "unknown key approvals.form; did you mean from?"),
        ("approvals: {at_least: 0}", "approvals.at_least is 0"),
        ("approvals: {at_least: 2, from: [ann, ann]}", "at_least 2 can never hold: from lists only 1"),
        ("signatures: {}", "signatures.keys is missing"),
        ("signatures: {keys: []}", "signatures.keys is"),
        ("signatures: {keys: [absent.pub]}", f"no public key at {tmp_path / 'absent.pub'}"),
        ("signatures: {keys: [team.pem]}", "is a private key, which only its owner may have"),
        ("signatures: {keys: [GATE.yaml]}", "is not a public key"),
        ("signatures: {at_least: 2, keys: [team.pub]}", "at_least 2 can never hold: keys lists only 1"),
        ("metrics: [a > 1", "cannot be read as YAML"),
    ):
        with pytest.raises(UserError) as caught:
            load(text)
        assert message in str(caught.value) and str(file) in str(caught.value), (text, str(caught.value))
    with pytest.raises(UserError, match=f"there is no file {tmp_path / 'GATES.yaml'}; there is {file}"):
        load_gate(tmp_path / "GATES.yaml")

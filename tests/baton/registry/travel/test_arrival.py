"""What others said of a version comes along, and no gate here takes it for more than their claim."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, Version
from baton.registry.travel import bundle, transfer
from baton.registry.trust import approvals, attestations, evaluations, policy, signing
from baton.registry.trust.gates import Outcome, evaluate, load_gate
from baton.registry.trust.summary import lines
from tests.baton.registry.conftest import paths
from tests.baton.registry.travel.made_up import FILES, TOKENIZER, add
from tests.baton.registry.trust.made_up import make_key

Send = Callable[[Registry, Version, Registry], Version]


def by_bundle(source: Registry, version: Version, target: Registry) -> Version:
    stream = io.BytesIO()
    bundle.export(source, version, stream)
    return bundle.import_bundle(target, io.BytesIO(stream.getvalue()))[-1]


def by_push(source: Registry, version: Version, target: Registry) -> Version:
    return target.resolve(transfer.push(source, version, target).ref)


@pytest.fixture(params=[by_bundle, by_push])
def send(request: pytest.FixtureRequest) -> Send:
    """Either way of getting there."""
    found: Send = request.param
    return found


def judge(registry: Registry, version: Version, gate: dict[str, Any]) -> Outcome:
    (outcome,) = evaluate(registry, version, load_gate(gate), "prod")
    return outcome


def test_approvals_from_elsewhere_open_no_gate(folder_registry: Registry, registry: Registry, send: Send) -> None:
    there = add(folder_registry, "team/base", FILES | TOKENIZER)
    for name in ("ann", "bob"):
        approvals.approve(folder_registry, there, name)
    here = send(folder_registry, there, registry)
    gate = {"approvals": {"at_least": 2, "from": ["ann", "bob"]}}
    assert judge(folder_registry, there, gate).holds
    outcome = judge(registry, here, gate)
    assert not outcome.holds and "ann's came from another registry" in outcome.found
    assert sum("in another registry" in line for line in lines(registry, here)) == 2
    # Who approves here says something new, although the same was said over there.
    approvals.approve(registry, here, "ann")
    approvals.approve(registry, here, "ann")
    assert approvals.count(registry, here).counted == ["ann"]
    approvals.approve(registry, here, "bob")
    assert judge(registry, here, gate).holds
    # Theirs again: what was said here stays what was said here.
    assert send(folder_registry, there, registry) == here and judge(registry, here, gate).holds


def test_approvals_that_come_after_the_version(folder_registry: Registry, registry: Registry, send: Send) -> None:
    there = add(folder_registry, "team/base", FILES | TOKENIZER)
    here = send(folder_registry, there, registry)
    approvals.approve(folder_registry, there, "ann")
    assert send(folder_registry, there, registry) == here
    assert approvals.count(registry, here).number == 0
    before = paths(registry)
    assert send(folder_registry, there, registry) == here and paths(registry) == before


def test_ours_come_back_as_ours(folder_registry: Registry, registry: Registry, send: Send) -> None:
    ours = add(folder_registry, "team/base", FILES | TOKENIZER)
    approvals.approve(folder_registry, ours, "ann")
    send(registry, send(folder_registry, ours, registry), folder_registry)
    assert approvals.count(folder_registry, ours).counted == ["ann"]


def test_a_signed_approval_counts_anywhere(
    folder_registry: Registry, registry: Registry, send: Send, tmp_path: Path
) -> None:
    (ann, ann_public), (_, bob_public) = make_key(tmp_path, "ann"), make_key(tmp_path, "bob")
    there = add(folder_registry, "team/base", FILES | TOKENIZER)
    approvals.approve(folder_registry, there, "ann", key=ann)
    said = evaluations.record(folder_registry, there, {"win": 0.9}, "ann")
    signing.sign(folder_registry, there.digest, ann, "ann", of=said.digest)
    here = send(folder_registry, there, registry)
    for public, holds in ((ann_public, True), (bob_public, False)):
        gate = load_gate({"approvals": {"keys": [public.read_text()]}, "metrics": ["win > 0.5"]})
        assert [outcome.holds for outcome in evaluate(registry, here, gate, "prod")] == [holds, holds]


def test_what_was_measured_elsewhere_stops_and_never_helps(
    folder_registry: Registry, registry: Registry, send: Send
) -> None:
    there = add(folder_registry, "team/base", FILES | TOKENIZER, metrics={"claimed": 0.9})
    evaluations.record(folder_registry, there, {"win": 0.9, "claimed": 0.8}, "eve")
    here = send(folder_registry, there, registry)
    outcome = judge(registry, here, {"metrics": ["win > 0.5"]})
    assert not outcome.holds and "0.9 by eve (elsewhere, signed by none of the gate's keys)" in outcome.found
    assert judge(registry, here, {"metrics": ["claimed >= 0.8"]}).holds
    assert not judge(registry, here, {"metrics": ["claimed >= 0.85"]}).holds
    evaluations.record(registry, here, {"win": 0.7}, "ann")
    assert judge(registry, here, {"metrics": ["win > 0.5"]}).holds


def test_its_publisher_there_is_its_publisher_here(folder_registry: Registry, registry: Registry, send: Send) -> None:
    there = add(folder_registry, "team/base", FILES | TOKENIZER)  # by someone
    here = send(folder_registry, there, registry)
    approvals.approve(registry, here, "Someone")
    gate = {"approvals": {"not_by_publisher": True}}
    outcome = judge(registry, here, gate)
    assert not outcome.holds and "Someone published it" in outcome.found
    approvals.approve(registry, here, "ann")
    assert judge(registry, here, gate).holds


def test_a_mark_is_written_before_what_it_marks(
    folder_registry: Registry, registry: Registry, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = add(folder_registry, "team/base", FILES | TOKENIZER)
    said = approvals.approve(folder_registry, there, "ann")
    put = registry.store.put_if_absent

    def fail_after(path: str, data: bytes) -> bool:
        done = put(path, data)
        if path == attestations.path_of(said):
            raise OSError(28, "No space left on device")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(registry.store, "put_if_absent", fail_after)
        with pytest.raises(UserError, match="no space left"):
            send(folder_registry, there, registry)
    here = send(folder_registry, there, registry)
    assert approvals.count(registry, here).number == 0 and len(attestations.of(registry, here.digest, "origin")) == 1


def test_what_may_not_be_loaded_is_not_handed_on(
    folder_registry: Registry, registry: Registry, send: Send, tmp_path: Path
) -> None:
    there = add(folder_registry, "team/base", FILES | TOKENIZER)
    private, _ = make_key(tmp_path, "team")
    (tmp_path / "policy.yaml").write_text("resolve: {signatures: {keys: [team.pub]}}")
    policy.set_policy(folder_registry, tmp_path / "policy.yaml")
    with pytest.raises(UserError, match="team/base:1 must be signed by at least 1"):
        send(folder_registry, there, registry)
    assert paths(registry) == ["registry.json"]
    signing.sign(folder_registry, there.digest, private)
    assert send(folder_registry, there, registry).digest == there.digest

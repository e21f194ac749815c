"""Stages on a registry in an object store: they read their inputs from it, and publish there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.registry import Registry
from tests.conftest import run_stage, weights_digests


def test_a_stage_reads_and_publishes_in_an_object_store(
    tiny_chain: Any, new_location: Callable[[str], str], tmp_path: Path
) -> None:
    there = Registry(new_location("s3"), create=True)
    tiny_chain.registry.push(tiny_chain.versions["pretrain"], there)
    there.promote("tiny/base:1", "main", reason="the recipe asks for it")
    version = run_stage("sft", tiny_chain.recipe("sft", f"registry={there.location}", f"run_dir={tmp_path}/run"))
    assert weights_digests(version) == weights_digests(tiny_chain.versions["sft"])
    assert there.resolve("tiny/sft:candidate") == version and there.verify_all() == []
    assert there.store.list("leases") == []

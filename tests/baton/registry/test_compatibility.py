"""What differs between a policy and a reward model, in sentences."""

from typing import Any

import pytest

from baton.registry import Registry, Version
from baton.registry.compatibility import differences
from baton.registry.manifest import canonical, digest_of


class Other(Version):
    """A version whose manifest was changed by hand."""

    manifest: dict[str, Any] = {}


def changed(version: Version, **changes: Any) -> Version:
    manifest = version.manifest | changes
    other = Other(version.name, 2, digest_of(canonical(manifest)), version.registry)
    object.__setattr__(other, "manifest", manifest)
    return other


@pytest.fixture
def pair(filled: Registry) -> tuple[Version, Version]:
    return filled.resolve("team/adapter:1"), filled.resolve("team/reward:1")


def test_what_reads_the_same_has_no_differences(pair: tuple[Version, Version]) -> None:
    assert differences(*pair) == [] and differences(pair[1], pair[0]) == []


def test_each_difference_is_a_sentence(pair: tuple[Version, Version]) -> None:
    policy, reward = pair
    vocabulary = reward.manifest["vocabulary"]
    size, special = vocabulary["size"], vocabulary["special_tokens"]
    other = "sha256:" + "ab" * 32
    (found,) = differences(policy, changed(reward, tokenizer_digest=other))
    assert found.startswith("team/adapter:1 and team/reward:2 have different tokenizers (sha256:")
    assert found.endswith(f"{other[:19]}…): the same ids mean other text.")
    (found,) = differences(policy, changed(reward, chat_template_digest=None))
    assert "different chat templates" in found and ", none)" in found
    changes = {"vocabulary": vocabulary | {"size": size - 9, "embedding_rows": size - 9}}
    assert differences(policy, changed(reward, **changes)) == [
        f"team/adapter:1 has a vocabulary of {size} tokens, team/reward:2 one of {size - 9}.",
        f"team/adapter:1 can write ids up to {size - 1}, team/reward:2 has embeddings for ids up to {size - 10}.",
    ]
    changes = {"vocabulary": vocabulary | {"special_tokens": special | {"pad": None, "stop": [1, 7]}}}
    assert differences(policy, changed(reward, **changes)) == [
        "team/adapter:1 has the pad token 2, team/reward:2 has none.",
        "team/adapter:1 stops at the ids [1], team/reward:2 at [1, 7].",
    ]

"""What differs between a policy and a reward model that read the same text: tokenizer, ids, template."""

from typing import Any

from baton.registry.version import Version

_ROLES = ("bos", "eos", "pad", "unk")


def differences(policy: Version, reward: Version) -> list[str]:
    """One sentence for each difference that matters when `reward` scores what `policy` writes; empty when none does.

    With any, the policy's ids must not be given to the reward model: decode them, and render the text anew with the
    reward model's own tokenizer and template.
    """
    ours, theirs = policy.manifest, reward.manifest
    found = []
    if ours["tokenizer_digest"] != theirs["tokenizer_digest"]:
        found.append(
            f"{policy.ref} and {reward.ref} have different tokenizers ({_short(ours['tokenizer_digest'])}, "
            f"{_short(theirs['tokenizer_digest'])}): the same ids mean other text."
        )
    sizes = [manifest["vocabulary"]["size"] for manifest in (ours, theirs)]
    if sizes[0] != sizes[1]:
        found.append(f"{policy.ref} has a vocabulary of {sizes[0]} tokens, {reward.ref} one of {sizes[1]}.")
    rows = theirs["vocabulary"]["embedding_rows"]
    if sizes[0] > rows:
        found.append(
            f"{policy.ref} can write ids up to {sizes[0] - 1}, {reward.ref} has embeddings for ids up to {rows - 1}."
        )
    found += _special_differences(policy, reward)
    if ours["chat_template_digest"] != theirs["chat_template_digest"]:
        shown = [_short(manifest["chat_template_digest"]) for manifest in (ours, theirs)]
        found.append(
            f"{policy.ref} and {reward.ref} have different chat templates ({shown[0]}, {shown[1]}): the same dialogue "
            "is rendered as other text."
        )
    return found


def _special_differences(policy: Version, reward: Version) -> list[str]:
    ours, theirs = (_special(version) for version in (policy, reward))
    found = [
        f"{policy.ref} has the {role} token {_id(ours[role])}, {reward.ref} has {_id(theirs[role])}."
        for role in _ROLES
        if ours[role] != theirs[role]
    ]
    if ours["stop"] != theirs["stop"]:
        found.append(f"{policy.ref} stops at the ids {ours['stop']}, {reward.ref} at {theirs['stop']}.")
    return found


def _special(version: Version) -> dict[str, Any]:
    special: dict[str, Any] = version.manifest["vocabulary"]["special_tokens"]
    return special


def _id(token: int | None) -> str:
    return "none" if token is None else str(token)


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:19] + "…"

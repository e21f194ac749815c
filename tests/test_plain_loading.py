"""What the chain publishes loads where Baton is not: in plain transformers and peft, and is the same model there."""

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

VERSIONS = ("tiny/base:1", "tiny/sft:1", "tiny/reward:1", "tiny/policy:1", "tiny/value:1")
CHATML = "<|im_start|>user\nhi<|im_end|>\n"


def got(chain: Any, ref: str, folder: Path, *options: str) -> Path:
    """What `baton get` writes."""
    from baton.cli import app

    command = ["get", ref, str(folder), *options, "--registry", str(chain.root / "registry")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and str(folder) in done.output.replace("\n", "")
    return folder


def test_every_version_of_the_chain_loads_without_baton(tiny_chain: Any, load_plainly: Any, tmp_path: Path) -> None:
    named = {}
    for ref in VERSIONS:
        version = tiny_chain.registry.resolve(ref)
        ways = {
            "materialised": tiny_chain.registry.materialise(version),
            "got": got(tiny_chain, ref, tmp_path / version.kind / ref.replace("/", "-")),
        }
        if version.base:
            ways["merged"] = got(tiny_chain, ref, tmp_path / "merged" / ref.replace("/", "-"), "--merge")
        for way, folder in ways.items():
            kind = version.kind
            if way == "merged":
                kind = "merged" if kind == "adapter" else "classifier"
            probe = version.manifest["probe"]
            named[f"{ref} {way}"] = {"kind": kind, "folder": str(folder), "probe": probe}
    found = load_plainly(named)
    assert set(found) == set(named) and len(named) == 14
    for name, result in found.items():
        probe = named[name]["probe"]
        largest = max(abs(value) for row in probe["expected"] for value in row)
        assert result["difference"] <= probe["atol"] + probe["rtol"] * largest, name
        # the base knows no dialogues yet
        assert result["rendered"] == (None if name.startswith("tiny/base") else CHATML), name


def test_the_probe_tells_the_versions_apart(tiny_chain: Any, load_plainly: Any) -> None:
    """A comparison that any model would pass shows nothing."""
    probes = {ref: tiny_chain.registry.resolve(ref).manifest["probe"] for ref in VERSIONS}
    folders = {ref: str(tiny_chain.registry.materialise(tiny_chain.registry.resolve(ref))) for ref in VERSIONS}
    swapped = {
        "base for sft": {"kind": "base", "folder": folders["tiny/base:1"], "probe": probes["tiny/sft:1"]},
        "sft for policy": {"kind": "adapter", "folder": folders["tiny/sft:1"], "probe": probes["tiny/policy:1"]},
        "reward for value": {"kind": "reward", "folder": folders["tiny/reward:1"], "probe": probes["tiny/value:1"]},
    }
    for name, result in load_plainly(swapped).items():
        assert result["difference"] > 2 * swapped[name]["probe"]["atol"], (name, result)

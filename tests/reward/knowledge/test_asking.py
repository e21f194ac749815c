"""`baton know-reward` on the tiny chain's reward."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from baton.errors import UserError


def run(tiny_chain, *arguments: str):
    import typer

    from reward.commands.know import register

    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)
    given = ["know-reward", *arguments, "--registry", str(tiny_chain.root / "registry")]
    return CliRunner().invoke(app, given, catch_exceptions=False)


def test_measures_and_writes_the_page(tiny_chain, tmp_path) -> None:
    data, out = str(tiny_chain.root / "world" / "preferences_eval.jsonl"), tmp_path / "page.html"
    options = ["--data", data, "--out", str(out), "--limit", "6", "--perturbed", "2"]
    asked = ["--sft", "tiny/sft:candidate", "--samples", "2", "--max-new-tokens", "4"]
    done = run(tiny_chain, "tiny/reward:candidate", *options, *asked, "--json")
    metrics = json.loads(done.stdout)
    assert metrics["eval/pairs"] == 6 and metrics["sft/samples"] == 2 and "perturbed/flattery" in metrics
    page = out.read_text(encoding="utf-8")
    assert "tiny/reward:1" in page and "preferences_eval.jsonl" in page
    told = run(tiny_chain, "tiny/reward:candidate", "--data", data, "--out", str(out), "--perturbed", "0").stdout
    assert "pairs; left out: 0 longer than" in told and told.rstrip().endswith("page.html")


@pytest.mark.parametrize(
    ("ref", "options", "said"),
    [
        ("tiny/sft:candidate", [], "gives no reward"),
        ("tiny/reward:candidate", ["--format", "csv"], "known are"),
        ("tiny/reward:candidate", ["--max-length", "2"], "raise --max-length"),
    ],
)
def test_mistakes_are_told(tiny_chain, tmp_path, ref, options, said) -> None:
    data = str(tiny_chain.root / "world" / "preferences_eval.jsonl")
    with pytest.raises(UserError, match=said):
        run(tiny_chain, ref, "--data", data, "--out", str(tmp_path / "page.html"), *options)


def test_a_policy_of_another_tokenizer_is_refused(tiny_chain, tmp_path) -> None:
    from tests.conftest import swap_two_tokens

    chain = tiny_chain.copy(tmp_path)
    other = chain.republished(swap_two_tokens)
    data = str(chain.root / "world" / "preferences_eval.jsonl")
    with pytest.raises(UserError, match="has another tokenizer"):
        run(chain, "tiny/reward:candidate", "--data", data, "--sft", other, "--out", str(tmp_path / "page.html"))


def test_members_of_an_ensemble_are_compared(tiny_chain, tmp_path) -> None:
    """Two members, the second with a head turned round: of two opposite opinions none is left."""
    from safetensors.torch import load_file, save_file

    from baton.adapters import SCORE_KEY

    chain, folder = tiny_chain.copy(tmp_path), tmp_path / "both"
    chain.registry.materialise(chain.versions["reward"], folder)
    second = folder / "members" / "1"
    second.mkdir(parents=True)
    shutil.copy(folder / "adapter_config.json", second)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {SCORE_KEY: -tensors[SCORE_KEY]}, second / "adapter_model.safetensors", {"format": "pt"})
    shutil.rmtree(folder / "base", ignore_errors=True)
    base = chain.registry.by_digest(chain.versions["reward"].base)
    chain.registry.publish(folder, name="tiny/both", kind="reward", base=base, details={})
    data, out = str(chain.root / "world" / "preferences_eval.jsonl"), str(tmp_path / "page.html")
    done = run(chain, "tiny/both:1", "--data", data, "--out", out, "--perturbed", "0", "--json")
    metrics = json.loads(done.stdout)
    assert metrics["eval/agreement"] == 0.0 and metrics["eval/margin"] == pytest.approx(0.0, abs=1e-6)
    sides = [metrics[f"eval/accuracy/member/{k}"] for k in range(2)]
    assert sum(sides) == pytest.approx(1.0) and sides[0] != 0.5

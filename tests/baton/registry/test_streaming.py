"""Float32 out of a 16-bit file, layer by layer: the very numbers of a model loaded in float32, or not at all."""

from pathlib import Path
from typing import Any

import pytest

from baton.registry import probe
from baton.registry.streaming import stream

VOCABULARY = {"size": 280, "special_tokens": {"bos": 0, "eos": 1, "pad": 2, "unk": None, "stop": [1]}}


def both_ways(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found = []
    for worth in (1 << 60, 0):
        monkeypatch.setattr(probe, "_WORTH_STREAMING", worth)
        found.append(probe.compute(folder, None, kind, VOCABULARY))
    return found


def test_the_numbers_are_those_of_float32(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    in_full, streamed = both_ways(made.base, "base", monkeypatch)
    assert in_full == streamed
    # and not those of bfloat16, which this model's outputs would show
    import torch
    from transformers import AutoModelForCausalLM

    narrow = probe.outputs(AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.bfloat16).eval(), in_full)
    assert probe.largest_difference(narrow, in_full) is not None


def test_the_weights_stay_narrow_and_go_back(made: Any) -> None:
    import torch

    model = probe.load_whole(made.base, None, 2, in_stored_dtype=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert stream(model)
    for _ in range(2):
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "meta")}
        with torch.no_grad():
            assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32


def test_a_model_that_cannot_be_streamed_is_loaded_in_full(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that keeps a constant in the narrow dtype, and one whose layers read each other's weights."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding

    wanted = both_ways(made.base, "base", monkeypatch)[0]
    forward = LlamaMLP.forward

    def reach_over(self: Any, x: Any) -> Any:
        return forward(self, x) + 0 * (x @ self.gate_proj.weight.T)[..., :1].sum()

    monkeypatch.setattr(LlamaMLP, "forward", reach_over)
    assert both_ways(made.base, "base", monkeypatch)[1] == wanted
    model = probe.load_whole(made.base, None, 2, in_stored_dtype=True)
    rotary = next(module for module in model.modules() if isinstance(module, LlamaRotaryEmbedding))
    rotary.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16), persistent=False)
    assert not stream(model) and {p.device.type for p in model.parameters()} == {"cpu"}


SIZES = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"intermediate_size": 64, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | HEADS | {"tie_word_embeddings": True},
    "mistral": SIZES | HEADS,
    "qwen2": SIZES | HEADS,
    "qwen3": SIZES | HEADS | {"head_dim": 16},
    "gemma": SIZES | HEADS | {"head_dim": 16},
    "gemma2": SIZES | HEADS | {"head_dim": 16},
    "phi": SIZES | {"intermediate_size": 64},
    "phi3": SIZES | HEADS | {"pad_token_id": 2},
    "gpt_neox": SIZES | {"intermediate_size": 64},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"vocab_size": 304, "n_embd": 32, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_numbers_of_a_full_load(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, initializer_range=0.2, bos_token_id=0, eos_token_id=1, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    in_full, streamed = both_ways(tmp_path, "base", monkeypatch)
    assert in_full == streamed


@pytest.mark.parametrize("wrap", [lambda view: view, lambda view: (1, [view[:2]]), lambda view: {"weight": view.T}])
def test_a_layer_that_gives_a_view_of_its_weights_cannot_be_streamed(wrap: Any) -> None:
    """The next layer's weights would take its place in memory: the caller loads the model in full."""
    import torch

    class Showing(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return wrap(self.weight)

    model: Any = Showing(4, 4, bias=False).to(torch.bfloat16)
    model.config = type("Config", (), {})()
    assert stream(model)
    with pytest.raises(RuntimeError, match="Showing gives a view of its own weights"):
        model(torch.ones(1, 4))

"""Decoder layers as two functions each against transformers' own layers: values, gradients, company, what is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton import attention, decoder_blocks
from baton.adapter_roles import attach_new
from baton.lora import Acting, join_families
from baton.recipe import Lora

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
ROWS = torch.tensor([[3, 9, 41, 7, 22, 30, 8], [5, 17, 2, 44, 11, 0, 0], [12, 8, 33, 0, 0, 0, 0]])
LENGTHS = [7, 5, 3]


def config_of(kind: str, **changes: Any) -> Any:
    import transformers

    bias = {"attention_bias": True, "mlp_bias": True} if kind == "Llama" else {}
    window = {"sliding_window": None} if kind == "Mistral" else {}
    return getattr(transformers, f"{kind}Config")(**(SIZES | bias | window | changes))


def joined(
    kind: str,
    dtype: torch.dtype = torch.float64,
    targets: Any = "all-linear",
    seed: int = 0,
    size: float = 0.2,
    **changes: Any,
) -> Any:
    """A frozen causal model with a random adapter, acting for the role "x"."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes)).eval().requires_grad_(False)
    acting = Acting()
    attach_new(model, "x", Lora(r=3, targets=targets), acting, seed=1)
    if targets != "all-linear":  # every layer is shared; those that are not listed have no addition for "x"
        attach_new(model, "other", Lora(r=3), acting, seed=2)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if ".additions." in name:
            parameter.data = size * torch.randn_like(parameter)
            parameter.requires_grad_(".additions.x." in name)
        elif name.endswith(("norm.weight", "bias")):
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    join_families(model)
    acting.role = "x"
    return model


def gradients(model: Any, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a random function of the real tokens' states."""
    slopes = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden.dtype)
    real = torch.tensor([[at < n for at in range(ROWS.shape[1])] for n in LENGTHS])
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((hidden * slopes)[real].sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def assert_same(model: Any) -> torch.Tensor:
    """The real tokens' states and the additions' gradients are those of transformers' layers; returns the states."""
    theirs = model.model(input_ids=ROWS, use_cache=False).last_hidden_state
    ours = decoder_blocks.hidden_states(model.model, ROWS, "x")
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(ours[row, :length], theirs[row, :length], rtol=0, atol=1e-11)
    expected = gradients(model, theirs)
    found = gradients(model, ours)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():  # both take the norms' gradients in float32
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=3e-7 * float(gradient.norm()))
    return ours


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("by_blocks", [False, True])
def test_as_the_layers_of_transformers(
    kind: str, targets: Any, by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_blocks:
        monkeypatch.setattr(attention, "WHOLE", 4)
        monkeypatch.setattr(attention, "BLOCK", 3)
    monkeypatch.setattr(decoder_blocks, "PIECE", 48 * 17)  # 17 of the 21 rows
    model = joined(kind, targets=targets)
    assert decoder_blocks.can_compute(model.model, ROWS)
    ours = assert_same(model)
    with torch.no_grad():
        assert torch.equal(decoder_blocks.hidden_states(model.model, ROWS, "x"), ours)


@pytest.mark.parametrize("spare", [0, 2, 6, 1000])
@pytest.mark.parametrize("windows", [(512, 256), (4, 3)])
def test_padding_left_out(spare: int, windows: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However rows are put together, states and gradients are those of padded rows."""
    model = joined("Llama")
    padded = decoder_blocks.hidden_states(model.model, ROWS, "x")
    expected = gradients(model, padded)
    size = decoder_blocks._weights(model.model.layers[0])
    assert size == 2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 80
    monkeypatch.setattr(decoder_blocks, "SPLIT", spare * size)
    monkeypatch.setattr(attention, "WHOLE", windows[0])
    monkeypatch.setattr(attention, "BLOCK", windows[1])
    found = decoder_blocks.hidden_states(model.model, ROWS, "x", LENGTHS)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[row, :length], padded[row, :length], rtol=0, atol=1e-11)
        assert spare or not found[row, length:].any()
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(decoder_blocks.hidden_states(model.model, ROWS, "x", LENGTHS), found)


@pytest.mark.parametrize(
    ("lengths", "spare", "expected"),
    [
        ([7, 5, 3], 0, [(0, 1, 7), (1, 2, 5), (2, 3, 3)]),
        ([7, 5, 3], 2, [(0, 2, 7), (2, 3, 3)]),
        ([7, 5, 3], 5, [(0, 2, 7), (2, 3, 3)]),
        ([7, 5, 3], 6, [(0, 3, 7)]),
        ([4, 4, 4], 0, [(0, 3, 4)]),
        ([3, 5, 5], 1, [(0, 1, 3), (1, 3, 5)]),  # rows need not come by length
        ([9], 0, [(0, 1, 9)]),
    ],
)
def test_rows_of_like_length_are_a_block(lengths: list[int], spare: int, expected: list[tuple[int, int, int]]) -> None:
    found = decoder_blocks._blocks(lengths, spare)
    assert [(block.rows.start, block.rows.stop, block.length) for block in found] == expected
    places = [block.tokens for block in found]
    assert [place.start for place in places] == [0, *(place.stop for place in places[:-1])]
    assert places[-1].stop == sum((stop - start) * length for start, stop, length in expected)


SCALED_POSITIONS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    },
]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 16}]  # not the hidden size over the heads
    + [
        {"max_position_embeddings": 4, "rope_parameters": {"rope_theta": 10000.0, **scaled}}
        for scaled in SCALED_POSITIONS
    ],
)
def test_positions_and_heads_of_other_kinds(changes: dict[str, Any]) -> None:
    """Scaled rotations come from transformers' own table, whose cosines yarn multiplies by a factor."""
    model = joined("Llama", **changes)
    assert decoder_blocks.can_compute(model.model, ROWS)
    assert_same(model)


def test_windows_of_some_layers_are_not_computed() -> None:
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert not decoder_blocks.can_compute(joined("Qwen2", **window).model, ROWS)
    assert decoder_blocks.can_compute(joined("Qwen2", **window | {"sliding_window": 7}).model, ROWS)


def test_the_base_alone() -> None:
    model = joined("Llama")
    model.model.layers[0].self_attn.q_proj._acting.role = None
    theirs = model.model(input_ids=ROWS[:1], use_cache=False).last_hidden_state
    torch.testing.assert_close(decoder_blocks.hidden_states(model.model, ROWS[:1], None), theirs, rtol=0, atol=1e-11)


def test_a_row_does_not_depend_on_its_company() -> None:
    model = joined("Llama")
    together = decoder_blocks.hidden_states(model.model, ROWS, "x")
    expected = {name: torch.zeros_like(gradient) for name, gradient in gradients(model, together).items()}
    slopes = torch.randn(together.shape, generator=torch.Generator().manual_seed(3)).double()
    for row, length in enumerate(LENGTHS):
        alone = decoder_blocks.hidden_states(model.model, ROWS[row : row + 1, :length], "x")
        torch.testing.assert_close(alone[0], together[row, :length], rtol=0, atol=1e-12)
        wanted = [p for p in model.parameters() if p.requires_grad]
        parts = torch.autograd.grad((alone[0] * slopes[row, :length]).sum(), wanted)
        for total, part in zip(expected.values(), parts, strict=True):
            total += part
    for name, gradient in gradients(model, decoder_blocks.hidden_states(model.model, ROWS, "x")).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-8)


def test_in_bfloat16_it_errs_no_more_than_the_layers() -> None:
    """By the distance of the gradients from float32's, over ten random models."""
    ours, theirs = zip(*(errors_in_bfloat16(seed) for seed in range(10)), strict=True)
    assert 0 < sum(ours) < 1.1 * sum(theirs) < 1, (ours, theirs)


def errors_in_bfloat16(seed: int) -> tuple[float, float]:
    exact, rounded = (
        joined("Llama", dtype, seed=seed, initializer_range=0.05, size=0.03)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for (name, narrow), wide in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        if ".additions." in name:
            narrow.data = wide.data  # float32, as in training
        else:
            wide.data.copy_(narrow.data.float())
    truth = gradients(exact, exact.model(input_ids=ROWS, use_cache=False).last_hidden_state)

    def error(hidden: torch.Tensor) -> float:
        found = gradients(rounded, hidden)
        off = sum(float((found[name] - gradient).norm() ** 2) for name, gradient in truth.items())
        return float((off / sum(float(gradient.norm() ** 2) for gradient in truth.values())) ** 0.5)

    ours = error(decoder_blocks.hidden_states(rounded.model, ROWS, "x"))
    return ours, error(rounded.model(input_ids=ROWS, use_cache=False).last_hidden_state)


def test_rms_norm_against_autograd_of_its_formula() -> None:
    torch.manual_seed(0)
    x, weight, given, added = torch.randn(9, 7), torch.rand(7) + 0.5, torch.randn(9, 7), torch.randn(9, 7)
    found, inverse = decoder_blocks.rms_norm(x, weight, 1e-5)
    x.requires_grad_(True)
    plain = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(found, plain.detach())
    (expected,) = torch.autograd.grad((plain * given).sum(), x)
    with torch.no_grad():
        ours = decoder_blocks.rms_norm_backward(given, x, inverse, weight, added)
    torch.testing.assert_close(ours, expected + added)


def test_rotation_turns_pairs_and_minus_sine_turns_back() -> None:
    """By hand: (1, 2) by 90 degrees is (-2, 1)."""
    tensor = torch.tensor([1.0, 5.0, 2.0, 7.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    turned = decoder_blocks.rotated(tensor, cos, sin)
    assert turned.flatten().tolist() == [-2.0, 5.0, 1.0, 7.0]
    assert torch.equal(decoder_blocks.rotated(turned, cos, -sin), tensor)


def unshare(model: Any) -> None:
    layer = model.model.layers[1].self_attn
    layer.o_proj = layer.o_proj.base


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: setattr(model.config, "hidden_act", "gelu"),
        lambda model: setattr(model.config, "sliding_window", 6),
        lambda model: setattr(model.config, "model_type", "granite"),
        lambda model: model.model.layers[1].register_forward_hook(lambda *given: None),
        lambda model: model.model.layers[0].input_layernorm.weight.requires_grad_(True),
        lambda model: model.model.layers[0].input_layernorm.float(),
        unshare,
    ],
)
def test_what_it_does_not_compute(change: Callable[[Any], Any]) -> None:
    model = joined("Llama")
    assert decoder_blocks.can_compute(model.model, ROWS)
    change(model)
    assert not decoder_blocks.can_compute(model.model, ROWS)


def test_neither_long_rows_nor_autocast_nor_layers_apart() -> None:
    model = joined("Llama")
    assert not decoder_blocks.can_compute(model.model, torch.zeros(1, attention.SHORT + 1, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        assert not decoder_blocks.can_compute(model.model, ROWS)
    from transformers import AutoModelForCausalLM

    apart = AutoModelForCausalLM.from_config(config_of("Llama")).eval()
    assert not decoder_blocks.can_compute(apart.model, ROWS)
    attach_new(apart, "x", Lora(r=3), Acting(), seed=1)
    assert not decoder_blocks.can_compute(apart.model, ROWS)

"""Packed documents get the logits and the gradients that each gets alone; models and kernels that leak are found."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from baton.document_borders import NAME, check_borders, choose_document_attention, collator, with_borders
from baton.errors import UserError
from baton.packing import IGNORED, collate, pack

PAD = 0
LENGTHS = (9, 1, 5, 7, 1, 1, 12, 3, 2)
"""Documents of one token too, next to each other and at the row's end."""


def build(kind: str) -> Any:
    """A random decoder of 48 tokens whose next-token distributions are far from uniform."""
    import transformers as hf

    shape = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
    }
    torch.manual_seed(0)
    if kind == "gpt2":  # learned positions
        config = hf.GPT2Config(
            vocab_size=48, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, resid_pdrop=0
        )
        return hf.GPT2LMHeadModel(config).eval()
    if kind == "mistral":  # a window of 4 tokens
        return hf.MistralForCausalLM(hf.MistralConfig(**shape, sliding_window=4, head_dim=8)).eval()
    if kind == "gemma2":  # windows and caps by turns
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**shape, sliding_window=4, head_dim=8)).eval()
    if kind == "mamba":
        recurrent = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        return hf.MambaForCausalLM(hf.MambaConfig(**recurrent)).eval()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**shape)).eval()


@pytest.fixture(scope="module")
def documents() -> list[tuple[list[int], list[bool]]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 48, (length,), generator=generator).tolist() for length in LENGTHS]
    return [(ids, [True] * len(ids)) for ids in drawn]


def losses(model: Any, **batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, sum of the losses)."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    return logits, loss


def compare(model: Any, documents: Any, batch: dict[str, Any], rows: list[Any]) -> None:
    """Logits and gradients of a packed batch against the documents one by one."""
    packed, loss = losses(model, **batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    known = {tuple(ids): ids for ids, _ in documents}
    total = torch.zeros(())
    seen = 0
    for row, content in enumerate(rows):
        starts = [at for at, place in enumerate(content["position_ids"].tolist()) if not place]
        for start, stop in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            ids = tuple(content["input_ids"][start:stop].tolist())
            if ids not in known:
                assert set(ids) == {PAD}
                continue
            seen += 1
            alone = torch.tensor([ids])
            labels = torch.tensor([[IGNORED, *ids[1:]]])
            logits, own = losses(model, input_ids=alone, labels=labels) if len(ids) > 1 else (model(alone).logits, 0)
            assert float((packed[row, start:stop] - logits[0]).detach().abs().max()) < 1e-5, ids
            total = total + own
    assert seen == len(documents)
    expected = torch.autograd.grad(total, list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def packed_batch(model: Any, documents: Any, length: int) -> tuple[dict[str, Any], list[Any]]:
    batch = collator(model)(pack(documents, length, PAD).rows)
    rows = [{key: batch[key][at] for key in ("input_ids", "position_ids")} for at in range(len(batch["input_ids"]))]
    return batch, rows


KERNELS = [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager"), ("mistral", "sdpa")]
KERNELS += [("mistral", "eager"), ("gemma2", "eager")]


@pytest.mark.parametrize("length", [16, 45])
@pytest.mark.parametrize(("kind", "attention"), KERNELS)
def test_packed_documents_compute_as_alone(kind: str, attention: str, length: int, documents: Any) -> None:
    """All in one row, padding behind them, and in several rows."""
    model = build(kind)
    model.config._attn_implementation = attention
    compare(model, documents, *packed_batch(model, documents, length))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_documents_one_by_one_compute_as_alone(kind: str, documents: Any) -> None:
    model = build(kind)
    choose_document_attention(model, 4096)
    assert model.config._attn_implementation == NAME
    batch, rows = packed_batch(model, documents, 16)
    assert batch["max_length_q"] == 16
    logits, loss = losses(model, **batch)
    model.config._attn_implementation = "sdpa"
    expected, expected_loss = losses(model, **collate(pack(documents, 16, PAD).rows))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected_loss, list(model.parameters())),
        rtol=1e-4,
        atol=2e-5,
    )


def test_the_chosen_attention_refuses_what_is_not_packed() -> None:
    model = build("llama")
    choose_document_attention(model, 4096)
    with pytest.raises(RuntimeError, match="is for packed rows"):
        model(torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize(("kind", "length"), [("gpt2", 4096), ("gemma2", 4096), ("llama", 512)])
def test_other_models_and_short_rows_keep_their_attention(kind: str, length: int) -> None:
    model = build(kind)
    before = model.config._attn_implementation
    choose_document_attention(model, length)
    assert model.config._attn_implementation == before
    assert collator(model) is collate


def test_borders_are_those_of_all_rows_laid_end_to_end(documents: Any) -> None:
    batch = with_borders({"position_ids": torch.tensor([[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]])})
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 3, 5, 10, 10, 10, 10]
    assert batch["max_length_q"] == batch["max_length_k"] == 5
    assert batch["cu_seq_lens_q"].dtype == torch.int32


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_gpu_kernel_is_asked_for_what_the_cpu_computes(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's kernel, by its documentation: a token sees `left` tokens before it and itself."""
    from baton import document_borders

    def varlen_attn(
        q: Any,
        k: Any,
        v: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        *,
        scale: Any,
        window_size: Any,
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert enable_gqa and window_size[1] == 0 and max_q == max_k == 16 and cu_q is cu_k
        document = torch.bucketize(torch.arange(len(q)), cu_q, right=True)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (document[:, None] == document) & (distance >= 0)
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        keys, values = (part.repeat_interleave(2, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    ends = torch.tensor([0, 5, 6, 20, 20], dtype=torch.int32)
    given = (drawn(20, 4, 8), drawn(20, 2, 8), drawn(20, 2, 8), ends, 16, 0.3, window)
    torch.testing.assert_close(document_borders._on_gpu(*given), document_borders._one_by_one(*given))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_the_gpu_kernel_computes_what_the_cpu_does(window: int | None) -> None:
    from baton import document_borders

    ends = torch.tensor([0, 5, 6, 20, 20], dtype=torch.int32, device="cuda")
    parts = [drawn(20, heads, 64, dtype=torch.bfloat16, device="cuda").requires_grad_() for heads in (4, 2, 2)]
    found, expected = (
        attend(*parts, ends, 16, 0.125, window) for attend in (document_borders._on_gpu, document_borders._one_by_one)
    )
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    ours, theirs = (torch.autograd.grad(output.float().square().sum(), parts) for output in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def flash_stub(queries: Any, keys: Any, values: Any, causal: bool, scale: float | None) -> torch.Tensor:
    """(B, L, h, d): plain attention, by its definition."""
    keys, values = (part.repeat_interleave(queries.shape[2] // part.shape[2], 2) for part in (keys, values))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * (scale or queries.shape[-1] ** -0.5)
    assert causal
    scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Llama whose attention goes through transformers' flash functions, with stand-ins for the kernels."""
    from transformers import modeling_flash_attention_utils as utils

    def whole(q: Any, k: Any, v: Any, causal: bool, softmax_scale: float | None = None, **options: Any) -> torch.Tensor:
        return flash_stub(q, k, v, causal, softmax_scale)

    def runs(q: Any, k: Any, v: Any, cu_seqlens_q: Any, causal: bool, **options: Any) -> torch.Tensor:
        parts = zip(*(part.split(cu_seqlens_q.diff().tolist()) for part in (q, k, v)), strict=True)
        found = [flash_stub(a[None], b[None], c[None], causal, options.get("softmax_scale"))[0] for a, b, c in parts]
        return torch.cat(found)

    def arguments(**given: Any) -> dict[str, Any]:
        return {"causal": given["is_causal"], "softmax_scale": given["softmax_scale"]}

    monkeypatch.setattr(
        utils, "lazy_import_flash_attention", lambda name: ((whole, runs, None, None, None), (arguments, None))
    )
    monkeypatch.setattr(
        "transformers.integrations.flash_attention._flash_attention_forward", utils._flash_attention_forward
    )
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    yield model


def test_flash_kernels_are_told_the_borders_of_several_rows(flash: Any, documents: Any) -> None:
    compare(flash, documents, *packed_batch(flash, documents, 16))
    check_borders(flash)


def test_flash_kernels_that_are_not_told_leak(flash: Any, documents: Any) -> None:
    rows = pack(documents, 16, PAD).rows
    told, _ = losses(flash, **collator(flash)(rows))
    untold, _ = losses(flash, **collate(rows))
    assert float((told - untold).detach().abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_stop_at_borders_pass(kind: str, dtype: torch.dtype) -> None:
    check_borders(build(kind).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recurrent_model_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"mamba.* lets documents packed into one row see each other"):
        check_borders(build("mamba").to(dtype))


def test_attention_that_knows_no_borders_is_refused() -> None:
    from baton.attention import choose_attention

    model = build("llama")
    choose_attention(model, 16)
    with pytest.raises(UserError, match="baton_short_causal"):
        check_borders(model)

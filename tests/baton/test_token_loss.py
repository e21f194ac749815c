"""The loss without logits against torch's cross entropy on all of them."""

import pytest
import torch

from baton import token_loss as module
from baton.token_loss import token_loss


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.T
    nats = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return nats + z * logits.logsumexp(-1)[labels >= 0].square().sum(), nats


@pytest.mark.parametrize("z", [0.0, 0.1], ids=["plain", "z_loss"])
@pytest.mark.parametrize("chunk", [40, 1 << 20], ids=["chunks", "whole"])
def test_loss_and_gradients(z: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)  # 40: three positions of 13 tokens at a time
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(13, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(13, (11,), generator=generator)
    labels[[0, 7]] = -100
    expected = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    found = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    ours, (theirs, nats) = token_loss(*found, labels, z), reference(*expected, labels, z)
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-12)
    assert float(ours.nats) == pytest.approx(float(nats.detach()), abs=1e-12) and int(ours.num_tokens) == 9
    (3 * ours.loss).backward()
    (3 * theirs).backward()
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_no_table_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                largest = max(largest, found.numel())
            return found

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with Watch():
        token_loss(hidden, weight, torch.zeros(64, dtype=torch.long)).loss.backward()
    assert largest == 1000


def test_many_chunks_of_a_narrow_head_add_up_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 what a late chunk adds to a large sum would be lost: token 5 is every second one."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2048, 16, generator=generator), 0.3 * torch.randn(64, 16, generator=generator)
    labels = torch.randint(64, (2048,), generator=generator)
    labels[::2] = 5

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        inputs = hidden.bfloat16().to(dtype), weight.bfloat16().to(dtype).requires_grad_()
        token_loss(*inputs, labels).loss.backward()
        assert inputs[1].grad is not None and inputs[1].grad.dtype is dtype
        return inputs[1].grad.double()

    exact = gradient(torch.float64)
    monkeypatch.setitem(module.CHUNK, "cpu", 64 * 8)  # 256 chunks
    assert float((gradient(torch.bfloat16) - exact).norm() / exact.norm()) < 5e-3

"""The batch arithmetic by hand; the memory of activations against what autograd really keeps."""

from typing import Any

import pytest
import torch

from baton import decoder_blocks
from baton.recipe import Lora, PPORecipe
from stages.estimate import GB, BatchPlan, MemoryEstimate, Shape, Weights, available_bytes, estimate_memory


def plan(processes: int = 1, **changes: Any) -> BatchPlan:
    sections: dict[str, Any] = {
        "rollout": {"max_prompt_tokens": 96, "max_new_tokens": 64},
        "ppo": {"epochs": 4, "minibatches": 2},
        "train": {"steps": 20, "learning_rate": 1e-4, "episodes_per_batch": 16, "tokens_per_micro_batch": 512},
    }
    for name, change in changes.items():
        sections[name] |= change
    content = {"stage": "ppo", "sft": "a/b:1", "reward": "a/c:1", "run_dir": "r", "publish": {"name": "a/d"}}
    data = {"train": [{"path": "x", "format": "prompts"}]}
    return BatchPlan.of(PPORecipe.model_validate({**content, "data": data, **sections}), processes)


def test_the_batch_arithmetic() -> None:
    found = plan(processes=2)
    assert found.optimizer_steps == 20 * 4 * 2
    assert found.micro_batches == 2  # 16 / 2 processes / 2 minibatches = 4 episodes of 160, three of which fit into 512
    text = found.text()
    assert "20 steps of 16 episodes, 8 a process: 320 episodes in all" in text
    assert "4 epochs × 2 minibatches of 8 = 8 optimizer steps a rollout, 160 in all" in text
    assert "160 an episode (96 of prompt, 64 of reply) and 2,560 a step" in text
    assert "at most 512 a micro-batch, so 2 or fewer of them a minibatch and process" in text
    assert "note" not in text and "critic" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_single_process_and_the_exceptions() -> None:
    more = {"ppo": {"epochs": 1, "minibatches": 1, "critic_warmup_steps": 3, "kl_budget_nats": 5.0}}
    text = plan(train={"tokens_per_micro_batch": 128}, **more).text()
    assert "a process" not in text
    assert "1 epoch × 1 minibatch = 1 optimizer step a rollout, at most 20 in all" in text
    assert "trained alone in the first 3 steps" in text
    assert "longer than train.tokens_per_micro_batch (128)" in text
    assert "so 16 or fewer of them" in text


def test_a_config_gives_the_shape() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=96, vocab_size=50)  # fmt: skip
    assert Shape.of(config) == Shape(64, 3, 4, 2, 16, 96, 50)


def kept_by_autograd(model: Any, autocast: bool, rows: int, longest: int) -> int:
    """Bytes of the storages that the backward of one forward holds on to, parameters left out; each counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storage keeps its address from being given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(rows * longest).view(rows, longest) % 50
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if decoder_blocks.is_joined(model.model):
            hidden = decoder_blocks.hidden_states(model.model, ids, "policy")
        else:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("way", "rank"), [("fused", 8), ("eager", 8), ("blocks", 8), ("fused", None), ("eager", None)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "hidden", "inner", "longest"), [(4, 2, 128, 384, 64), (9, 3, 144, 160, 32)]
)
def test_activations_are_what_autograd_keeps(
    heads: int, kv_heads: int, hidden: int, inner: int, longest: int, rank: int | None, half: bool, way: Any
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from baton.adapter_roles import attach_new
    from baton.lora import Acting, join_families

    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=3, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=50)  # fmt: skip
    config._attn_implementation = "eager" if way == "eager" else "sdpa"
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16 if half and rank else torch.float32)
    if rank:
        acting = Acting()
        model.requires_grad_(False)
        attach_new(model, "policy", Lora(r=rank), acting, seed=0)
        acting.role = "policy"
    if way == "blocks":
        join_families(model)
    layers = [p for name, p in model.named_parameters() if p.requires_grad and ".layers." in name and p.ndim == 2]
    shape = Shape.of(config)
    estimated = 4 * longest * shape.layers * shape.layer_bytes_per_token(longest, rank, half, way)
    estimated += 2 * sum(p.numel() for p in layers) * half
    measured = kept_by_autograd(model.eval(), half and not rank, rows=4, longest=longest)
    assert estimated == pytest.approx(measured, rel=0.1)


SHAPE = Shape(hidden_size=100, layers=2, heads=4, kv_heads=2, head_dim=25, intermediate_size=200, vocabulary=1000)


def estimated(**changes: Any) -> MemoryEstimate:
    settings: dict[str, Any] = {
        "half": False, "rank": 4, "graphs": 2, "micro_batch_tokens": 64, "longest_tokens": 40, "logits_rows": 16,
        "rollout_rows": 8, "prefill_tokens": 30, "on_cpu": True,
    }  # fmt: skip
    weights = [Weights("base", 1_000_000, 0, 2), Weights("policy", 30_000, 30_000, 2), Weights("reward", 5_000, 0, 4)]
    return estimate_memory(SHAPE, weights, **(settings | changes))


def test_the_parts_by_hand() -> None:
    found = estimated(laid_out=77)
    assert dict(found.always) == {
        "weights, base": 2_000_000,
        "weights, policy": 120_000,
        "weights, reward": 20_000,
        "Adam's moments": 240_000,
        "libraries": 600_000_000,
    }
    # norms 2H + 2, adapters 2H, eager attention 4Q + heads L, MLP 4I, LoRA 7r
    layer = 64 * 4 * ((2 * 100 + 2) + 2 * 100 + (4 * 100 + 4 * 40) + 4 * 200 + 7 * 4)
    assert [size for _, size in found.update] == [120_000, 5 * layer, int(0.7 * 5 * layer), 16 * 1000 * 4 * 3]
    keys_values = 8 * 40 * 2 * 2 * 2 * 25 * 4  # rows, tokens, layers, both, kv heads, head_dim, bytes
    assert [size for _, size in found.rollout] == [keys_values, 30 * (3 * 200 + 3 * 100) * 4, 8 * 1000 * 4 * 3, 77]
    assert found.total == sum(size for _, size in (*found.always, *found.update))


def test_settings_move_their_parts() -> None:
    base = estimated()
    assert estimated(graphs=1).total < base.total < estimated(micro_batch_tokens=128).total
    assert estimated(micro_batch_tokens=10).update == estimated(micro_batch_tokens=40).update  # a row is not split
    crowded = estimated(rollout_rows=10_000)
    assert crowded.total == sum(size for _, size in (*crowded.always, *crowded.rollout)) > base.total
    assert dict(estimated(shards=2).always)["Adam's moments"] == 120_000
    assert dict(estimated(shards=2).update)["gradients"] == 60_000
    # fused attention on a GPU, and from 512 tokens on: 2Q + 2K + heads, so 300 + 4 in place of 400 + 160
    gpu = estimated(on_cpu=False)
    assert estimated(joined=True).total < estimated().total
    assert estimated(joined=True, rank=None).update == estimated(rank=None).update
    assert base.update[1][1] - gpu.update[1][1] == 5 * 64 * 4 * 256
    assert gpu.update[2][1] == pytest.approx(0.1 * gpu.update[1][1], abs=1)
    assert estimated(half=True).rollout[0][1] * 2 == base.rollout[0][1]


def test_it_warns_above_nine_tenths() -> None:
    total = estimated().total
    assert estimated(available=total * 10 // 9 + 10).warning is None
    tight = estimated(available=total * 10 // 9 - 10)
    assert tight.warning is not None and "90% of the" in tight.warning
    hopeless = estimated(available=total // 2)  # nearly everything is there always
    assert hopeless.warning is not None and "the weights alone" in hopeless.warning
    wide = estimated(micro_batch_tokens=1_000_000, available=5 * GB)
    assert wide.warning is not None and "lower train.tokens_per_micro_batch" in wide.warning
    wide = estimated(rollout_rows=1_000_000, available=5 * GB)
    assert wide.warning is not None and "lower rollout.rows" in wide.warning
    assert wide.warning in wide.text() and "at the peak in the rollout" in wide.text()


def test_the_text_names_every_part() -> None:
    text = estimated(available=2 * GB).text()
    assert "of 2.00 GB available a process, at the peak in the update" in text
    for part in ("weights, base", "Adam's moments", "gradients", "activations of a micro-batch of 64 tokens",
                 "keys and values of 8 replies", "logits, 16 positions"):  # fmt: skip
        assert part in text
    assert "warning" not in text


def test_available_memory_is_shared_by_processes() -> None:
    one, two = (available_bytes(torch.device("cpu"), processes) for processes in (1, 2))
    assert one is not None and two is not None and 0 < two < one
    assert available_bytes(torch.device("meta"), 1) is None

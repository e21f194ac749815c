"""Random adapters on a random base, made with peft alone; plain models to compare with; the parts of one PPO step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import RoleFolders

VOCABULARY = 48
STOP, PAD = 1, 2
TEMPERATURE = 0.7


class Oracle:
    """The four roles as separate models, one row at a time, without padding; slow and obvious; float64.

    `policy` "adapter" or "full"; `critic` "adapter" or "separate" (the reward's model, trained), or "shared" (a head on
    the policy's states).
    """

    def __init__(self, folders: RoleFolders, policy: str = "adapter", critic: str = "adapter") -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        def causal(trained: bool) -> Any:
            model = AutoModelForCausalLM.from_pretrained(folders.base)
            found = PeftModel.from_pretrained(model, folders.sft, is_trainable=trained)
            if trained and policy == "full":
                found = found.merge_and_unload().requires_grad_(True)
            return found.double().eval()

        def classifier(trained: bool) -> Any:
            model = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1)
            model.config.pad_token_id = PAD
            found = PeftModel.from_pretrained(model, folders.reward, is_trainable=trained)
            if trained and critic == "separate":
                found = found.merge_and_unload().requires_grad_(True)
            return found.double().eval()

        self.policy_kind, self.critic_kind = policy, critic
        self.policy, self.reference, self.reward = causal(True), causal(False), classifier(False)
        self.value_model = classifier(True) if critic != "shared" else None
        hidden = self.policy.config.hidden_size
        self.shared_head = nn.Parameter(torch.zeros(hidden, dtype=torch.float64))
        self.base = AutoModelForCausalLM.from_pretrained(folders.base).double().eval()

    def logprobs(self, model: Any, prompt: Sequence[int], reply: Sequence[int], temperature: float) -> torch.Tensor:
        """Of each token of the reply, from the full table of logits."""
        logits = model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
        return self.chosen((logits / temperature).log_softmax(-1), prompt, reply)

    @staticmethod
    def chosen(table: torch.Tensor, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
        return torch.stack([table[len(prompt) + at - 1, token] for at, token in enumerate(reply)])

    def all_of(
        self, prompt: Sequence[int], reply: Sequence[int], temperature: float, after: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(log-probabilities, entropies, values) of the trained models; values before each token, and `after` the last.

        One pass a model: transformers' norms round gradients to float32, so that two passes would differ by 1e-6.
        """
        ids = torch.tensor([[*prompt, *reply]])
        inner = self.policy.base_model.model if self.policy_kind == "adapter" else self.policy
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
        table = (inner.lm_head(hidden)[0] / temperature).log_softmax(-1)
        entropies = -(table.exp() * table).sum(-1)[len(prompt) - 1 : -1]
        if self.value_model is None:
            values = hidden[0] @ self.shared_head
        else:
            own = self.value_model.base_model.model if self.critic_kind == "adapter" else self.value_model
            values = own.score(own.model(input_ids=ids, use_cache=False).last_hidden_state)[0, :, 0]
        return self.chosen(table, prompt, reply), entropies, values[len(prompt) - 1 : None if after else -1]

    def score(self, prompt: Sequence[int], reply: Sequence[int]) -> float:
        """The reward model's, by the published class's own forward."""
        with torch.no_grad():
            return float(self.reward(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits)

    def groups(self) -> list[list[nn.Parameter]]:
        """[the policy's parameters, the critic's alone]."""
        critic = [self.shared_head] if self.value_model is None else list(self.value_model.parameters())
        return [[p for p in group if p.requires_grad] for group in (list(self.policy.parameters()), critic)]


@pytest.fixture
def make_oracle(role_folders: RoleFolders) -> Callable[..., Oracle]:
    """Fresh: a test may train it."""
    return lambda policy="adapter", critic="adapter": Oracle(role_folders, policy, critic)


@pytest.fixture
def oracle(make_oracle: Callable[..., Oracle]) -> Oracle:
    return make_oracle()


@pytest.fixture
def make_roles(role_folders: RoleFolders) -> Callable[..., Any]:
    """The roles of Baton in float64; by default as adapters on one base, at temperature 0.7."""
    from dataclasses import replace

    from stages.roles import Cast, Roles

    def make(temperature: float = TEMPERATURE, **changes: Any) -> Any:
        base, sft, reward = role_folders
        cast = Cast(base=base, sft=sft, rewards={"r": [reward]}, critic_start=reward)
        if changes.get("critic") == "shared":
            cast = replace(cast, critic_start=None)
        return Roles(replace(cast, **changes), torch.float32, temperature).double()

    return make


@pytest.fixture(params=["layers", "blocks"])
def roles(make_roles: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """All roles as adapters, by transformers' layers or, joined, by our own functions; a test may train them."""
    roles = make_roles()
    if request.param == "blocks":
        roles.join()
    return roles


@pytest.fixture(scope="session")
def episodes() -> list[Any]:
    """Eight episodes of unlike lengths; stop and pad ids also occur inside prompts; some replies are cut off."""
    from baton.decode import Reply
    from stages.rollout import Episode

    generator = torch.Generator().manual_seed(5)
    made = []
    for index, (asked, said) in enumerate([(3, 4), (7, 1), (1, 6), (5, 3), (2, 2), (9, 5), (4, 6), (6, 1)]):
        prompt = torch.randint(0, VOCABULARY, (asked,), generator=generator).tolist()
        reply = torch.randint(3, VOCABULARY, (said,), generator=generator).tolist()
        prompt[0] = (STOP, PAD, 7)[index % 3]
        ended = index % 3 != 2
        if ended:
            reply[-1] = STOP
        elif said > 1:
            reply[0] = PAD
        made.append(Episode(index, prompt, Reply(reply, ended)))
    return made


PPO_SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "minibatches": 2,
    "kl_coefficient": 0.3,
    "clip_ratio": 0.1,
    "clip_value": 0.3,
    "value_coefficient": 0.5,
    "gamma": 0.9,
    "lam": 0.8,
    "missing_eos_penalty": 2.0,
}
TRAIN_SETTINGS: dict[str, Any] = {
    "steps": 10,
    "episodes_per_batch": 8,
    "learning_rate": 0.02,
    "critic_learning_rate": 0.05,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 0.5,
    "tokens_per_micro_batch": 16,
}


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Any]:
    """Settings of which none is neutral; the warm-up halves the first step's learning rates."""
    from baton.recipe import PPORecipe

    def make(ppo: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **more: Any) -> PPORecipe:
        content = {
            "stage": "ppo",
            "sft": "t/s:1",
            "reward": "t/r:1",
            "run_dir": "unused",
            "publish": {"name": "t/p"},
            "data": {"train": [{"path": "x"}]},
            "rollout": {"max_new_tokens": 6, "temperature": TEMPERATURE},
            "ppo": PPO_SETTINGS | (ppo or {}),
            "train": TRAIN_SETTINGS | (train or {}),
        }
        return PPORecipe.model_validate(content | more)

    return make


class Words:
    """As much of a tokenizer as scoring needs: text is the ids in digits."""

    pad_token_id = PAD

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(token) for token in ids if token != STOP or not skip_special_tokens)


@dataclass
class Trial:
    """The parts of one PPO step, as `stages.ppo.main` puts them together, on one process."""

    recipe: Any
    roles: Any
    scorer: Any
    updater: Any
    raw_scale: Any
    scale: Any

    def score(
        self, episodes: Sequence[Any], rows: Sequence[Any] | None = None, keep_graph: bool = False
    ) -> list[list[Any]]:
        """Minibatches of scored micro-batches with their advantages."""
        from stages.ppo import set_advantages, set_scores
        from stages.prompts import PromptRow

        settings = self.recipe.ppo
        share = len(episodes) // settings.minibatches
        rows = rows or [PromptRow([{"role": "user", "content": "?"}], e.prompt, {}) for e in episodes]
        minibatches = [
            self.scorer.score(episodes[at : at + share], rows[at : at + share], keep_graph=keep_graph)
            for at in range(0, len(episodes), share)
        ]
        set_scores(minibatches, self.recipe, self.scorer.spread, self.raw_scale, self.scale)
        set_advantages(minibatches, self.recipe, self.scorer.spread, settings.kl_coefficient)
        return minibatches

    def update(self, minibatches: list[list[Any]], step: int = 0) -> dict[str, float]:
        """The update; the step that is not the first has full learning rates."""
        coefficient = self.recipe.ppo.kl_coefficient
        found: dict[str, float] = self.updater.update(minibatches, step, coefficient, self.scale.deviation)
        return found

    def parameters(self) -> dict[str, torch.Tensor]:
        """A copy of what is trained."""
        return {name: p.detach().clone() for name, p in self.roles.trained_parameters().items()}


@pytest.fixture(scope="session")
def make_trial() -> Callable[..., Trial]:
    """A trial of `roles` under `recipe`; `ptx` rows are mixed in; reward models have recorded `metrics`."""
    from accelerate import Accelerator

    from stages.advantages import RunningScale
    from stages.scoring import Scorer
    from stages.sharding import Spread
    from stages.update import Updater

    def make(
        roles: Any, recipe: Any, ptx: Sequence[Any] = (), pad_id: int = PAD, metrics: dict[str, float] | None = None
    ) -> Trial:
        accelerator = Accelerator(cpu=True)
        manifest: dict[str, Any] = {"tokenizer_digest": "t", "chat_template_digest": "c", "files": []}
        sft = SimpleNamespace(ref="t/x:1", kind="adapter", base="b", manifest=manifest, metrics=metrics or {})
        run: Any = SimpleNamespace(
            recipe=recipe,
            state=SimpleNamespace(device=torch.device("cpu")),
            inputs=SimpleNamespace(versions=dict.fromkeys(("sft", "reward", "reward-1", "reward-2", "gold"), sft)),
            registry=None,
            dtype=torch.float32,
            say=print,
        )
        words: Any = Words()
        words.pad_token_id = pad_id
        spread = Spread(accelerator)
        scorer = Scorer(run, roles, words, spread)
        return Trial(recipe, roles, scorer, Updater(recipe, roles, spread, ptx, pad_id), RunningScale(), RunningScale())

    return make

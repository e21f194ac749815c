"""A random base with a random SFT adapter and a random reward adapter on it, made with peft alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

VOCABULARY = 48
STOP, PAD = 1, 2


class RoleFolders(NamedTuple):
    """Folders by save_pretrained."""

    base: Path
    sft: Path
    reward: Path


def randomised(model: Any, seed: int) -> Any:
    """The PEFT model with every LoRA tensor, and the head, drawn at random, so that each adapter changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score.modules_to_save" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def role_folders(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> RoleFolders:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("roles")
    folders = RoleFolders(root / "base", root / "sft", root / "reward")
    tiny_llama.save_pretrained(folders.base)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    causal = AutoModelForCausalLM.from_pretrained(folders.base)
    sft = get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=layers))
    randomised(sft, seed=1).save_pretrained(folders.sft)
    classifier = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1)
    reward = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=9, target_modules=layers))
    randomised(reward, seed=2).save_pretrained(folders.reward)
    return folders


class Oracle:
    """The four roles as four separate models, one row at a time, without padding; slow and obvious; float64."""

    def __init__(self, folders: RoleFolders) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        def causal(trained: bool) -> Any:
            model = AutoModelForCausalLM.from_pretrained(folders.base)
            return PeftModel.from_pretrained(model, folders.sft, is_trainable=trained).double().eval()

        def classifier(trained: bool) -> Any:
            model = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1)
            model.config.pad_token_id = PAD
            return PeftModel.from_pretrained(model, folders.reward, is_trainable=trained).double().eval()

        self.policy, self.reference = causal(True), causal(False)
        self.value_model, self.reward = classifier(True), classifier(False)
        self.base = AutoModelForCausalLM.from_pretrained(folders.base).double().eval()

    def logprobs(self, model: Any, prompt: Sequence[int], reply: Sequence[int], temperature: float) -> torch.Tensor:
        """Of each token of the reply, from the full table of logits."""
        ids = torch.tensor([[*prompt, *reply]])
        table = (model(input_ids=ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
        return torch.stack([table[len(prompt) + at - 1, token] for at, token in enumerate(reply)])

    def values(self, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
        """V before each token of the reply: the classifier's score of everything up to there."""
        ids = torch.tensor([[*prompt, *reply]])
        inner = self.value_model.base_model.model
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
        return inner.score(hidden)[0, len(prompt) - 1 : -1, 0]

    def score(self, prompt: Sequence[int], reply: Sequence[int]) -> float:
        """The reward model's, by the published class's own forward."""
        with torch.no_grad():
            return float(self.reward(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits)


@pytest.fixture
def oracle(role_folders: RoleFolders) -> Oracle:
    """Fresh: a test may train it."""
    return Oracle(role_folders)


@pytest.fixture
def roles(role_folders: RoleFolders) -> Any:
    """The four roles of Baton in float64, at temperature 0.7; a test may train them."""
    from stages.roles import Roles

    return Roles(*role_folders, torch.float32, 0.7).double()


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

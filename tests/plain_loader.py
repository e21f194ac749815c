"""The receiving team's code: loads folders with transformers and peft alone and compares them with a manifest's probe.

A program, run by the fixture `load_plainly`: python -I plain_loader.py NAMED.json, where NAMED.json holds
{name: {"kind", "folder", "probe"}}. Prints {name: {"difference", "rendered"}}: the largest difference from the probe,
and a dialogue in the folder's chat template (null where it has none).
"""

import json
import sys
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SCORERS = ("reward", "value", "classifier")
ADAPTERS = ("adapter", "reward", "value")


def models_in(kind: str, folder: str, pad_token_id: int) -> list[Any]:
    """The folder's model, by every plain way that loads its kind; float32, in evaluation mode."""
    where = folder
    if kind in ADAPTERS:
        with open(f"{folder}/adapter_config.json") as file:
            where = json.load(file)["base_model_name_or_path"]
    if kind in SCORERS:
        model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    if kind in ADAPTERS:
        model = PeftModel.from_pretrained(model, folder)
    models = [model.eval()]
    if kind == "adapter":
        models.append(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    return models


def difference(model: Any, probe: dict[str, Any]) -> float:
    """The largest difference from the outputs that the manifest records for its input ids."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor(probe["input_ids"])).logits
    if probe["output"] == "logits":
        last = found[:, -1, : probe["vocabulary_size"]]
        found = torch.cat([last[:, probe["vocabulary_ids"]], last.logsumexp(-1, keepdim=True)], dim=1)
    wanted = torch.tensor(probe["expected"])
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found - wanted).abs().max())


def main() -> None:
    """Print one line of JSON."""
    with open(sys.argv[1]) as file:
        named = json.load(file)
    results = {}
    for name, given in named.items():
        tokenizer = AutoTokenizer.from_pretrained(given["folder"])
        rendered = None
        if tokenizer.chat_template:
            rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        models = models_in(given["kind"], given["folder"], tokenizer.pad_token_id)
        results[name] = {
            "difference": max(difference(model, given["probe"]) for model in models),
            "rendered": rendered,
        }
    ours = {"baton", "reward", "stages"} & {module.split(".")[0] for module in sys.modules}
    assert not ours, ours
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Model cards: Markdown with the Hub's metadata, made from what the registry knows of a version."""

import json
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.registry.history.names import first_names
from baton.registry.travel.card_text import block, clean, inline, table
from baton.registry.trust.attestations import Attestation
from baton.registry.version import HEAD_KINDS, Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

# The licence identifiers that the Hub knows; any other is `other` with a name.
_NAMES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl "
    "apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl "
    "lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 "
    "llama4 grok2-community gemma"
)
_HUB_LICENCES = set(_NAMES.split())
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_KINDS = {
    "base": "a language model",
    "adapter": "a PEFT adapter of a language model",
    "reward": "a reward model: it gives a text one number, higher for what people prefer",
    "value": "a value model: it estimates the reward that a text will end with",
    "merged": "a whole language model, made from a base",
}


class HubModel(NamedTuple):
    """A model on the Hub at one commit."""

    repo_id: str
    commit: str


class Measured(NamedTuple):
    """A metric's value and where it comes from; `by` names who evaluated, and is empty for the publisher."""

    name: str
    value: Any
    source: str
    by: str


def card(
    registry: "Registry",
    version: Version,
    where: str | None = None,
    hub_base: HubModel | None = None,
    merged: bool = False,
    files: list[str] | None = None,
) -> str:
    """The card of a version, the same whenever it is asked for again.

    where: how a reader names the model, a Hub id; None: a folder written by `baton get`. hub_base: where an adapter's
    base lies on the Hub. merged: the adapter is handed over merged into its base. files: noted in the metadata as
    written by Baton. All that comes from outside is escaped. Raises UserError for a damaged record.
    """
    has_base = version.base is not None and not merged
    metrics = measured(version.manifest, registry.attestations(version, "evaluation"))
    sections = [
        f"# {inline(version.name)}",
        f"{inline(version.ref)} is {_KINDS[version.kind]}{_merged_note(version, merged)}.",
        *_base_section(registry, version, hub_base if has_base else None, merged),
        "## How to load",
        block(loading_code(version, where or "FOLDER", hub_base, merged), "python"),
        *([] if where else [f"`FOLDER` is what `baton get {version.ref} FOLDER` writes."]),
        "## Training data",
        _data(version.manifest["data"]),
        "## Metrics",
        table(["metric", "value", "by"], [[each.name, show(each.value), each.source] for each in metrics])
        or "None recorded.",
        "## Lineage",
        block(lineage_tree(registry.lineage(version))),
        "## Recipe",
        block(_yaml(_cleaned(version.manifest["recipe"])), "yaml") if version.manifest["recipe"] else "None recorded.",
        "## Provenance",
        _provenance(version),
    ]
    settings = metadata(version, hub_base, has_base, merged, metrics, files)
    return f"---\n{_yaml(settings)}---\n\n" + "\n\n".join(sections) + "\n"


def metadata(
    version: Version,
    hub_base: HubModel | None,
    has_base: bool,
    merged: bool,
    metrics: list["Measured"],
    files: list[str] | None,
) -> dict[str, Any]:
    """The Hub's metadata of a version (model card specification), without what is unknown; strings are cleaned."""
    manifest = version.manifest
    task = "text-classification" if version.kind in HEAD_KINDS else "text-generation"
    found: dict[str, Any] = {"library_name": "peft" if has_base else "transformers", "pipeline_tag": task}
    found["tags"] = ["baton", *({"reward": ["reward-model"], "value": ["value-model"]}.get(version.kind, []))]
    if hub_base:
        found |= {"base_model": hub_base.repo_id, "base_model_relation": "adapter" if has_base else "merge"}
    if licence := manifest["licence"]:
        found |= _licence(clean(licence))
    if datasets := sorted({name for entry in manifest["data"] if (name := _hub_dataset(entry))}):
        found["datasets"] = datasets
    numbers = [(clean(each.name), each.value) for each in metrics if is_number(each.value)]
    if numbers:
        result = {
            "task": {"type": task},
            "dataset": {"type": "recorded", "name": "as recorded in the registry"},
            "metrics": [{"type": name, "name": name, "value": value} for name, value in numbers],
        }
        found["model-index"] = [{"name": version.name, "results": [result]}]
    found["baton"] = {"version": version.ref, "manifest": version.digest}
    if files is not None:
        found["baton"]["files"] = sorted(files)
    return found


def loading_code(version: Version, where: str, hub_base: HubModel | None = None, merged: bool = False) -> str:
    """Python that loads the version with transformers and peft alone; `where`: a Hub id or a folder."""
    is_scorer = version.kind in HEAD_KINDS
    auto = "AutoModelForSequenceClassification" if is_scorer else "AutoModelForCausalLM"
    pad = version.manifest["vocabulary"]["special_tokens"]["pad"]
    head = f", num_labels=1, pad_token_id={pad}" if is_scorer else ""
    if version.base is None or merged:
        return (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f"model = {auto}.from_pretrained({where!r}{head})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({where!r})\n"
        )
    if hub_base:
        base = f'BASE, REVISION = {hub_base.repo_id!r}, "{hub_base.commit}"'
        revision = ", revision=REVISION"
    else:
        base = f'BASE = "{"FOLDER/base" if where == "FOLDER" else "BASE"}"  # its manifest: {version.base}'
        revision = ""
    return (
        f"from peft import PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f"{base}\n"
        f"model = {auto}.from_pretrained(BASE{revision}{head})\n"
        f"model = PeftModel.from_pretrained(model, {where!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where!r})\n"
    )


def lineage_tree(node: dict[str, Any], role: str = "", indent: str = "") -> str:
    """A nested lineage (history/lineage.py) as lines of text, each with reference, kind, licence and digest."""
    licence = f"  licence {clean(node['licence'])}" if node.get("licence") else ""
    name = node["ref"] or "(no reference)"
    notes = "  (deleted)" if node["is_deleted"] else "", "  (as above)" if node["is_above"] else ""
    label = f"{clean(role)}: " if role else ""
    lines = [f"{indent}{label}{name}  {node['kind']}{licence}  {node['digest']}{''.join(notes)}"]
    lines += [lineage_tree(parent, role, indent + "  ") for role, parent in node["parents"].items()]
    return "\n".join(lines)


def measured(manifest: dict[str, Any], said: list[Attestation]) -> list[Measured]:
    """A version's metrics: its publisher's, then each evaluation's; none replaces another."""
    found = [Measured(name, value, "the publisher", "") for name, value in flatten(manifest["metrics"], "/").items()]
    for each in said:
        if each.type == "evaluation":
            source = f"an evaluation of {each.time[:10]}"
            metrics = flatten(each.body.get("metrics"), "/")
            found += [Measured(name, value, source, each.by) for name, value in metrics.items()]
    return found


def flatten(nested: Any, separator: str, prefix: str = "") -> dict[str, Any]:
    """A nested dict as one: `{"eval": {"loss": 1}}` gives `{"eval/loss": 1}`; anything but a dict gives {}."""
    found: dict[str, Any] = {}
    for key, value in nested.items() if isinstance(nested, dict) else ():
        name = f"{prefix}{key}"
        found |= flatten(value, separator, f"{name}{separator}") if isinstance(value, dict) else {name: value}
    return found


def is_number(value: Any) -> bool:
    """Whether a metric's value is a finite number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def show(value: Any) -> str:
    """A value for a table's cell: numbers to six digits, lists and dicts as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _merged_note(version: Version, merged: bool) -> str:
    return ", merged here into its base" if merged and version.base else ""


def _base_section(registry: "Registry", version: Version, hub_base: HubModel | None, merged: bool) -> list[str]:
    if version.base is None:
        return []
    named = first_names(registry, [version.base]).get(version.base)
    base = named.ref if named else version.base
    if merged:
        text = f"It was merged from the base {inline(base)}; it loads by itself."
    elif hub_base:
        text = f"It needs the base {inline(base)}: `{hub_base.repo_id}` at the commit `{hub_base.commit}`."
    else:
        text = (
            f"It needs the base {inline(base)}, which is not known to lie on the Hub: load the model with the manifest "
            f"digest `{version.base}` (`baton get {base} BASE`). On another base it loads without an "
            "error and is the wrong model."
        )
    return ["## Base model", text]


def _data(entries: list[Any]) -> str:
    columns = ("path", "licence", "rows", "weight", "revision", "sha256")
    rows = []
    for entry in entries:
        facts = entry if isinstance(entry, dict) else {"path": str(entry)}
        shown = {key: "" if facts.get(key) is None else show(facts[key]) for key in columns}
        rows.append([shown[key] or ("unknown" if key == "licence" else "") for key in columns])
    return table(list(columns), rows) or "None recorded."


def _provenance(version: Version) -> str:
    manifest = version.manifest
    probe, code = manifest["probe"], manifest["code"]
    rows = [
        ["manifest", version.digest],
        ["tokenizer", manifest["tokenizer_digest"]],
        ["parameters", show(manifest["architecture"].get("num_parameters"))],
        ["dtype", show(manifest["dtype"])],
        ["code", f"baton {code.get('baton')}, commit {code.get('commit')}{', changed' if code.get('dirty') else ''}"],
        ["packages", ", ".join(f"{name} {number}" for name, number in manifest["packages"].items())],
    ]
    inputs = probe.get("input_ids") or []
    text = (
        f"The probe holds the {clean(str(probe.get('output')))} of {len(inputs)} fixed inputs, in float32 on the CPU "
        f"(tolerance {show(probe.get('atol'))} + {show(probe.get('rtol'))} × value):"
    )
    facts = {"input_ids": inputs, "expected": [row[:4] for row in probe.get("expected") or []]}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in facts.items())
    return "\n\n".join([table(["what", "value"], rows), text, block(lines)])


def _licence(licence: str) -> dict[str, str]:
    if licence.lower() in _HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+-]+", "-", licence.lower()).strip("-") or "other"}


def _hub_dataset(entry: Any) -> str | None:
    # A dataset of the Hub has no digest of local bytes, and `subset` and `split` instead.
    if not isinstance(entry, dict) or "split" not in entry or entry.get("sha256"):
        return None
    path = entry.get("path")
    return path if isinstance(path, str) and _REPO_ID.fullmatch(path) else None


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _yaml(value: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000)

"""The registry's speed on this machine: publishing against `cp` + `sha256sum`, reading, listing, memory, start-up.

    python -m tests.bench.registry --json

Makes models of random weights in a temporary folder (about 9 GB of disk at most), and compares by alternating runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.registry import Registry, Version, records
from baton.registry.manifest import canonical, digest_of, manifest_path

RUNS = 3
CACHE = "BATON_CACHE"
SECTIONS = ("publish", "memory", "adapters", "listing", "start-up")


def make_model(folder: Path, layers: int) -> int:
    """A bfloat16 Llama with `layers` layers of 67 million random parameters each, in shards; returns its bytes."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(layers)
    for parameter in model.parameters():
        numbers = torch.randint(-128, 128, (parameter.numel(),), generator=generator, dtype=torch.int8)
        parameter.data.copy_((numbers * 3e-4).view_as(parameter) if parameter.dim() > 1 else torch.ones(1))
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="1050MB")
    tokens = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *map(str, range(500))])}
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(tokens, [])), **special).save_pretrained(folder)
    return size_of(folder)


def make_adapter(folder: Path, base: Path, seed: int) -> int:
    """LoRA of rank 16 on two matrices a layer, as PEFT writes it; returns its bytes."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    settings = json.loads((base / "config.json").read_text())
    config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "v_proj"], inference_mode=True)
    config.base_model_name_or_path = str(base)
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    size, tensors = settings["hidden_size"], {}
    for layer in range(settings["num_hidden_layers"]):
        for name in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(16, size) * 0.01
            tensors[f"{stem}.lora_B.weight"] = torch.randn(size, 16) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return size_of(folder)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def seconds(do: Callable[[], Any]) -> float:
    """Wall time, after everything written before has reached the disk."""
    os.sync()
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def fresh(code: str, *arguments: str | Path) -> dict[str, Any]:
    """Run Python in a process of its own, which prints one JSON object at the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def copy_and_hash(source: Path, target: Path, tool: list[str]) -> None:
    """What a careful person does by hand."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    files = sorted(str(path) for path in target.iterdir())
    subprocess.run([*tool, *files], check=True, stdout=subprocess.DEVNULL)


COLD = """
import json, sys, time
start = time.perf_counter()
from baton.registry import Registry
Registry(sys.argv[2], create=True).publish(sys.argv[1], name="bench/cold", kind="base")
print(json.dumps(time.perf_counter() - start))
"""


def publishing(work: Path, source: Path) -> dict[str, Any]:
    """Publishing against copying and hashing, in alternating runs; and once from a process that just started."""
    tiny = Registry(work / "tiny")
    again = [seconds(lambda i=i: publish_tiny(tiny, work / "tiny-model", i + 1)) for i in range(7)]  # type: ignore[misc]
    by_hand, with_openssl, published = [], [], []
    for run in range(RUNS):
        for tool, found in ((["sha256sum"], by_hand), (["openssl", "dgst", "-sha256"], with_openssl)):
            if shutil.which(tool[0]):
                found.append(seconds(lambda t=tool: copy_and_hash(source, work / "copy", t)))  # type: ignore[misc]
                shutil.rmtree(work / "copy")
        registry = Registry(work / f"registry-{run}", create=True)
        published.append(seconds(lambda r=registry: r.publish(source, name="bench/base", kind="base")))  # type: ignore[misc]
        shutil.rmtree(work / f"registry-{run}")
    os.sync()
    cold = fresh(COLD, source, work / "registry-cold")
    shutil.rmtree(work / "registry-cold")
    figures = {
        "bytes": size_of(source),
        "cp_and_sha256sum_s": by_hand,
        "publish_s": published,
        "ratio": median_ratio(published, by_hand),
        "cold_publish_s": cold,
        "cold_ratio": cold / statistics.median(by_hand),  # type: ignore[operator]
        "tiny_publish_s": statistics.median(again),
    }
    if with_openssl:
        figures |= {"cp_and_openssl_s": with_openssl}
        figures |= {"ratio_to_openssl": median_ratio(published, with_openssl)}
    return figures


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Of runs that took turns: each compared with its neighbour, as a machine's speed changes with its other work."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def make_tiny(folder: Path) -> None:
    """A model of a few kilobytes: what is left is what a publish costs by itself."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_model(folder, 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shutil.rmtree(folder)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish_tiny(registry: Registry, folder: Path, number: int) -> Version:
    """Another version of the tiny model."""
    return registry.publish(folder, name="bench/tiny", kind="base", details={"build_key": str(number)})


def stored_bytes(registry: Registry) -> int:
    """Bytes of all that a registry holds."""
    return sum(entry.size for entry in registry.store.walk(""))


RE_READ = """
import json, sys, time
from baton.registry import Registry
start = time.perf_counter()
registry = Registry(sys.argv[1])
version = registry.resolve("bench/adapter:2")
opened = time.perf_counter()
registry.materialise(version)
first = time.perf_counter()
registry.materialise(version)
second = time.perf_counter()
print(json.dumps({"open_and_resolve_s": opened - start, "first_s": first - opened, "again_s": second - first}))
"""


def adapters(work: Path, source: Path) -> dict[str, Any]:
    """What a second adapter adds to the store, and how long a verified re-read of it and its base takes."""
    registry = Registry(work / "registry", create=True)
    base = registry.publish(source, name="bench/base", kind="base")
    registry.materialise(base)
    added, own = [], []
    for number in (1, 2):
        folder = work / f"adapter-{number}"
        own.append(make_adapter(folder, registry.materialise(base), number))
        before = stored_bytes(registry)
        registry.publish(folder, name="bench/adapter", kind="adapter", base=base)
        added.append(stored_bytes(registry) - before)
    registry.materialise(registry.resolve("bench/adapter:2"))
    reads = [fresh(RE_READ, registry.location) for _ in range(RUNS)]
    return {
        "adapter_bytes": own[1],
        "added_bytes": added[1],
        "ratio": added[1] / own[1],
        "re_read": {key: statistics.median(read[key] for read in reads) for key in reads[0]},
    }


MEMORY = """
import json, resource, sys
from pathlib import Path
from baton.registry import Registry, probe_process
def own_peak():  # not getrusage: its figure is inherited from the parent, through fork and exec
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
registry = Registry(sys.argv[2], create=True)
if sys.argv[3] == "publish":
    registry.publish(sys.argv[1], name="bench/base", kind="base")
    probe_process.close()
else:
    registry.materialise(registry.resolve("bench/base:1"), Path(sys.argv[4]))
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
found = {"peak_bytes": own_peak(), "probe_process_peak_bytes": children}
print(json.dumps(found))
"""


def memory(work: Path, sources: list[Path]) -> list[dict[str, Any]]:
    """Peak memory of publishing and of materialising, by the model's size; the probe's own process apart."""
    rows = []
    for number, source in enumerate(sources):
        registry, target = work / f"memory-{number}", work / f"got-{number}"
        published = fresh(MEMORY, source, registry, "publish")
        got = fresh(MEMORY, source, registry, "get", target)
        rows.append(
            {
                "bytes": size_of(source),
                "publish_peak_bytes": published["peak_bytes"],
                "probe_process_peak_bytes": published["probe_process_peak_bytes"],
                "materialise_peak_bytes": got["peak_bytes"],
            }
        )
        shutil.rmtree(registry)
        shutil.rmtree(target)
    return rows


LIST = """
import json, sys, time
from baton.registry import Registry
found = {}
def timed(name, do):
    registry = Registry(sys.argv[1])
    start = time.perf_counter()
    count = do(registry)
    found[name] = time.perf_counter() - start
    return count
model, number, digest = sys.argv[2], sys.argv[3], sys.argv[4]
assert timed("list_models_s", lambda r: len(r.models())) == int(sys.argv[5])
assert timed("list_versions_s", lambda r: sum(len(r.versions(name)) for name in r.models())) == 10_000
timed("resolve_number_s", lambda r: r.resolve(f"{model}:{number}").manifest)
timed("resolve_alias_s", lambda r: r.resolve(f"{model}:prod").manifest)
timed("resolve_digest_s", lambda r: r.resolve(f"{model}@{digest}").manifest)
print(json.dumps(found))
"""


def fill(work: Path, models: int, versions: int) -> tuple[Registry, str, str]:
    """A registry of `models` × `versions` versions, each with a manifest of its own, put there directly.

    Returns it with one model's name and the digest of its middle version.
    """
    template = Registry(work / "tiny").resolve("bench/tiny:1").manifest
    registry = Registry(work / f"many-{models}", create=True)
    root = Path(registry.location)
    (root / "manifests/sha256").mkdir(parents=True)
    middle = ""
    for model in range(models):
        name = f"bench/model-{model:03d}"
        for number in range(1, versions + 1):
            data = canonical(template | {"build_key": f"{model}-{number}"})
            digest = digest_of(data)
            (root / manifest_path(digest)).write_bytes(data)
            record = {"number": number, "digest": digest, "kind": "base", "identity": digest, "by": "a", "time": "t"}
            write_record(root, records.versions_folder(name), number, record)
            middle = digest if number == versions // 2 else middle
        move = {"to": versions // 2, "previous": None, "reason": "a test", "by": "a", "time": "t"}
        write_record(root, records.alias_folder(name, "prod"), 1, move)
    return registry, f"bench/model-{models - 1:03d}", middle


def write_record(root: Path, folder: str, number: int, record: dict[str, Any]) -> None:
    """A record as `records.write` writes it, without waiting for the disk ten thousand times."""
    path = records.record_path(folder, number)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(records.sealed(path, {**record, "nonce": f"{number:032x}"}))


def listing(work: Path) -> dict[str, Any]:
    """Listing and resolving over 10,000 versions, in one model and in a hundred, in fresh processes."""
    found: dict[str, Any] = {}
    for models in (1, 100):
        registry, name, digest = fill(work, models, 10_000 // models)
        arguments = (registry.location, name, str(5000 // models), digest, str(models))
        runs = [fresh(LIST, *arguments) for _ in range(RUNS)]
        figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for label, command in (("baton_list_s", ["list"]), ("baton_list_model_s", ["list", name])):
            figures[label] = start_up([*command, "--registry", registry.location])
        found[f"{models} x {10_000 // models}"] = figures
        shutil.rmtree(registry.location)
    return found


def start_up(arguments: list[str]) -> float:
    """Median wall time of the `baton` command."""
    command = [sys.executable, "-m", "baton.cli", *arguments]
    if script := shutil.which("baton", path=str(Path(sys.executable).parent)):
        command = [script, *arguments]
    run = lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: E731
    run()
    return statistics.median(seconds(run) for _ in range(5))


def measure(work: Path, layers: int, only: list[str]) -> dict[str, Any]:
    """The chosen figures; times in seconds, sizes in bytes."""
    os.environ[CACHE] = str(work / "cache")
    source, small = work / "model", work / "small"
    found: dict[str, Any] = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    make_tiny(work / "tiny-model")
    publish_tiny(Registry(work / "tiny", create=True), work / "tiny-model", 0)
    if set(only) & {"publish", "memory", "adapters"}:
        make_model(source, layers)
    if "publish" in only:
        found["publish"] = publishing(work, source)
        say(f"publish: {found['publish']['ratio']:.2f} x cp + sha256sum")
    if "memory" in only:
        make_model(small, max(1, layers // 10))
        found["memory"] = memory(work, [small, source])
        shutil.rmtree(small)
    if "adapters" in only:
        found["second_adapter"] = adapters(work, source)
        say(f"second adapter: {found['second_adapter']['ratio']:.3f} x its own bytes")
        shutil.rmtree(work / "registry")
        shutil.rmtree(work / "cache")
    shutil.rmtree(source, ignore_errors=True)
    if "listing" in only:
        found["ten_thousand_versions"] = listing(work)
    if "start-up" in only:
        found["start_up"] = {
            "help_s": start_up(["--help"]),
            "list_s": start_up(["list", "--registry", str(work / "tiny")]),
        }
    return found


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=15, help="of 134 MB each; 15 make 2 GB")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--work", type=Path, help="where to put the files; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = measure(Path(folder), options.layers, options.only)
    print(json.dumps(found, indent=None if options.json else 2))


if __name__ == "__main__":
    main()

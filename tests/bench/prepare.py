"""How fast `baton prepare` is beside the tokenizer library's own batches, and how much memory it takes.

python tests/bench/prepare.py [FILE …] [--workers N] [--rounds N] [--sizes MB,MB] [--near] [--json]

Both sides take the same documents on the same cores, in turns: the library its `encode_batch` with as many threads,
from texts in memory to encodings in memory; ours the whole way from files to finished shards. `speed_ratio` is the
library's time over ours, `cpu_ratio` the same of the cores' time, which other programs disturb less. Memory is the
peak of all processes together, for generated text of two sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).parent):  # the script's own folder is no place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

CPU = """
import resource
def cpu_s():
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)
"""

LIBRARY = (
    CPU
    + """
import json, sys, time
from pathlib import Path
from baton.corpus.documents import texts_of
from baton.recipe import load_recipe
from tokenizers import Tokenizer
recipe = load_recipe(sys.argv[1])
texts = [text for source in recipe.data.train for text in texts_of(source, recipe.folder)]
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
tokenizer.encode_special_tokens = True
start, cpu = time.perf_counter(), cpu_s()
tokens = sum(len(found) for found in tokenizer.encode_batch(texts, add_special_tokens=False))
seconds, num_bytes = time.perf_counter() - start, sum(len(text.encode()) for text in texts)
print(json.dumps({"seconds": seconds, "cpu_s": cpu_s() - cpu, "tokens": tokens, "bytes": num_bytes}))
"""
)

OURS = (
    CPU
    + """
import json, sys, time
from pathlib import Path
if __name__ == "__main__":
    import transformers.models.auto.tokenization_auto  # a second or more to import, whatever the corpus
    from baton.corpus.prepare import prepare
    from baton.recipe import load_recipe
    recipe = load_recipe(sys.argv[1])
    start, cpu = time.perf_counter(), cpu_s()
    corpus = prepare(recipe, Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), say=lambda text: None)
    seconds, cpu = time.perf_counter() - start, cpu_s() - cpu
    tokens = sum(source.num_tokens - 2 * source.num_documents for source in corpus.train)
    print(json.dumps({"seconds": seconds, "cpu_s": cpu, "tokens": tokens}))
"""
)


def write_recipe(folder: Path, sources: list[dict[str, Any]], near: bool = False) -> Path:
    """A recipe of stage 1 over the sources."""
    recipe = {
        "stage": "pretrain",
        "mode": "scratch",
        "registry": str(folder / "registry"),
        "run_dir": str(folder / "run"),
        "publish": {"name": "bench/base"},
        "data": {"train": sources, **({"near_duplicates": {"threshold": 0.8}} if near else {})},
        "tokenizer": {"vocab_size": 8192, "sample_bytes": 4_000_000},
        "model": {"hidden_size": 64, "layers": 1, "heads": 2, "intermediate_size": 64},
        "train": {"steps": 1, "learning_rate": 0.1, "tokens_per_batch": 512, "sequence_length": 512},
    }
    path = folder / "pretrain.yaml"
    path.write_text(json.dumps(recipe))
    return path


def write_text(path: Path, megabytes: int, seed: int = 0) -> None:
    """Generated documents of some 3 kB in JSON lines: words of a vocabulary of 30,000 by Zipf's law."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = [
        "".join(draw.choices(letters, weights=range(26, 0, -1), k=draw.randint(2, 11))) for _ in range(30_000)
    ]
    weights = [1 / (rank + 2) for rank in range(30_000)]
    cumulative = [sum(weights[:1])]
    for weight in weights[1:]:
        cumulative.append(cumulative[-1] + weight)
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1_000_000:
            words = draw.choices(vocabulary, cum_weights=cumulative, k=draw.randint(50, 900))
            line = json.dumps({"text": " ".join(words)}) + "\n"
            written += len(line)
            stream.write(line)


def run(program: str, *arguments: str, threads: int = 1, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON that a program prints, with `peak_mb`: the most memory of it and its children together."""
    import psutil

    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(program)
        script.flush()
        environment = environment or {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {"RAYON_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, script.name, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        peak = [0]

        def watch() -> None:
            while process.poll() is None:
                try:
                    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    peak[0] = max(peak[0], sum(one.memory_info().rss for one in tree))
                except psutil.Error:
                    pass
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        output, _ = process.communicate()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak_mb": round(peak[0] / 1e6)}


def speed(folder: Path, files: list[str], workers: int, rounds: int, near: bool) -> dict[str, Any]:
    """Both sides in turns on the files, or on 20 MB of generated text."""
    from baton.corpus.tokenizer import recipe_tokenizer
    from baton.recipe import load_recipe

    if not files:
        write_text(folder / "text.jsonl", 20)
        files = [str(folder / "text.jsonl")]
    recipe = write_recipe(folder, [{"path": str(Path(file).resolve())} for file in files], near)
    tokenizer = str(recipe_tokenizer(load_recipe(recipe), say=lambda text: None))
    found: dict[str, list[dict[str, Any]]] = {"library": [], "ours": []}
    for _ in range(rounds):
        found["library"].append(run(LIBRARY, str(recipe), tokenizer, threads=workers))
        out = folder / "out"
        found["ours"].append(run(OURS, str(recipe), tokenizer, str(out), str(workers)))
        shutil.rmtree(out)
    seconds = {side: statistics.median(one["seconds"] for one in runs) for side, runs in found.items()}
    megabytes = found["library"][0]["bytes"] / 1e6
    return {
        "megabytes": round(megabytes, 1),
        "library_mb_per_s": round(megabytes / seconds["library"], 2),
        "ours_mb_per_s": round(megabytes / seconds["ours"], 2),
        "speed_ratio": round(seconds["library"] / seconds["ours"], 3),
        "speed_ratios": [
            round(library["seconds"] / ours["seconds"], 3)
            for library, ours in zip(found["library"], found["ours"], strict=True)
        ],
        "cpu_ratio": round(
            sum(one["cpu_s"] for one in found["library"]) / sum(one["cpu_s"] for one in found["ours"]), 3
        ),
        "tokens_kept": round(found["ours"][0]["tokens"] / found["library"][0]["tokens"], 4),
    }


def memory(folder: Path, sizes: list[int], workers: int, near: bool) -> dict[str, int]:
    """{"10": peak megabytes, …} of preparing so many megabytes of generated text."""
    from baton.corpus.tokenizer import recipe_tokenizer
    from baton.recipe import load_recipe

    peaks, tokenizer = {}, None
    for size in sizes:
        write_text(folder / "text.jsonl", size)
        recipe = write_recipe(folder, [{"path": str(folder / "text.jsonl")}], near)
        tokenizer = tokenizer or str(recipe_tokenizer(load_recipe(recipe), say=lambda text: None))
        peaks[str(size)] = run(OURS, str(recipe), tokenizer, str(folder / "out"), str(workers))["peak_mb"]
        shutil.rmtree(folder / "out")
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sizes", default="10,200", help="megabytes of generated text to measure memory at; '' for none"
    )
    parser.add_argument("--near", action="store_true", help="with near duplicates")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",") if size]
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Any] = {"workers": options.workers}
        if options.rounds:
            found |= speed(Path(scratch), options.files, options.workers, options.rounds, options.near)
        if sizes:
            found["peak_mb"] = memory(Path(scratch), sizes, options.workers, options.near)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        print(f"{key:>18}  {value}")


if __name__ == "__main__":
    main()

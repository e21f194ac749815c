"""People at `baton label` while its server is killed: is a judgement lost or doubled?

    python -m tests.bench.label --judgements 200 --kills 3 --json

Two annotators press keys in headless Chromium, side by side, and now and then undo; the server is killed by SIGKILL at
random moments and started again. At the end the file must hold exactly what they remember, text by text.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.reward.labelling.driving import CHROMIUM, Annotator, Killer, Server, check, judge_all, write_pairs


def measure(judgements: int, kills: int, seed: int, out: Path) -> dict[str, Any]:
    """One run; raises AssertionError when anything is lost or doubled."""
    from playwright.sync_api import sync_playwright

    each = judgements // 2
    chance = random.Random(seed)
    write_pairs(out.with_name("pairs.jsonl"), each)
    server = Server(out.with_name("pairs.jsonl"), out)
    after = sorted(chance.sample(range(judgements * 9 // 10), kills))
    killer = Killer(server, out, after, chance, down=0.5)
    started = time.monotonic()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        annotators = [Annotator(browser.new_context().new_page(), name) for name in ("ann", "bo")]
        for annotator in annotators:
            annotator.open(server.address)
        killer.start()
        judge_all(annotators, each, chance, undo=0.05)
        killer.join()
        took = time.monotonic() - started
        annotators[0].page.goto(server.address + "/?stay")
        overview = annotators[0].page.inner_text("main")
        browser.close()
    server.kill()
    rows = check(out, annotators, each)
    return {
        "judgements": len(rows),
        "by": dict(Counter(row["annotator"] for row in rows)),
        "choices": dict(Counter(row["choice"] for row in rows)),
        "undone": sum(annotator.undone for annotator in annotators),
        "kills": killer.kills,
        "killed_after": after,
        "sent_again": sum(annotator.waited for annotator in annotators),
        "lost": 0,
        "doubled": 0,
        "seconds": round(took, 1),
        "agreement": next((line for line in overview.splitlines() if line.startswith("ann and bo")), None),
        "said": server.said,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to leave the judgements")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "judgements.jsonl"
        found = measure(arguments.judgements, arguments.kills, arguments.seed, out)
        if arguments.keep:
            arguments.keep.write_bytes(out.read_bytes())
    for name, value in {"result": json.dumps(found)}.items() if arguments.json else found.items():
        print(value if arguments.json else f"{name}: {value}")


if __name__ == "__main__":
    main()

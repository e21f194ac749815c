"""Stage 0 of recipes/micro, a program without a model: writes the invented world's files, once per recipe and code."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from baton.errors import UserError
from baton.recipe import WorldRecipe, load_recipe

STAMP = "world.sha256"


def main(recipe: WorldRecipe) -> None:
    """Write texts, dialogues, preferences, prompts and questions into the recipe's `out` folder."""
    from baton.world import generate

    out = folder(recipe)
    (out / STAMP).unlink(missing_ok=True)
    generate(
        out,
        seed=recipe.seed,
        people=recipe.people,
        text_only=recipe.text_only,
        documents=recipe.documents,
        dialogues=recipe.dialogues,
        preferences=recipe.preferences,
        prompts=recipe.prompts,
        unknown_share=recipe.unknown_share,
        guess_share=recipe.guess_share,
    )
    (out / STAMP).write_text(_key(recipe, out))
    print(f"wrote {out}: {', '.join(sorted(path.name for path in out.glob('*.jsonl')))}", flush=True)


def folder(recipe: WorldRecipe) -> Path:
    """Where the files go: `out`, relative to the recipe's folder, as data paths are."""
    return recipe.folder / recipe.out


def is_written(recipe: WorldRecipe) -> bool:
    """Whether the files are there, from this recipe and this generator."""
    out = folder(recipe)
    stamp = out / STAMP
    return stamp.is_file() and stamp.read_text() == _key(recipe, out)


def _key(recipe: WorldRecipe, out: Path) -> str:
    """sha256 over the recipe, the generator's code and the files."""
    digest = hashlib.sha256(recipe.digest().encode())
    for path in [*sorted(Path(__file__).parent.glob("world*.py")), *sorted(out.glob("*.jsonl"))]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def program() -> None:
    """`python -m baton.make_world RECIPE [key=value …]`; exit code 2 for a user's mistake."""
    from baton.run import write_status

    if len(sys.argv) < 2:
        print("usage: python -m baton.make_world RECIPE [key=value …]", file=sys.stderr)
        sys.exit(2)
    try:
        recipe = load_recipe(sys.argv[1], sys.argv[2:], WorldRecipe)
        main(recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    write_status(Path(recipe.run_dir), "world", "done", "written", 0, str(folder(recipe)))


if __name__ == "__main__":
    program()

"""Keeping a registry whole: verify, fsck, gc, delete."""

import re
from typing import Annotated, Any

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption, print_json

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DeepOption = Annotated[bool, typer.Option("--deep", help="Also load it and replay its probe.")]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (verify, fsck, gc, delete):
        app.command(name=command.__name__)(command)


def verify(
    ref: Annotated[str | None, typer.Argument(metavar="[REF]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify everything in the registry.")] = False,
    deep: DeepOption = False,
    reward: Annotated[
        str | None, typer.Option("--with", metavar="REF", help="A reward model: can it read what REF writes, as it is?")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Check digests, ancestors and records; exit code 1 when something is wrong."""
    if (ref is None) == (not everything):
        raise UserError("say what to verify: either a REF, or --all.")
    reg = Registry(registry)
    problems = reg.verify(reg.resolve(ref), deep=deep) if ref else reg.verify_all(deep=deep)
    if reward is not None:
        from baton.registry.compatibility import differences

        if ref is None:
            raise UserError("--with compares one version with a reward model; name the version too.")
        problems += differences(reg.resolve(ref), reg.resolve(reward))
    if as_json:
        print_json(problems)
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{ref or 'everything'}: {len(problems) or 'no'} problem(s)")
    if problems:
        raise typer.Exit(1)


def fsck(
    source: Annotated[
        str | None, typer.Option("--from", metavar="REGISTRY", help="Mend from this registry what it has whole.")
    ] = None,
    deep: DeepOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Check every file of the registry, say what depends on what is damaged, and repair; exit code 1 if any is left."""
    from baton.registry.care import repair

    report = repair.fsck(Registry(registry), Registry(source) if source else None, deep)
    if as_json:
        problems = [{"path": p.path, "message": p.message, "dependants": p.dependants} for p in report.problems]
        orphans = {"files": report.num_orphans, "bytes": report.orphan_bytes}
        checked = report.num_files
        print_json({"problems": problems, "repaired": report.repaired, "checked": checked, "orphans": orphans})
    else:
        for path in report.repaired:
            typer.echo(f"repaired {path}")
        for problem in report.problems:
            typer.echo(str(problem))
        typer.echo("files: " + ", ".join(f"{count} {kind}" for kind, count in report.num_files.items()))
        if report.num_orphans:
            typer.echo(
                f"{report.num_orphans} files ({report.orphan_bytes:,} bytes) that no version needs: no damage; "
                "`baton gc` removes them"
            )
        typer.echo(f"{len(report.problems) or 'no'} problem(s)")
    if report.problems:
        raise typer.Exit(1)


def gc(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Leave what is younger: 30m, 12h, 7d.")
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Remove the files that no version, alias or running program needs."""
    from baton.registry.care.gc import collect

    report = collect(Registry(registry), duration_s(older_than), dry_run)
    if as_json:
        files = [{"path": entry.path, "bytes": entry.size} for entry in report.deleted]
        counts = {"bytes": report.num_bytes, "young": report.num_young, "spared": report.num_spared}
        uploads = {"uploads": report.uploads, "uploads_not_seen": report.not_seen}
        print_json({"dry_run": dry_run, "files": files, **counts, **uploads})
        return
    for entry in report.deleted:
        typer.echo(f"{entry.size:>15,} {entry.path}")
    for folder, (count, size) in report.by_kind().items():
        typer.echo(f"{folder}: {count} file(s), {size:,} bytes")
    for path in report.uploads:
        typer.echo(f"unfinished upload of {path} {'would be ' if dry_run else ''}given up")
    if report.not_seen:
        typer.echo(f"unfinished uploads could not be looked for: {report.not_seen}", err=True)
    done = "would be removed" if dry_run else "removed"
    typer.echo(f"{len(report.deleted)} file(s), {report.num_bytes:,} bytes {done}")
    if report.num_young:
        typer.echo(f"{report.num_young} more that nothing needs are younger than {older_than}")


def delete(
    ref: RefArgument,
    reason: Annotated[str, typer.Option("--reason", "--why", help="Why; whoever asks for this version later is told.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Delete a version: its number is never given again, and `baton gc` frees what nothing else needs."""
    from dataclasses import asdict

    from baton.registry.care import tombstones

    deletion = tombstones.delete(Registry(registry), ref, reason)
    if as_json:
        facts: dict[str, Any] = asdict(deletion)
        print_json(facts)
        return
    typer.echo(f"{deletion.ref} is deleted")
    if deletion.descendants:
        typer.echo(f"its files stay, for these are made of it: {', '.join(deletion.descendants)}")
    else:
        typer.echo("`baton gc` frees its files once they are old enough")


def duration_s(text: str) -> float:
    """Seconds of `30m`, `12h`, `7d`, or 0; raises UserError that says the form."""
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if text == "0":
        return 0.0
    if not match:
        raise UserError(f"{text!r} is not an age; expected a number with a unit: 30m, 12h or 7d.")
    return float(match[1]) * _UNITS_S[match[2]]

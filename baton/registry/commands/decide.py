"""Deciding what a version is good for: promote, rollback, gate, approve, attest, sign, signatures, policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.commands.options import (
    DEFAULT_REGISTRY,
    JsonOption,
    RefArgument,
    RegistryOption,
    print_json,
    print_rich,
)

if TYPE_CHECKING:
    from baton.registry.trust.attestations import Attestation
    from baton.registry.trust.policy import Policy

AliasArgument = Annotated[str, typer.Argument(metavar="ALIAS")]
WhoOption = Annotated[str, typer.Option("--as", metavar="NAME", help="Who says so.")]
NoteOption = Annotated[str | None, typer.Option(help="What should be remembered of it.")]
SignOption = Annotated[
    Path | None, typer.Option("--key", metavar="PRIVATE.pem", help="Sign it, so that the name is more than a claim.")
]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (promote, rollback, gate, approve, attest, sign, signatures, policy):
        app.command(name=command.__name__)(command)


def promote(
    ref: RefArgument,
    alias: AliasArgument,
    reason: Annotated[str, typer.Option(help="Why this version; kept in the alias's history.")],
    gate: Annotated[
        Path | None, typer.Option(metavar="GATE.yaml", help="What must hold, besides what the policy asks.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Make an alias mean a version; the alias's history keeps who, when, why and what was there before."""
    reg = Registry(registry)
    version = reg.resolve(ref)
    is_there = reg.aliases(version.name).get(alias) == version.number
    record = reg.promote(version.ref, alias, reason, gate=gate)
    if is_there and record["to"] == version.number and not as_json:
        typer.echo(f"{version.name}:{alias} means {version.ref} already, since {record['time']}: nothing was recorded")
    else:
        _print_move(record, f"{version.name}:{alias}", as_json)


def rollback(
    target: Annotated[str, typer.Argument(metavar="NAME:ALIAS")],
    reason: Annotated[str, typer.Option(help="Why; kept in the alias's history.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Make an alias mean what it meant before its last promotion; again: one further back. No gate is asked."""
    _print_move(Registry(registry).rollback(target, reason), target, as_json)


def gate(
    ref: RefArgument,
    alias: AliasArgument,
    file: Annotated[Path | None, typer.Argument(metavar="[GATE.yaml]", help="Besides what the policy asks.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show which conditions a version meets, without promoting it; exit code 1 when one fails."""
    from baton.registry.reference import check_alias
    from baton.registry.trust import promotion

    check_alias(alias)
    reg = Registry(registry)
    version = reg.resolve(ref)
    judged = promotion.judge(reg, version, alias, file)
    if not judged:
        raise UserError(f"no policy puts a gate before {version.name}:{alias}; name one: `baton gate … GATE.yaml`.")
    if as_json:
        print_json([one.record() for one in judged])
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "condition", "found", "gate", box=None)
        for one in judged:
            for outcome in one.outcomes:
                word = Text("holds", "green") if outcome.holds else Text("fails", "red")
                table.add_row(word, Text(outcome.condition), Text(outcome.found), Text(one.source))
        print_rich(table)
    if not all(outcome.holds for one in judged for outcome in one.outcomes):
        raise typer.Exit(1)


def approve(
    ref: RefArgument,
    who: WhoOption,
    note: NoteOption = None,
    key: SignOption = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Approve a version; gates count approvals."""
    from baton.registry.trust import approvals

    reg = Registry(registry)
    version = reg.resolve(ref)
    _print_said(approvals.approve(reg, version, who, note, key), f"{version.ref} is approved by {who}", as_json)


def attest(
    ref: RefArgument,
    metrics: Annotated[list[str], typer.Argument(metavar="METRIC=VALUE…", help="eval/win_rate=0.62 kl_nats=3.1")],
    who: WhoOption,
    note: NoteOption = None,
    key: SignOption = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Record metrics that were measured of a version; gates ask that every value attested is good enough."""
    from baton.registry.trust import evaluations, signing

    reg = Registry(registry)
    version = reg.resolve(ref)
    said = evaluations.record(reg, version, evaluations.parse_assignments(metrics), who, note)
    if key is not None:
        signing.sign(reg, version.digest, key, who, of=said.digest)
    _print_said(said, f"{version.ref}: {' '.join(metrics)}, measured by {who}", as_json)


def sign(
    ref: RefArgument,
    key: Annotated[
        Path | None, typer.Option(metavar="PRIVATE.pem", help="An elliptic-curve key; password: BATON_KEY_PASSWORD.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="MODEL.sig", help="Instead: keep a signature of manifest.json made elsewhere."),
    ] = None,
    who: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Who signs; the account by default.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Sign a version's manifest, which names every file, its base and its parents by sha256."""
    from baton.registry.trust import signing

    reg = Registry(registry)
    version = reg.resolve(ref)
    if key is not None and bundle is None:
        said = signing.sign(reg, version.digest, key, who)
    elif bundle is not None and key is None:
        said = signing.attach(reg, version.digest, bundle, who)
    else:
        raise UserError("say what signs it: --key PRIVATE.pem, or --bundle MODEL.sig for a signature made elsewhere.")
    _print_said(said, f"{version.ref} is signed by {said.by}, key {said.body['key']}", as_json)


def signatures(
    ref: RefArgument,
    key: Annotated[list[str], typer.Option(metavar="PUBLIC.pub", help="Whose signatures hold. May be repeated.")],
    write: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write manifest.json and model.sig for model_signing's command.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Check the signatures of a version's manifest, offline; exit code 1 when none by these keys holds."""
    from baton.registry.trust import signing

    reg = Registry(registry)
    version = reg.resolve(ref)
    keys = [signing.read_public_key(text, Path()) for text in key]
    checked = signing.verify_signatures(reg, version.digest, keys)
    good = [one for one in checked if one.problem is None]
    if as_json:
        facts = [(one.attestation, one.key, one.problem) for one in checked]
        print_json([{"by": said.by, "time": said.time, "key": k, "problem": problem} for said, k, problem in facts])
    else:
        for one in checked:
            typer.echo(f"{one.attestation.by}'s of {one.attestation.time} {one.problem or f'holds, key {one.key}'}")
        typer.echo(f"{version.ref}: {len(good) or 'no'} signature(s) by these keys")
    if not good:
        raise typer.Exit(1)
    if write is not None:
        signing.write_for_others(reg, version.digest, good[0].attestation, write)


def policy(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The policy from now on.")] = None,
    who: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Who sets it; the account by default.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show or set what the registry makes compulsory: licences, gates before aliases, signatures."""
    from baton.registry.trust import policy as policies

    reg = Registry(registry)
    if file is None and who is not None:
        raise UserError("--as says who sets a policy; name its FILE as well.")
    shown = [policies.set_policy(reg, file, who)] if file is not None else policies.in_force(reg)
    if as_json:
        print_json([_policy_facts(one) for one in shown])
        return
    for one in shown:
        import yaml

        typer.echo(f"# {one.source}, set by {one.by} {one.time}".rstrip())
        typer.echo(yaml.safe_dump(_policy_facts(one)["rules"], sort_keys=False, allow_unicode=True).rstrip())
    if not shown:
        typer.echo(f"{registry} has no policy: nothing is compulsory.")


def _policy_facts(one: "Policy") -> dict[str, Any]:
    rules = one.rules.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {"number": one.number, "by": one.by, "time": one.time, "source": one.source, "rules": rules}


def _print_move(record: dict[str, Any], target: str, as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        typer.echo(f"{target} → {record['to']} (before: {record['previous'] or 'none'})")


def _print_said(said: "Attestation", text: str, as_json: bool) -> None:
    if as_json:
        print_json({"digest": said.digest, "type": said.type, "subject": said.subject, "by": said.by, **said.body})
    else:
        typer.echo(text)

"""Handing models over: publish, get, push, pull, export, import."""

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption, print_json
from baton.registry.reference import check_alias
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.progress import Progress
    from baton.registry.travel.transfer import Report

HUB = "hf://"
AllowCodeOption = Annotated[
    bool,
    typer.Option("--allow-code", help="Although it brings Python files, or asks a loader to run some (auto_map)."),
]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (publish, get, push, pull, export, import_models):
        app.command(name=command.__name__.removesuffix("_models"))(command)


def get(
    ref: RefArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Write a version as a plain folder, verified, and prove by its probe that it is the same model."""
    reg = Registry(registry)
    version = reg.resolve(ref)
    reg.merge(version, folder) if merge else reg.materialise(version, folder, replay_probe=True)
    typer.echo(f"{version.ref} is in {folder}")
    if version.base and not merge:
        typer.echo(f"its base is in {folder / 'base'}; it loads only at this place: to hand it on, get it with --merge")


def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by save_pretrained.")],
    name: Annotated[str, typer.Option(help="team/name")],
    kind: Annotated[str, typer.Option(help="base, adapter, reward, value or merged")],
    base: Annotated[str | None, typer.Option(metavar="REF", help="An adapter's base; none for a whole model.")] = None,
    parent: Annotated[list[str] | None, typer.Option(metavar="ROLE=REF", help="May be repeated.")] = None,
    licence: Annotated[str | None, typer.Option(help="An SPDX identifier, such as apache-2.0.")] = None,
    allow_licence: Annotated[
        list[str] | None,
        typer.Option(metavar="SPDX", help="Refuse other licences, its ancestors' and data's too. May be repeated."),
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Make this alias mean the new version.")] = None,
    allow_code: AllowCodeOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Publish a folder as the next version of a model; makes the registry when there is none."""
    if alias is not None:
        check_alias(alias)
    reg = _opened(registry)
    parents = {}
    for text in parent or []:
        role, equals, ref = text.partition("=")
        if not equals or not role:
            raise UserError(f"--parent {text!r} is not ROLE=REF, such as sft=team/name:3.")
        parents[role] = reg.resolve(ref)
    version = reg.publish(
        folder,
        name=name,
        kind=kind,
        base=reg.resolve(base) if base else None,
        parents=parents,
        details={"licence": licence},
        allow_code=allow_code,
        allowed_licences=allow_licence,
    )
    if alias is not None:
        try:
            reg.promote(version.ref, alias, reason="published under this alias")
        except UserError as error:
            done = f"{version.ref} is published ({version.digest}), but {alias} stays as it was"
            raise UserError(f"{done}: {error}") from error
    _print_version(version, as_json)


def push(
    ref: RefArgument,
    target: Annotated[str, typer.Argument(metavar="REGISTRY", help="A folder, s3://bucket/prefix, or hf://org/name.")],
    merge: Annotated[bool, typer.Option("--merge", help="To the Hub: merge an adapter into its base.")] = False,
    public: Annotated[bool, typer.Option("--public", help="To the Hub: make a new repository public.")] = False,
    base_repo: Annotated[
        str | None, typer.Option("--base-repo", help="To the Hub: org/name@COMMIT that holds an adapter's base.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="To the Hub: the commit's message.")] = None,
    allow_code: AllowCodeOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Copy a version with its ancestors to another registry, or write it to the Hub; only what is missing moves."""
    reg = Registry(registry)
    version = reg.resolve(ref)
    if target.startswith(HUB):
        from baton.registry.travel import hub

        repo_id, _, revision = target.removeprefix(HUB).partition("@")
        if revision:
            raise UserError(f"{target} names a revision; a push makes a new one. Push to {HUB}{repo_id}.")
        if allow_code:
            raise UserError(f"--allow-code is for a registry that looks at what arrives; {target} gets it as it is.")
        url = hub.push(reg, version, repo_id, private=not public, merge=merge, base_repo=base_repo, message=message)
        print_json({"ref": version.ref, "url": url}) if as_json else typer.echo(f"{version.ref} is at {url}")
        return
    for_the_hub = {"--merge": merge, "--public": public, "--base-repo": base_repo, "--message": message}
    for flag, is_given in for_the_hub.items():
        if is_given:
            raise UserError(f"{flag} is for the Hub (hf://org/name); the registry {target} gets it as it is.")
    from baton.registry.travel import transfer

    with Bar(f"push {version.ref}", is_quiet=as_json) as bar:
        report = transfer.push(reg, version, _opened(target), bar, allow_code)
    _print_report(report, target, as_json)


def pull(
    ref: Annotated[str, typer.Argument(metavar="REF", help="team/name:7, …; or hf://org/name@REVISION.")],
    source: Annotated[
        str | None, typer.Option("--from", metavar="REGISTRY", help="The registry that has it; not for hf://.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="From the Hub: team/name to register it under.")] = None,
    kind: Annotated[str | None, typer.Option(help="From the Hub: base, adapter, reward, value or merged.")] = None,
    base: Annotated[str | None, typer.Option(metavar="REF", help="From the Hub: an adapter's base, here.")] = None,
    allow_code: AllowCodeOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Bring a version here from another registry with all that it needs, or register a model of the Hub."""
    if ref.startswith(HUB):
        _pull_from_hub(ref, source, name, kind, base, allow_code, registry, as_json)
        return
    given = {"--name": name, "--kind": kind, "--base": base}
    for flag in (flag for flag, value in given.items() if value is not None):
        raise UserError(f"{flag} is for models of the Hub (hf://org/name@REVISION); {ref} keeps what it has.")
    if source is None:
        raise UserError(f"say which registry has {ref}: --from PATH or --from s3://bucket/prefix.")
    from baton.registry.travel import transfer

    with Bar(f"pull {ref}", is_quiet=as_json) as bar:
        there = Registry(source)
        version = there.resolve(ref)
        report = transfer.push(there, version, _opened(registry), bar, allow_code)
    _print_report(report, registry, as_json)


def _pull_from_hub(
    ref: str,
    source: str | None,
    name: str | None,
    kind: str | None,
    base: str | None,
    allow_code: bool,
    registry: str,
    as_json: bool,
) -> None:
    if source is not None:
        raise UserError(f"{ref} says where it comes from; leave out --from {source}.")
    repo_id, at, revision = ref.removeprefix(HUB).partition("@")
    if not at:
        raise UserError(f"{ref} says no revision; name a commit, a tag or a branch: {ref}@main.")
    if name is None or kind is None:
        raise UserError(f"say what {ref} is to be here: --name team/name --kind base (or adapter, …).")
    from baton.registry.travel import hub

    reg = _opened(registry)
    found = reg.resolve(base) if base else None
    version = hub.pull(reg, repo_id, revision, name, kind, base=found, allow_code=allow_code)
    _print_version(version, as_json)


def export(
    ref: RefArgument,
    file: Annotated[str, typer.Argument(metavar="FILE.tar", help="A new file, or - for standard output.")],
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="REF", help="Leave out what this version holds; may be repeated."),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Write a version with its ancestors and attestations to one file; equal content gives equal bytes."""
    from baton.registry.travel import bundle

    reg = Registry(registry)
    version = reg.resolve(ref)
    left_out = [reg.resolve(other) for other in without or []]
    if file == "-":
        if as_json:
            raise UserError("--json would go into the bundle: write it to a file, or leave out --json.")
        if sys.stdout.isatty():
            raise UserError("a bundle is no text: send it into a file or a pipe.")
        try:
            bundle.export(reg, version, sys.stdout.buffer, left_out)
            sys.stdout.buffer.flush()
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it leaves
            raise UserError("whoever was to read the bundle left before its end.") from error
        return
    with Bar(f"export {version.ref}", is_quiet=as_json) as bar:
        written = bundle.export(reg, version, Path(file), left_out, bar)
    if as_json:
        print_json(asdict(written) | {"file": file})
    else:
        typer.echo(f"{written.ref} is in {file}: {_bytes(written.size)}, sha256:{written.sha256}")


def import_models(
    file: Annotated[str, typer.Argument(metavar="FILE.tar", help="What export wrote, or - for standard input.")],
    allow_code: AllowCodeOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Register what a bundle holds, after the last byte of it is verified."""
    from baton.registry.travel import bundle

    if file != "-" and not Path(file).is_file():
        raise UserError(f"{file} cannot be read: No such file. Name a bundle that baton export wrote.")
    reg = _opened(registry)
    with Bar(f"import {file}", is_quiet=as_json) as bar:
        stream = sys.stdin.buffer if file == "-" else Path(file)
        versions = bundle.import_bundle(reg, stream, bar, allow_code)
    if as_json:
        print_json([{"ref": version.ref, "digest": version.digest} for version in versions])
    else:
        for version in versions:
            typer.echo(f"{version.ref} {version.digest}")


def _opened(location: str) -> Registry:
    """A registry that may not be there yet; who mistyped its name should see that this made another."""
    reg = Registry(location, create=True)
    if reg.is_new:
        typer.echo(f"made a new registry in {location}", err=True)
    return reg


class Bar:
    """Bytes on their way, shown on a terminal and nowhere else. Call it with (bytes done, bytes in all)."""

    def __init__(self, label: str, is_quiet: bool) -> None:
        """label: what is being done. is_quiet: show nothing even on a terminal."""
        self._label = label
        self._is_shown = sys.stderr.isatty() and not is_quiet
        self._stack = ExitStack()
        self._done = 0
        self._progress: Progress | None = None

    def __enter__(self) -> "Bar":
        return self

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes have arrived."""
        from baton.progress import Progress

        if not self._is_shown:
            return
        if self._progress is None:
            bar = Progress(self._label, total // 10**6 + 1, "MB")
            self._progress = self._stack.enter_context(bar)
        self._progress.update(done // 10**6 + 1, (done - self._done) / 1e6, {})
        self._done = done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()


def _print_version(version: Version, as_json: bool) -> None:
    if as_json:
        print_json({"ref": version.ref, "digest": version.digest})
    else:
        typer.echo(f"{version.ref} {version.digest}")


def _print_report(report: "Report", target: str, as_json: bool) -> None:
    if as_json:
        print_json(asdict(report) | {"registry": target})
        return
    sent = f"sent {report.blobs_sent} files, {_bytes(report.bytes_sent)} of {_bytes(report.bytes_total)}"
    typer.echo(f"{report.ref} is in {target}: {sent if report.blobs_sent else 'every file was there already'}")


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"

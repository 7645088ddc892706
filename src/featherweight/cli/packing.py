"""Commands for what travels: pack, unpack, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight import terminal
from featherweight.cli import options
from featherweight.terminal import Bars

_File = Annotated[
    Path, typer.Argument(metavar="FILE.fw", show_default=False, help="A bundle that pack wrote.")
]


def pack(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR... OUT.fw",
            show_default=False,
            help="Folders that fit or lower wrote, one for each runtime, and last the bundle to write.",
        ),
    ],
    sign: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEY.pem", help="Private Ed25519 key that signs the bundle."),
    ] = None,
    base: options.Base = None,
    license: Annotated[
        Path | None,
        typer.Option(
            "--license",
            metavar="FILE",
            show_default=False,
            help="Terms that travel along as LICENSE; by default the LICENSE in DIR, if there is one.",
        ),
    ] = None,
    force: options.ForceFile = False,
    quiet: options.Silent = False,
    as_json: options.AsJson = False,
) -> None:
    """Pack what fit or lower wrote into one small file.

    Holds the artifact, entropy-coded; artifact.json, recipe.yaml, result.json, the model card and the
    programs that load it; and what its runtime answers to made-up inputs, for verify. No example of
    yours is in it, and no path. report.html stays out: featherweight report makes it again.

    With --base it is an update for those who have OLD.fw, which unpack, verify and load then need.

    \b
    Examples:
      featherweight pack fitted model.fw
      featherweight pack phone web model.fw --license LICENSE
      openssl genpkey -algorithm ed25519 -out key.pem
      featherweight pack fitted model.fw --sign key.pem
      featherweight pack better update.fw --base model.fw --sign key.pem
    """
    from featherweight import api

    *folders, out = paths
    with Bars(quiet) as progress:
        summary = api.pack(
            folders, out, base=base, sign=sign, license=license, force=force, progress=progress
        )
    if as_json or not quiet:
        terminal.print_packed(summary, as_json)


def unpack(
    file: _File,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", show_default=False, help="Folder to write; new, or empty.")
    ],
    base: options.UpdatedBase = None,
    force: options.ForceFolder = False,
    quiet: options.Silent = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the files of a bundle into a folder.

    They are byte for byte what they were.

    \b
    Examples:
      featherweight unpack model.fw fitted
      featherweight unpack update.fw better --base model.fw
    """
    from featherweight import api

    summary = api.unpack(file, folder, base=base, force=force)
    if as_json or not quiet:
        terminal.print_summary(summary, as_json)


def verify(
    file: _File,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="KEY.pub",
            show_default=False,
            help="Public Ed25519 key of who made it; without one, nobody vouches for the bundle.",
        ),
    ] = None,
    base: options.UpdatedBase = None,
    quiet: options.Silent = False,
    as_json: options.AsJson = False,
) -> None:
    """Check who made a bundle, and that it is right.

    Checks the signature; the digest of everything that is stored and of every file; that the artifact
    is the one that result.json and artifact.json tell of; and, in a process of its own, that its runtime
    answers made-up inputs as it did when it was packed. Exit code 0 when all is right, else 2.

    \b
    Examples:
      openssl pkey -in key.pem -pubout -out key.pub
      featherweight verify model.fw --key key.pub
      featherweight verify update.fw --key key.pub --base model.fw
    """
    from featherweight import api

    with Bars(quiet=True):
        summary = api.verify(file, key=key, base=base)
    if as_json or not quiet:
        terminal.print_verified(summary, as_json)

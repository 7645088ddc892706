"""``python -m featherweight_loader``: list, check or unpack a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from featherweight_loader import BundleError, read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 where it went well, 2 where it did not."""
    parser = argparse.ArgumentParser(prog="featherweight_loader", description="Reads .fw bundles.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "tell the files in a bundle"),
        ("check", "decode everything and compare every digest; the signature is not verified"),
        ("unpack", "write the files into a new folder"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file")
        if name == "unpack":
            command.add_argument("folder")
        if name != "list":
            command.add_argument("--base", help="the bundle that an update was made from")
        command.add_argument("--max-bytes", type=int, default=4 << 30, help="what all files may take")
    told = parser.parse_args(arguments)
    try:
        bundle = read(told.file, base=getattr(told, "base", None), max_bytes=told.max_bytes)
        if told.command == "list":
            for file in bundle.files.values():
                sys.stdout.write(f"{file.bytes:>12} {file.kind:<8} {file.sha256[:16]} {file.path}\n")
        elif told.command == "check":
            bundle.check()
            sys.stdout.write(f"{bundle.identity} is whole\n")
        else:
            written = bundle.unpack(told.folder)
            sys.stdout.write(f"{len(written)} files in {told.folder}\n")
    except BundleError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

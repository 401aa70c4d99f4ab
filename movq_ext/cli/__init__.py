"""The command line: ``movq-ext {demo,encode,decode,train,export,info}``."""

from __future__ import annotations

import argparse
import io
import sys

from .. import ExportError, __version__
from ..bulk.memory import is_out_of_memory
from . import decode, demo, encode, export, info, train
from .common import print_error

COMMANDS = {"demo": demo, "encode": encode, "decode": decode, "train": train, "export": export, "info": info}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="movq-ext",
        description="Encode images to MoVQ codes, decode codes to images, train models and export them.",
        epilog="Run movq-ext COMMAND --help for the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"movq-ext {__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 if everything was done, 1 if some files failed and the rest were done, 2 for invalid arguments, 130 if interrupted.
    Without a command, print the help.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # under an ASCII locale, a name would raise UnicodeEncodeError
    top = parser()
    args = top.parse_args(argv)
    if not hasattr(args, "run"):
        top.print_help()
        return 0
    try:
        status: int = args.run(args)
        return status
    except (OSError, ValueError, TypeError, FloatingPointError, ExportError) as error:
        print_error(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(f"out of memory: {error}" if str(error) else "out of memory")
        return 2
    except KeyboardInterrupt as error:  # its message, if it has one, says how to continue
        print("; ".join(["interrupted", *map(str, error.args)]), file=sys.stderr)
        return 130  # 128 + SIGINT, as shells report it

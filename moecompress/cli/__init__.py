"""The command line. One file a command; importing this package imports no torch."""

from __future__ import annotations

import sys

import typer

from moecompress.errors import UserError

app = typer.Typer(
    name="moecompress",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Compress Mixture-of-Experts language models to a byte budget, and prove what it cost.",
)

#: command name -> module under moecompress.cli; each module's ``command`` function is the command.
COMMANDS: dict[str, str] = {
    "demo": "demo",
    "inspect": "inspect",
    "calibrate": "calibrate",
    "plan": "plan",
    "quantize": "quantize",
    "tune-routing": "tune_routing",
    "prune": "prune",
    "slim": "slim",
    "distill": "distill",
    "evaluate": "evaluate",
    "export": "export",
    "run": "run",
    "report": "report",
    "convert": "convert",
    "bench": "bench",
}


def _register() -> None:
    from importlib import import_module

    for name, module in COMMANDS.items():
        app.command(name)(import_module(f"moecompress.cli.{module}").command)


_register()


def main() -> None:
    """Entry point: errors a user can mend end with exit code 2 and no traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # Disk full, no permission, unreadable file: the operating system's own words, and what it was about.
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if (
            not isinstance(error, MemoryError)
            and "can't allocate memory" not in str(error)
            and "out of memory" not in str(error)
        ):
            raise  # a bug of ours: the traceback is what a report needs
        print(f"error: not enough memory: {str(error).splitlines()[0] if str(error) else 'the system gave no more'}\n"
              "  remedy:   use shorter or fewer calibration sequences, or a machine with more memory", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from the last finished layer", file=sys.stderr)
        sys.exit(130)

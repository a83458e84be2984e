"""The `lambda-split` application: what all sub-commands share. Components contribute the sub-commands."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from split_common.errors import ConfigError, SplitError
from split_common.system.console import emit_json
from split_common.system.process import reuse_memory

#: Entry points of this group name functions `register(app: typer.Typer) -> None`. Their modules import torch
#: and transformers inside their commands only, so that `lambda-split --help` answers at once.
COMMANDS_GROUP = "lambda_split.commands"

#: Exit code after Ctrl-C: 128 + SIGINT, as shells have it.
EXIT_INTERRUPTED = 130

#: Exit code when the program itself is at fault (EX_SOFTWARE).
EXIT_UNEXPECTED = 70

#: What to install for modules that come with an extra of the package.
EXTRAS = {"diffusers": "'lambda-split[diffusion]'", "PIL": "'lambda-split[diffusion]'"}

# Pretty exceptions would print local variables, and with them keys and prompts. Help is Markdown, since in
# Rich's own markup 'lambda-split[gguf]' would lose its brackets.
app = typer.Typer(
    name="lambda-split",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lambda-split {importlib.metadata.version('lambda-split')}")
        raise typer.Exit


@app.callback()
def _options(
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(
            envvar="LAMBDA_SPLIT_LOG", case_sensitive=False, help="Lowest level that is logged to stderr."
        ),
    ] = "warning",
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a model split between this device and workers, over an encrypted queue."""
    reuse_memory()
    # An error of a hub is reported once, at the end, not at each retry.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )


@functools.cache
def load_commands() -> None:
    """Let every component add its sub-commands to `app`."""
    for entry in importlib.metadata.entry_points(group=COMMANDS_GROUP):
        try:
            entry.load()(app)
        except Exception as exc:
            raise ConfigError(
                f"the {entry.name!r} commands ({entry.value}) cannot be loaded: {type(exc).__name__}: {exc}"
            ) from exc


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; every error ends as one line on stderr and an exit code."""
    arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
    as_json = "--json" in arguments
    try:
        load_commands()
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="lambda-split", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except typer.Abort:
        return _fail("Aborted", "aborted", 1, as_json)
    except typer.TyperException as exc:
        # A group without a sub-command has printed its help, and has no message.
        if not exc.format_message():
            return exc.exit_code
        return _fail(type(exc).__name__, _wrong_usage(exc), exc.exit_code, as_json)
    except SplitError as exc:
        return _fail(type(exc).__name__, str(exc), exc.exit_code, as_json)
    except ModuleNotFoundError as exc:
        # An installation for the broker alone, say, has no torch.
        package = EXTRAS.get(exc.name or "", "lambda-split")
        message = f"{exc.name} is not installed, which this command needs: pip install {package}"
        return _fail("ModuleNotFoundError", message, ConfigError.exit_code, as_json)
    except Exception as exc:
        name = type(exc).__name__
        message = f"unexpected {name}: {exc} (run with LAMBDA_SPLIT_DEBUG=1 for the traceback)"
        return _fail(name, message, EXIT_UNEXPECTED, as_json)
    return code if isinstance(code, int) else 0


def _wrong_usage(error: typer.TyperException) -> str:
    """What is wrong, and where to read about correct usage."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see `{context.command_path} --help`" if context is not None else message


def _fail(name: str, message: str, code: int, as_json: bool) -> int:
    """Report the exception that is being handled and return the exit code."""
    if os.environ.get("LAMBDA_SPLIT_DEBUG") == "1":
        traceback.print_exc()
    # The message may contain text from a peer: no line breaks and no control codes for the terminal.
    line = "".join(char if char.isprintable() else "?" for char in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        try:
            emit_json({"error": {"type": name, "message": line}})
        except BrokenPipeError:
            _drop_stdout()
    return code


def _drop_stdout() -> None:
    """The reader of stdout is gone: avoid an error when the interpreter flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

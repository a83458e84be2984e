"""The `lambda-split` application, to which components add their commands."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import importlib.metadata
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from split_common.cli.dashes import tell_dashes_apart
from split_common.cli.numbers import bound_numbers
from split_common.cli.presentation import present
from split_common.errors import ConfigError, SplitError
from split_common.system.console import emit_json, prepare_output
from split_common.system.files import user_path
from split_common.system.outputs import is_stdout, output_path
from split_common.system.process import collect_seldom, keep_memory_private, reuse_memory
from split_common.system.text import check_text

#: Group of entry points, each a function `register(app: typer.Typer) -> None`. Their modules import torch and
#: transformers inside commands only, so that `lambda-split --help` answers at once.
COMMANDS_GROUP = "lambda_split.commands"

#: Exit code after Ctrl-C: 128 + SIGINT, as in shells.
EXIT_INTERRUPTED = 130

#: Exit code after an unexpected error: EX_SOFTWARE of sysexits.h.
EXIT_UNEXPECTED = 70

#: Errors of a disk, or of a device behind stdout, that takes no more.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

#: Errors by which the system refuses a path that it is asked about, whether something is there or not.
REFUSED_PATH = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}

#: Requirement to install, by the module that is missing. Other modules come with the package itself.
EXTRAS = {"diffusers": "'lambda-split[diffusion]'", "PIL": "'lambda-split[diffusion]'"}

#: The option, on every command that has it, of the file that is written.
OUTPUT = "output"

#: Loggers of libraries that warn while they are imported, whether they are used or not.
_CHATTY = ("bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree", "torchao")

# Pretty exceptions would print local variables, among them keys and prompts. Help is Markdown, because Rich's own
# markup would remove the brackets of 'lambda-split[gguf]'.
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
    """Run a model that is split between this device and workers, which exchange encrypted messages."""
    reuse_memory()
    keep_memory_private()
    # Errors of the hub are reported once, at the end, instead of at each retry.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)


@functools.cache
def load_commands() -> None:
    """Adds the commands of all components to `app`. Raises ConfigError if those of one cannot be loaded."""
    for entry in importlib.metadata.entry_points(group=COMMANDS_GROUP):
        try:
            entry.load()(app)
        except Exception as exc:
            raise ConfigError(
                f"the {entry.name!r} commands ({entry.value}) cannot be loaded: {type(exc).__name__}: {exc}"
            ) from exc
    _expand_paths(app)


def _expand_paths(commands: typer.Typer) -> None:
    """Makes commands take `~` in paths also where no shell has expanded it, and `-` for stdout in `--output`."""
    for command in commands.registered_commands:
        if command.callback is not None:
            command.callback = _with_user_paths(command.callback)
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _expand_paths(group.typer_instance)


def _with_user_paths(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def run(*args: Any, **options: Any) -> Any:
        paths = {name: user_path(value) for name, value in options.items() if isinstance(value, Path)}
        if (output := paths.get(OUTPUT)) is not None:
            paths[OUTPUT] = output_path(output)
            if options.get("json") and is_stdout(paths[OUTPUT]):
                raise ConfigError(f"--json and -o {output} do not go together: both write to stdout")
        return callback(*args, **(options | paths))

    return run


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Any error is reported as one line on stderr.

    Args:
        args: the arguments; None for those of this process, which ends afterwards.
    """
    if args is None:
        collect_seldom()
    code = _main(args)
    if args is None:
        # Ctrl-C while the interpreter shuts down would replace the exit code of a command that is done.
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    return code


def _main(args: Sequence[str] | None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
    as_json = "--json" in arguments
    prepare_output()
    try:
        load_commands()
        command = _with_checked_texts(present(typer.main.get_command(_needed(app, arguments[0]))))
        tell_dashes_apart(command)
        bound_numbers(command)
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
        # A group that was called without a command has printed its help, and has no message.
        if not exc.format_message():
            return exc.exit_code
        return _fail(type(exc).__name__, _usage_message(exc), exc.exit_code, as_json)
    except SplitError as exc:
        return _fail(type(exc).__name__, str(exc), exc.exit_code, as_json)
    except ModuleNotFoundError as exc:
        # For example, an installation for the broker alone has no torch.
        package = EXTRAS.get(exc.name or "", "lambda-split")
        message = f"{exc.name or exc} is not installed, which this command needs: pip install {package}"
        return _fail("ModuleNotFoundError", message, ConfigError.exit_code, as_json)
    except Exception as exc:
        return _fail_unexpected(exc, as_json)
    return code if isinstance(code, int) else 0


def _needed(application: typer.Typer, word: str) -> typer.Typer:
    """The application with the one command of this name, or else with all.

    To build the options of all commands takes longer than most commands run.
    """
    commands = [each for each in application.registered_commands if _name(each) == word]
    groups = [each for each in application.registered_groups if each.name == word]
    if not commands and not groups:
        return application
    needed = copy.copy(application)
    needed.registered_commands, needed.registered_groups = commands, groups
    return needed


def _name(command: Any) -> str:
    """A command's name, which follows from its function's unless it is given."""
    return str(command.name or typer.main.get_command_name(command.callback.__name__))


def _with_checked_texts(command: Any) -> Any:
    """The command, or group of commands, with a check before it runs: texts are UTF-8. Paths need not be."""
    for nested in getattr(command, "commands", {}).values():
        _with_checked_texts(nested)
    run = command.invoke

    def checked(context: typer.Context) -> Any:
        for parameter in command.params:
            given = context.params.get(parameter.name)
            for value in given if isinstance(given, list | tuple) else (given,):
                if isinstance(value, str):
                    check_text(value, f"{parameter.opts[0] if parameter.opts else parameter.name}")
        return run(context)

    command.invoke = checked
    return command


def _usage_message(error: typer.TyperException) -> str:
    """The error, and the command that shows the correct usage."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see `{context.command_path} --help`" if context is not None else message


def _fail(name: str, message: str, code: int, as_json: bool) -> int:
    """Reports the exception that is being handled; returns the exit code."""
    if os.environ.get("LAMBDA_SPLIT_DEBUG") == "1":
        traceback.print_exc()
    # The message may contain text from a peer: line breaks and control codes for the terminal are removed.
    line = "".join(char if char.isprintable() else "?" for char in " ".join(message.split()))
    # Neither stream may take it: its reader has left, or its device is full.
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr)
    if as_json:
        try:
            emit_json({"error": {"type": name, "message": line}})
        except OSError:
            _drop_stdout()
    return code


def _fail_unexpected(error: Exception, as_json: bool) -> int:
    """Reports the exception that is being handled, which nothing else expected; returns the exit code."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
        _drop_stdout()
        return _fail("OSError", f"the output cannot be written: {error.strerror}", SplitError.exit_code, as_json)
    if isinstance(error, OSError) and error.errno in REFUSED_PATH and error.filename is not None:
        return _fail(name, f"{error.filename} cannot be used: {error.strerror}", ConfigError.exit_code, as_json)
    message = f"unexpected {name}: {error} (run with LAMBDA_SPLIT_DEBUG=1 for the traceback)"
    return _fail(name, message, EXIT_UNEXPECTED, as_json)


def _drop_stdout() -> None:
    """Redirects stdout, which takes no more, to avoid an error when the interpreter flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

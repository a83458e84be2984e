"""The `lambda-split` command: the application, options that components share, and the operator's commands."""

from split_common.cli.application import main

__all__ = ["main"]

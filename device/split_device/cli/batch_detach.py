"""Hands a batch to the agent, which is started if none runs."""

from __future__ import annotations

import typer

from split_common.cli.options import given, given_words
from split_common.system.console import emit_json, stderr
from split_device.cli.agent import app as agent_app
from split_device.cli.batch_run import Begun
from split_device.jobs import agent


def hand_over(context: typer.Context, broker: str) -> int:
    """The process id of the agent, which is started if none runs. Raises AgentError if it does not start."""
    options = _agent_options(context)
    running = agent.running_agent()
    if running is not None:
        if without := given(context, options - {"--store-key"}):
            text = f"an agent is already running with its own options; ignored: {', '.join(sorted(without))}"
            stderr.print(text, soft_wrap=True)
        return running
    others = {parameter.opts[0] for parameter in context.command.params} - options
    # An address may hold a password, and the arguments of a process are everybody's to read.
    words = given_words(context, but=[*others, "--broker"])
    pid: int = agent.start(words, {"LAMBDA_SPLIT_BROKER": broker})["pid"]
    stderr.print(f"started agent {pid}, which runs until `lambda-split agent stop`", soft_wrap=True)
    return pid


def _agent_options(context: typer.Context) -> set[str]:
    """The options of this command that `agent start` has, too, except --json."""
    # This process has no other command than its own.
    start = typer.main.get_command(agent_app).commands["start"]  # type: ignore[attr-defined]
    agents = {parameter.opts[0] for parameter in start.params}
    return {parameter.opts[0] for parameter in context.command.params} & agents - {"--json"}


def report_detached(begun: Begun, pid: int, json: bool) -> None:
    """Says how a batch is followed that the agent answers."""
    name, record = begun.place.name, begun.record
    stderr.print(f"agent {pid} answers it: `lambda-split jobs watch {name}` shows how far it is", soft_wrap=True)
    if json:
        emit_json(
            {
                "name": name,
                "output": record.output,
                "lines": record.lines,
                "resumed": begun.resumed,
                "detached": True,
                "agent": pid,
            }
        )
    else:
        print(name)

"""The device's commands, and the only modules of the device that need Typer."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds the device's commands to `app`."""
    from split_device.cli import agent, jobs
    from split_device.cli.batch import batch
    from split_device.cli.chat import chat
    from split_device.cli.dead_letters import dead_letters
    from split_device.cli.demo.command import demo
    from split_device.cli.doctor import doctor
    from split_device.cli.generate import generate
    from split_device.cli.image import image
    from split_device.cli.inspect import inspect
    from split_device.cli.ping import ping
    from split_device.cli.serve import serve
    from split_device.cli.stress import stress, stress_bystander, stress_device, stress_hostile
    from split_device.cli.submit import submit

    for command in (generate, chat, image, submit, batch, serve, inspect, demo, doctor, ping, stress, dead_letters):
        app.command()(command)
    for hidden in (stress_device, stress_hostile, stress_bystander):
        app.command(hidden=True)(hidden)
    app.add_typer(agent.app, name="agent")
    app.add_typer(jobs.app, name="jobs")

"""Checks that commands make before they do anything slow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from split_common.errors import ConfigError
from split_common.system.text import check_text
from split_device.cli.groups import PromptFormat
from split_device.sessions.connection import Connection


def check_prompt(text: str) -> str:
    """Raises ConfigError for a prompt that is empty or not UTF-8."""
    if not check_text(text, "the prompt").strip():
        raise ConfigError("the prompt is empty")
    return text


def check_raw(raw: bool, system: str | None, prompt_format: PromptFormat, show: Sequence[Path] = ()) -> None:
    """Raises ConfigError for an option of conversations if the prompt is continued as it is."""
    options = {
        "--system": system,
        "--chat-template": prompt_format.chat_template,
        "--chat-template-kwargs": prompt_format.chat_template_kwargs,
        "--show": show,
    }
    if raw and (others := [option for option, value in options.items() if value]):
        raise ConfigError(f"--raw and {others[0]} do not go together: a raw prompt has no messages")


def check_connection(connection: Connection) -> None:
    """Raises ConfigError or CertificateError for a wrong address or wrong keys. Makes no connection."""
    from split_common.transport import connect
    from split_common.trust.fleet import load_fleet
    from split_common.trust.keys import verify_certificate

    fleet = load_fleet(Path(connection.keys) if connection.keys is not None else None)
    identity = fleet.identity("device", connection.member)
    connect(connection.broker, fleet, identity).close()
    # Without the roster: the one here may be older than the broker's.
    verify_certificate(identity.certificate_bytes, operator_key=fleet.operator_key, roster=None, role="device")

"""What a hostile member attacks: the members of the run's own fleet, and the bodies that its workers serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.registry import read_denoiser_spec
from split_common.models.loading import read_spec
from split_common.models.split import DEFAULT_CUT
from split_common.models.verification import build_manifest
from split_common.protocol import headers
from split_common.trust.keys import Role
from split_common.trust.manifest import Manifest
from split_device.stress.hostile.modes import MODES
from split_device.stress.membership import OwnKeys
from split_device.stress.plan import StressPlan, WorkloadKind

#: The processes of the hostile members, by their role.
HOSTILE: dict[str, Role] = {"hostile device": "device", "hostile worker": "worker"}

#: The limit of a broker that is attacked, for the same reason as those of a Redis server.
BROKER_LIMITS = ("--memory-limit", "512MiB")

#: Limits of a Redis server that is attacked: well below the memory of a machine that runs everything.
REDIS_LIMITS = (
    *("--maxmemory", "1gb", "--maxmemory-policy", "noeviction"),
    *("--proto-max-bulk-len", "17mb", "--maxmemory-clients", "25%"),
)


@dataclass(frozen=True)
class Target:
    """The body that the workers of a kind serve."""

    manifest: Manifest
    service: headers.Service
    model: str
    #: Width of the hidden states; 0 for images.
    width: int

    @classmethod
    def read(cls, kind: WorkloadKind, model: str, plan: StressPlan) -> Target:
        """Reads the configuration of a checkpoint, and hashes it.

        Raises:
            SplitError: it cannot be split.
        """
        checkpoint = Checkpoint.resolve(model)
        manifest = build_manifest(checkpoint)
        if kind == "image":
            split, width = read_denoiser_spec(checkpoint).split(DEFAULT_CUT), 0
        else:
            spec = read_spec(checkpoint)
            split = plan.layers.split(spec.layers)
            width = int(spec.text_config.hidden_size)
        return cls(manifest, headers.Service(manifest.root, split.first, split.last), model, width)


def read_targets(plan: StressPlan, models: Mapping[WorkloadKind, str]) -> dict[WorkloadKind, Target]:
    """The targets of each kind. Raises SplitError if a model cannot be split."""
    return {kind: Target.read(kind, model, plan) for kind, model in models.items()}


def own_keys(plan: StressPlan, directory: Path, targets: Mapping[WorkloadKind, Target]) -> OwnKeys:
    """A fleet with a member for each process of a run."""
    roles: dict[str, Role] = {f"worker {index}": "worker" for index in range(plan.workers)}
    roles |= {f"device {index}": "device" for index in range(plan.devices)}
    return OwnKeys(directory, roles | HOSTILE, [target.manifest for target in targets.values()])


class Commands:
    """What is started for each slice.

    Args:
        members: of the run's own fleet.
        targets: by the kind of model.
        address: of the queue.
        seed: of what hostile members draw at random.
    """

    def __init__(self, members: OwnKeys, targets: Mapping[WorkloadKind, Target], address: str, seed: int) -> None:
        self._members = members
        self._targets = targets
        self._address = address
        self._seed = seed

    def mode(self, name: str) -> tuple[list[str], dict[str, str]]:
        """The command of a mode's process, and its environment."""
        mode = MODES[name]
        target = self._targets[mode.kind]
        member = f"hostile {mode.role}"
        facts: dict[str, Any] = {
            "mode": name,
            "broker": self._members.address(self._address, member),
            "root": target.service.root.hex(),
            "first": target.service.first,
            "last": target.service.last,
            "model": target.model,
            "width": target.width,
            "seed": self._seed,
        }
        words = ["stress-hostile", *self._members.options(member)]
        for option, value in facts.items():
            words += [f"--{option}", str(value)]
        return words, self._members.env(member)

    def bystander(self, cores: float) -> tuple[list[str], dict[str, str]]:
        """The command of a process that burns this many cores, and its environment."""
        return ["stress-bystander", "--cores", f"{cores:.4f}"], {}

"""Stand-ins for modules that are on the worker: whatever would be changed there is refused by name.

Libraries find the modules of a model by their names and classes, and then set attributes on them, replace them or
hook them: adapters, attention processors, slicing, offloading, caches. On a part of a model that is elsewhere this
would have no effect, and nobody would be told. A stand-in has the name, the class, the settings and the submodules
of a module, and no weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from split_common.errors import UnsupportedFeature

#: Attributes that torch sets on every module of a model.
_SET_BY_TORCH = ("training",)

#: Decides whether an attribute of a stand-in may be set to a value, because the worker has the same.
Allows = Callable[["OnWorker", str, Any], bool]


class OnWorker(nn.Module):
    """Base of slots and stand-ins. Once it is sealed, attributes, submodules and hooks are refused.

    Raises:
        UnsupportedFeature: something is set, registered or deleted after `seal`.
    """

    #: The module's name in the model; None until it is sealed.
    _sealed: str | None = None
    _allows: Allows | None = None
    #: The attributes of the module for which this one stands in.
    original_settings: Mapping[str, Any] = {}

    @property
    def sealed(self) -> bool:
        return self._sealed is not None

    def seal(self, name: str, allows: Allows | None = None) -> None:
        """Refuses changes from now on, here and in submodules.

        Args:
            name: the module's name in the model.
            allows: decides about exceptions.
        """
        for child_name, child in self.named_children():
            if isinstance(child, OnWorker):
                child.seal(f"{name}.{child_name}", allows)
        self.__dict__.update(_allows=allows, _sealed=name)

    def refuse_change(self, change: str) -> None:
        """Raises UnsupportedFeature if the module is sealed."""
        if self._sealed is not None:
            raise UnsupportedFeature(
                f"{change} of {self._sealed} does not run split, because it is on the worker: merge an adapter "
                "into the checkpoint that device and workers load, or give a language model's LoRA to both "
                "(adapter=, --adapter). Load the model again: its parts here may have changed"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SET_BY_TORCH and (self._allows is None or not self._allows(self, name, value)):
            self.refuse_change(f"setting {name}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.refuse_change(f"deleting {name}")
        super().__delattr__(name)


def _refusing(name: str) -> Callable[..., Any]:
    """A method of torch's modules that registers something, with the refusal before it."""
    method = getattr(nn.Module, name)

    @functools.wraps(method)
    def register(self: OnWorker, *args: Any, **options: Any) -> Any:
        self.refuse_change(name)
        return method(self, *args, **options)

    return register


for _name in dir(nn.Module):
    if _name.startswith("register_") or _name in ("add_module", "set_submodule"):
        setattr(OnWorker, _name, _refusing(_name))


def outline(place: OnWorker, module: nn.Module) -> None:
    """Adds stand-ins for the submodules of `module` to `place`, under the same names, unless it has one there."""
    for name, child in module.named_children():
        if name not in dict(place.named_children()):
            place.add_module(name, _stand_in(child))


def _stand_in(module: nn.Module) -> OnWorker:
    """A stand-in for a module. Its parameters and buffers are plain attributes without data, on the meta device."""
    kind: Any = type(module)
    cls = _stand_in_class(kind)
    made: OnWorker = cls.__new__(cls)
    nn.Module.__init__(made)
    settings = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    made.__dict__.update(settings, original_settings=settings)
    for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        made.__dict__.update({name: tensor.detach().to("meta") for name, tensor in tensors})
    # A layer without a bias has none here, either.
    made.__dict__.setdefault("bias", None)
    outline(made, module)
    return made


@functools.cache
def _stand_in_class(cls: Any) -> type[OnWorker]:
    def forward(self: OnWorker, *_args: Any, **_options: Any) -> Any:
        self.refuse_change("the output")

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    return type(cls.__name__, (OnWorker, cls), names)

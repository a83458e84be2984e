"""Linear layers that are handed the same tensor, such as queries, keys and values, or gate and up, as one product.

Which layers these are is not known but seen: the layers run twice, and hooks see what each is handed. So no
architecture has a line of its own here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from split_common.models.layer_stack import LayerStack, floating_parameter

#: Most rows that are computed as one product: for more, copying its parts costs more than further calls.
JOINED_ROWS = 64

#: Tokens of the runs that show which layers are handed the same tensor: decoding and a prompt.
_RUNS = (1, 3)


class SharedInput(nn.Module):
    """Several linear layers of one input. The first that is called computes all, and the others find their output.

    Not thread-safe: one thread computes.

    Args:
        linears: layers with the same inputs and dtype. Until there is a `product`, each computes its own part.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.widths = [linear.out_features for linear in linears]
        #: Computes all outputs, `[..., in]` to `[..., sum of widths]`.
        self.product: nn.Module = _Separate(linears)
        self._states: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = [None] * len(linears)

    def output(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """The output of one of the layers, `[..., width]`, for states `[..., in]`."""
        if states is not self._states or self._outputs[index] is None:
            # The reference to the input keeps its identity from being used for another tensor.
            self._states = states
            self._outputs = list(torch.split(self.product(states), self.widths, -1))
        output, self._outputs[index] = self._outputs[index], None
        assert output is not None
        # Some operators round otherwise if a row's numbers are not adjacent to the next one's, and a layer with an
        # adapter makes them so: rows without one then have the same numbers as without such neighbours.
        output = output.contiguous()
        if all(other is None for other in self._outputs):
            self._states = None
        return output


class SharedLinear(nn.Module):
    """Stands in for a linear layer that is computed together with others.

    Args:
        shared: computes it.
        index: which of its layers this is.
        linear: the layer, of which the sizes are copied.
    """

    def __init__(self, shared: SharedInput, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._index = index
        # The first layer owns the product; a module that several own would be counted more than once.
        if index == 0:
            self.shared = shared
        self._shared = (shared,)

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.split(tensor, self._shared[0].widths)[self._index]

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight `[out, in]`."""
        return self._part(self._shared[0].product.weight)  # type: ignore[arg-type]

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias `[out]`; zeros if only others of the product have one."""
        bias = self._shared[0].product.bias
        return None if bias is None else self._part(bias)  # type: ignore[arg-type]

    def original(self) -> nn.Linear:
        """The layer itself, as long as there is no product in its place."""
        separate = self._shared[0].product
        assert isinstance(separate, _Separate)
        return separate.linears[self._index]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        shared = self._shared[0]
        if isinstance(shared.product, nn.Linear) and states.shape[:-1].numel() > JOINED_ROWS:
            return nn.functional.linear(states, self.weight, self.bias)
        return shared.output(self._index, states)


class _Separate(nn.Module):
    """The products of several layers, one after another, in one tensor: what a single product has to compute."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        #: In a tuple, so that they are not modules of this one.
        self.linears = tuple(linears)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(states) for linear in self.linears], -1)


def joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer with the outputs of several, from copies of their weights and biases."""
    first = linears[0]
    biased = any(linear.bias is not None for linear in linears)
    whole = nn.Linear(first.in_features, sum(each.out_features for each in linears), bias=biased, device="meta")
    whole.weight = nn.Parameter(torch.cat([each.weight.data for each in linears]), requires_grad=False)
    if biased:
        parts = [each.weight.new_zeros(each.out_features) if each.bias is None else each.bias for each in linears]
        whole.bias = nn.Parameter(torch.cat([part.data for part in parts]), requires_grad=False)
    return whole


def become_parts(linears: Sequence[nn.Linear], whole: nn.Linear) -> None:
    """Makes the weights and biases of linear layers parts of those of the one that has all their outputs."""
    begin = 0
    for linear in linears:
        end = begin + linear.out_features
        linear.weight.data = whole.weight.data[begin:end]
        if linear.bias is not None:
            linear.bias.data = whole.bias.data[begin:end]
        begin = end


def find_shared(stack: LayerStack, linears: Iterable[nn.Linear]) -> list[list[nn.Linear]]:
    """Which of some linear layers can be computed together: those that every run of a stack hands the same tensor.

    Runs the stack. In the end, its layers are as they were.

    Args:
        stack: of a loaded model; layers elsewhere in the model are not looked at.
        linears: the layers that may be computed together.

    Returns:
        Groups of two layers or more, in the order of their calls; empty if layers cannot run by themselves, or
        compute something else when their products come from one.
    """
    # A weight that several layers share cannot be a part of two products.
    owners = Counter(
        id(parameter)
        for module in stack.owner.modules()
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    single = [linear for linear in linears if owners[id(linear.weight)] == 1]
    try:
        wanted, (decoding, prompt) = zip(*(_watch(stack, single, tokens) for tokens in _RUNS), strict=True)
        groups = [group for group in decoding if group in prompt]
        if not groups:
            return []
        share(stack.owner, groups)
        try:
            got = [_run(stack, tokens) for tokens in _RUNS]
        finally:
            replace_modules(stack.owner, _originals(stack.owner))
    except Exception:
        # Why layers cannot run is said by `check_layers`, which runs them as they will be run.
        return []
    return groups if all(map(_agree, got, wanted)) else []


def share(model: nn.Module, groups: Sequence[Sequence[nn.Linear]]) -> list[SharedInput]:
    """Puts groups of a model's linear layers together. Returns what computes each group."""
    shared = [SharedInput(group) for group in groups]
    replace_modules(
        model,
        {
            linear: SharedLinear(each, index, linear)
            for each, group in zip(shared, groups, strict=True)
            for index, linear in enumerate(group)
        },
    )
    return shared


def replace_modules(model: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> None:
    """Puts other modules in the places of some of a model's."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in twins:
                setattr(parent, name, twins[child])


def _originals(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """What `share` has replaced, by what stands in its place."""
    return {module: module.original() for module in model.modules() if isinstance(module, SharedLinear)}


def _watch(
    stack: LayerStack, linears: Sequence[nn.Linear], tokens: int
) -> tuple[torch.Tensor, list[list[nn.Linear]]]:
    """Runs a stack. Returns its output, and the groups of layers that were handed the same tensor, each once."""
    calls: list[tuple[nn.Linear, torch.Tensor]] = []

    def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args and isinstance(module, nn.Linear):
            calls.append((module, args[0]))

    hooks = [linear.register_forward_pre_hook(see) for linear in linears]
    try:
        output = _run(stack, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(id(linear) for linear, _ in calls)
    groups: dict[tuple[int, torch.dtype], list[nn.Linear]] = {}
    for linear, states in calls:
        if times[id(linear)] == 1:
            groups.setdefault((id(states), linear.weight.dtype), []).append(linear)
    return output, [group for group in groups.values() if len(group) > 1]


@torch.inference_mode()
def _run(stack: LayerStack, tokens: int) -> torch.Tensor:
    """The output of a stack's owner for random embeddings, without a cache."""
    generator = torch.Generator().manual_seed(tokens)
    parameter = floating_parameter(stack.owner)
    dtype = stack.dtype if parameter is None else parameter.dtype
    arguments = {"position_ids": torch.arange(tokens)[None]} if stack.takes_positions else {}
    embeddings = torch.randn(1, tokens, stack.width, generator=generator).to(dtype)
    output: torch.Tensor = stack.owner(inputs_embeds=embeddings, use_cache=False, **arguments)[0]
    return output


def _agree(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether outputs differ by rounding alone: the products are the same, but lie elsewhere in memory."""
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 2e-2
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())

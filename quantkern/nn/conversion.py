"""From a trained binary network to its packed inference model.

Layers are replaced in a copy of the model. Where a chain of modules behind a layer ends in a sign, the chain becomes
the layer's integer thresholds and its modules the identity; signs go on packed where only packed layers read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from quantkern.attach import Attachment, copy_of, remove_parametrization
from quantkern.binarized import CannotTrace, trace
from quantkern.binarized.flow import calls, is_hooked, modules_of, only_input
from quantkern.binary.checks import pair
from quantkern.config import CHILD_NAME
from quantkern.nn.binary import BinaryConv2d, BinaryLinear
from quantkern.nn.packed import Pool, check_all_states, find_thresholds

_RISING = (
    *(nn.Identity, nn.Hardtanh, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign, nn.Sigmoid, nn.Hardsigmoid),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
"""Modules that in evaluation never fall where their input rises, element by element."""


@dataclass(frozen=True)
class Chain:
    """What follows one layer up to a sign, by the modules' names.

    follow: from the sum to what the sign is taken of; pool: a max pooling among them or behind the sign; signs: the
    module whose output the sign is. packed: only packed layers read the sign.
    """

    follow: tuple[str, ...]
    pool: str | None
    pool_first: bool
    signs: str | None
    packed: bool


class _Finder:
    """Finds the chains in one graph."""

    def __init__(
        self, graph: fx.Graph, modules: Mapping[str, nn.Module], packed: Collection[nn.Module],
        makes_signs: Callable[[nn.Module], bool], takes_signs: Callable[[nn.Module], bool],
    ) -> None:  # fmt: skip
        self.modules, self.packed = modules, packed
        self.makes_signs, self.takes_signs = makes_signs, takes_signs
        self.nodes = dict(calls(graph, dict(modules)))
        self.times = Counter(self.nodes.values())

    def chains(self) -> dict[nn.Module, Chain]:
        """Every packed layer that a sign follows."""
        found = {}
        for node, module in self.nodes.items():
            if module in self.packed and self.times[module] == 1:
                chain = self.follow(node)
                if chain is not None:
                    found[module] = chain
        return found

    def next_of(self, node: fx.Node) -> fx.Node | None:
        """The module that alone reads ``node``, called once and with nothing else."""
        users = list(node.users)
        if len(users) != 1 or users[0] not in self.nodes or only_input(users[0]) is not node:
            return None
        module = self.nodes[users[0]]
        return users[0] if self.times[module] == 1 and not is_hooked(module) else None

    def readers_pack(self, node: fx.Node, needed: Callable[[nn.Module], bool]) -> bool:
        """Whether all that read ``node``, identities aside, are packed layers as ``needed``."""
        if not node.users:
            return False
        for user in node.users:
            module = self.nodes.get(user)
            if module is None or only_input(user) is not node:
                return False
            if type(module) is nn.Identity and not is_hooked(module) and not self.makes_signs(module):
                if not self.readers_pack(user, needed):
                    return False
            elif module not in self.packed or not needed(module) or is_hooked(module):
                return False
        return True

    def follow(self, node: fx.Node) -> Chain | None:
        """Walk from a layer to the first sign."""
        image = isinstance(self.nodes[node], nn.Conv2d)
        follow: list[str] = []
        pool: str | None = None
        normed = False
        start = node
        if is_hooked(self.nodes[node]):
            return None
        while True:
            module = self.nodes[node]
            if self.makes_signs(module):
                break
            if self.readers_pack(node, self.takes_signs):
                return Chain(tuple(follow), pool, True, None, True)
            following = self.next_of(node)
            if following is None:
                return None
            module = self.nodes[following]
            if image and pool is None and not follow and foldable_pool(module):
                pool = str(following.target)
            elif not normed and foldable_norm(module, image):
                normed = True
                follow.append(str(following.target))
            elif type(module) in _RISING:
                follow.append(str(following.target))
            else:
                return None
            node = following
        signs = str(node.target) if node is not start else None
        behind = self.next_of(node)
        pool_first = True
        if image and pool is None and behind is not None and foldable_pool(self.nodes[behind]):
            node, pool, pool_first = behind, str(behind.target), False
        return Chain(tuple(follow), pool, pool_first, signs, self.readers_pack(node, lambda _: True))


def foldable_norm(module: nn.Module, image: bool) -> bool:
    """A batch norm whose evaluation is one number times the sum plus another."""
    known = (nn.BatchNorm2d, nn.SyncBatchNorm) if image else (nn.BatchNorm1d, nn.SyncBatchNorm)
    return isinstance(module, _BatchNorm) and type(module) in known and module.running_var is not None


def foldable_pool(module: nn.Module) -> bool:
    """A max pooling that ``packed_max_pool2d`` can do."""
    if type(module) is not nn.MaxPool2d or module.return_indices or module.ceil_mode:
        return False
    return all(step == 1 for step in _two(module.dilation))


def _two(value: int | Sequence[int]) -> tuple[int, int]:
    return pair(value, "size", 0)


def _pool(module: nn.Module, first: bool) -> Pool:
    assert isinstance(module, nn.MaxPool2d)
    return Pool(_two(module.kernel_size), _two(module.stride), _two(module.padding), first)


def find_chains(
    model: nn.Module, leaves: Collection[nn.Module], packed: Collection[nn.Module],
    makes_signs: Callable[[nn.Module], bool], takes_signs: Callable[[nn.Module], bool],
) -> dict[nn.Module, Chain]:  # fmt: skip
    """The chains that stand in the model however it is called; none where it cannot be traced."""
    try:
        graphs = trace(model, leaves, modes=(False,))
    except CannotTrace:
        return {}
    modules = modules_of(model)
    every = [_Finder(graph, modules, packed, makes_signs, takes_signs).chains() for graph in graphs]
    return {layer: chain for layer, chain in every[0].items() if all(other.get(layer) == chain for other in every)}


def _following(layer: nn.Module, modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """What ``find_thresholds`` shall follow: the modules, on tensors of the rank they know."""

    def follow(y: Tensor) -> Tensor:
        y = y[..., None, None] if isinstance(layer, nn.Conv2d) else y
        for module in modules:
            y = module(y)
        return y.flatten(1)

    return follow


def _is_regular(modules: Sequence[nn.Module]) -> bool:
    """No number in them is infinite or NaN, so that they rise or fall."""
    return all(bool(t.isfinite().all()) for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_meta)


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with modules exchanged under all of their names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hooks of others stay on a layer, in their order with ours."""
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        for attribute in (name, f"{name}_with_kwargs", "_forward_hooks_always_called"):
            getattr(new, attribute).update(getattr(old, attribute))
    if CHILD_NAME in old._modules:
        new.add_module(CHILD_NAME, old._modules[CHILD_NAME])


@torch.no_grad()
def _make_real(attachment: Attachment) -> None:
    """A layer that stays real gets its signs as an ordinary weight."""
    layer = attachment.layer
    signs = layer.weight
    assert isinstance(signs, Tensor) and attachment.weight is not None
    remove_parametrization(layer, attachment.weight, attachment.order)
    if not parametrize.is_parametrized(layer, "weight"):
        layer.weight = nn.Parameter(signs.detach().clone(), requires_grad=False)


def convert(model: nn.Module, attachments: Sequence[Attachment]) -> nn.Module:
    """See ``BNNQuantizer.convert``; ``attachments`` are those on ``model``, which stays as it is."""
    new, copies = copy_of(model, attachments)
    new.eval()
    quantized = {attachment.layer: attachment for attachment in copies}
    packed = [layer for layer, attachment in quantized.items() if attachment.computed_as is not None]

    def makes_signs(module: nn.Module) -> bool:
        return module in quantized and "output" in quantized[module].kinds

    def takes_signs(module: nn.Module) -> bool:
        return module in quantized and "input" in quantized[module].kinds

    modules = modules_of(new)
    chains = find_chains(new, list(quantized), packed, makes_signs, takes_signs)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in packed:
        chain = chains.get(layer)
        following = [modules[name] for name in chain.follow] if chain is not None else []
        if chain is None or not _is_regular([m for m in following if isinstance(m, _BatchNorm)]):
            chain = None
        own_sign = chain is None and makes_signs(layer) and not is_hooked(layer)
        replacements[layer] = _pack(layer, chain, following, modules, own_sign)
        if is_hooked(layer):
            _move_hooks(layer, replacements[layer])
        if chain is not None:
            gone = {*chain.follow, *filter(None, (chain.pool, chain.signs))}
            replacements.update({modules[name]: nn.Identity() for name in gone})
    for layer in quantized:
        if layer not in replacements and quantized[layer].weight is not None:
            _make_real(quantized[layer])
    new = _replace(new, replacements).eval()
    new.register_load_state_dict_pre_hook(check_all_states)  # type: ignore[no-untyped-call]
    return new


def _pack(
    layer: nn.Module, chain: Chain | None, following: Sequence[nn.Module], modules: Mapping[str, nn.Module],
    own_sign: bool,
) -> nn.Module:  # fmt: skip
    sign, packed = chain is not None or own_sign, chain is not None and chain.packed
    result: BinaryConv2d | BinaryLinear
    if isinstance(layer, nn.Conv2d):
        pool = None if chain is None or chain.pool is None else _pool(modules[chain.pool], chain.pool_first)
        result = BinaryConv2d.from_float(layer, sign=sign, packed_output=packed, pool=pool)
        longest = result.longest_sum
    else:
        assert isinstance(layer, nn.Linear)
        result = BinaryLinear.from_float(layer, sign=sign, packed_output=packed)
        longest = result.k
    if chain is not None and following:
        follow = _following(layer, following)
        bias, like = layer.bias, layer.weight
        result.take_threshold(*find_thresholds(follow, bias, result.outputs, longest, like))
        result.rows_only = isinstance(result, BinaryLinear) and any(isinstance(m, _BatchNorm) for m in following)
    return result

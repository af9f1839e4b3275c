"""Taps: where tensors pass on their way through a decoder layer. Statistics observe there, and emulations round there.

A site has a name and hands over every tensor that passes it. The caller of a tap chooses the names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..recipe.groups import FusedGroup

Handle = Callable[[str, Tensor], Tensor | None]
"""Called with a site and the tensor that passes it. It returns the tensor's replacement, or None to let it pass."""
Passed = Callable[[str], None]
"""Called with a site once every module there was reached in a forward. It may raise, to end the forward."""


STORED_MODULES = "nvquant_stored_modules"
"""The attribute of a layer with its modules' names by those of the checkpoint inside the layer, where they differ."""


def ignore(_site: str) -> None:
    """A `Passed` that does nothing."""


class Tap(Protocol):
    """Hands over the tensors at some sites of a layer."""

    def on(self, layer: nn.Module, handle: Handle, passed: Passed = ignore) -> AbstractContextManager[None]:
        """Hand over what passes during one forward of a layer, while the block runs.

        Args:
            layer: a decoder layer. Only hooks change it, and none remains.
            handle: receives each tensor once, however many modules of the site take it. It does not change the tensor.
            passed: see `Passed`.
        """
        ...


class Taps:
    """Several taps as one. Their sites have different names."""

    def __init__(self, *taps: Tap) -> None:
        self._taps = taps

    @contextmanager
    def on(self, layer: nn.Module, handle: Handle, passed: Passed = ignore) -> Iterator[None]:
        """See `Tap.on`."""
        with ExitStack() as opened:
            for tap in self._taps:
                opened.enter_context(tap.on(layer, handle, passed))
            yield


class LinearTap:
    """Hands over the inputs of linears. The linears of a site share an input, which is handed over once.

    Args:
        sites: names of the linears inside the layer, as the checkpoint has them, by site. At least one each.
    """

    def __init__(self, sites: Mapping[str, Sequence[str]]) -> None:
        self._sites = sites

    @classmethod
    def of_groups(cls, groups: Iterable[FusedGroup], prefix: str) -> LinearTap:
        """A tap with a site for each fused group, of the group's name.

        Args:
            prefix: precedes the names of the layer's modules in those of the members, with a final dot.
        """
        return cls({group.name: [member.removeprefix(prefix) for member in group.members] for group in groups})

    @contextmanager
    def on(self, layer: nn.Module, handle: Handle, passed: Passed = ignore) -> Iterator[None]:
        """See `Tap.on`."""
        hooks = []
        for site, linears in self._sites.items():
            modules = {name: None for linear in linears for name in _names_in(layer, linear)}
            passing = _Passing(site, list(modules), handle, passed)
            for name in modules:
                hooks.append(layer.get_submodule(name).register_forward_pre_hook(passing.hook(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _names_in(layer: nn.Module, stored: str) -> Sequence[str]:
    """The layer's modules that compute with a stored one."""
    known: Mapping[str, Sequence[str]] = getattr(layer, STORED_MODULES, {})
    return known.get(stored, (stored,))


@dataclass(eq=False)
class _Shared:
    """An input on its way to the linears of a site.

    Attributes:
        to_come: the linears that have not taken it.
    """

    given: Tensor
    replacement: Tensor | None
    to_come: set[str]


class _Passing:
    """One site during a forward."""

    def __init__(self, site: str, linears: Sequence[str], handle: Handle, passed: Passed) -> None:
        self._site, self._linears, self._handle, self._passed = site, frozenset(linears), handle, passed
        self._to_come = set(linears)
        self._shared: list[_Shared] = []  # alive, so that no other tensor is mistaken for one of them

    def hook(self, linear: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        """The forward pre-hook of a linear."""

        def take(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            shared = self._find(args[0])
            shared.to_come.discard(linear)
            if not shared.to_come:
                self._shared.remove(shared)
            is_last = self._to_come == {linear}
            self._to_come.discard(linear)
            if is_last:
                self._passed(self._site)
            return None if shared.replacement is None else (shared.replacement, *args[1:])

        return take

    def _find(self, given: Tensor) -> _Shared:
        for shared in self._shared:
            if shared.given is given:
                return shared
        self._shared.append(_Shared(given, self._handle(self._site, given), set(self._linears)))
        return self._shared[-1]


class KeyValueTap:
    """Hands over the keys and values that a layer's attention functions receive: after norms and rotation, usually
    [sequences, key and value heads, tokens, head size]. A layer that shares another layer's hands over the shared ones.

    The sites are PREFIX + the name of an attention module + `.k` or `.v`. The tap sees attention that goes through the
    attention interface of transformers. The function of the model's own choice computes on.

    Args:
        prefix: precedes the names of the layer's modules, with a final dot, or empty.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    @contextmanager
    def on(self, layer: nn.Module, handle: Handle, passed: Passed = ignore) -> Iterator[None]:
        """See `Tap.on`. While the block runs, the interface has another function under the name of the model's choice.
        The name stays, because some models compare it."""
        names = {module: f"{self._prefix}{name}" for name, module in layer.named_modules()}

        def hand_over(module: nn.Module, *parts: Tensor) -> list[Tensor]:
            if module not in names:
                return list(parts)
            sites = [f"{names[module]}.{part}" for part in "kv"]
            replacements = [handle(site, part) for site, part in zip(sites, parts, strict=True)]
            for site in sites:
                passed(site)
            return [old if new is None else new for old, new in zip(parts, replacements, strict=True)]

        found = [pair for module in names if (pair := _attention_choice(module)) is not None]
        with ExitStack() as opened:
            for interface, choice in {(id(one), choice): (one, choice) for one, choice in found}.values():
                opened.enter_context(_tapped(interface, choice, hand_over))
            yield


def _file_of(module: nn.Module) -> Mapping[str, Any]:
    """The names in the file of a module's forward."""
    names: Mapping[str, Any] = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    return names


def _attention_choice(module: nn.Module) -> tuple[MutableMapping[str, Any], str] | None:
    """The attention interface that a module may look into, and the name that it looks up there."""
    choice = getattr(getattr(module, "config", None), "_attn_implementation", None)
    interface = _file_of(module).get("ALL_ATTENTION_FUNCTIONS")
    return (interface, choice) if isinstance(choice, str) and interface is not None else None


@contextmanager
def _tapped(
    interface: MutableMapping[str, Any], choice: str, hand_over: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]]
) -> Iterator[None]:
    """Hand over keys and values before the function of a choice computes with them."""
    before = interface.get(choice)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        key, value = hand_over(module, key, value)
        # Without an entry, a module falls back on the function of this name in its file.
        compute = _file_of(module)["eager_attention_forward"] if before is None else before
        return compute(module, query, key, value, *args, **more)

    interface[choice] = attend
    try:
        yield
    finally:
        del interface[choice]  # an entry of this interface alone: one that all interfaces share reappears
        if interface.get(choice) is not before:
            interface[choice] = before

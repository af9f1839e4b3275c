"""nvquant: turn a BF16 Hugging Face checkpoint into an NVFP4 checkpoint that vLLM serves, and prove it.

    from nvquant import Recipe, convert, distill, plan, push, relayout, sweep, verify

docs/python.md describes these functions. Nothing heavy is imported before the first use of one.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # as in typing, whose import would cost more than the rest of this module
if TYPE_CHECKING:
    from collections.abc import Callable
    from inspect import Signature

    from .api import convert, distill, plan, push, relayout, sweep, verify
    from .recipe.schema import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "convert", "distill", "plan", "push", "relayout", "sweep", "verify"]

_MODULES = {"Recipe": "recipe.schema", "push": "api", "relayout": "api"}
_ROOMS = ("convert", "distill", "plan", "sweep", "verify")  # folders of this package that have the name of a function


class _CallableRoom(ModuleType):
    """A room that is the function of the same name too.

    Python binds `nvquant.plan` to the folder as soon as any module of it is imported. So that both `nvquant.plan(…)`
    and `nvquant.plan.forecast` always work, the folder can be called.
    """

    def __call__(self, *args: object, **options: object) -> object:
        """Call the function of this name in `nvquant.api`."""
        return self._function(*args, **options)

    @property
    def __signature__(self) -> Signature:
        from inspect import signature

        return signature(self._function)

    @property
    def _function(self) -> Callable[..., object]:
        found: Callable[..., object] = getattr(import_module(f"{__name__}.api"), self.__name__.rpartition(".")[2])
        return found


for _room in _ROOMS:
    import_module(f"{__name__}.{_room}").__class__ = _CallableRoom


def __getattr__(name: str) -> object:
    """Import a name of `__all__` when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

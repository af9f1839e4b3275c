"""The shape of the code: rooms import only leftward, commands start light, modules and functions stay small."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import nvquant

ROOT = Path(nvquant.__file__).parent
# In the order in which a tensor meets them; a room may import those to its left, and the modules of COMMON.
ROOMS = [
    *("format", "checkpoint", "recipe", "weights", "plan", "stream", "calibrate", "reshape", "quantizers"),
    *("convert", "serving", "verify", "distill", "report", "sweep", "bench", "publish", "api", "demo", "cli"),
]
COMMON = {"", "errors", "quoting"}
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
# Programs that run beside nvquant, and the one module that may import the second engine.
NEVER_IMPORTED = {"vllm", "modelopt"}
ONLY_IN = {"llmcompressor": "convert/second_opinion.py", "triton": "format/triton_kernels.py"}
HEAVY = ["torch", "transformers", "accelerate", "compressed_tensors", "huggingface_hub", "numpy", "pydantic", "yaml"]
Function = ast.FunctionDef | ast.AsyncFunctionDef

Fault = TypeVar("Fault", bound=Collection[object])


def faults(rule: Callable[[str], Fault]) -> dict[str, Fault]:
    """What a rule finds in each module, for all modules in which it finds something: a failure names each at once."""
    found = {module: rule(module) for module in MODULES}
    return {module: faults for module, faults in found.items() if faults}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


def imports_of(module: str) -> Iterator[str]:
    """Absolute dotted names of everything that a module imports, inside of functions too."""
    package = ["nvquant", *Path(module).parent.parts]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            # `from . import x` imports the module x; `from .. import __version__` nothing but a name.
            yield from (".".join([*parts, alias.name] if not node.module else parts) for alias in node.names)


def functions_of(module: str) -> Iterator[tuple[str, Function, bool]]:
    """(qualified name, function, whether it is public), methods included; functions in functions are not public."""

    def walk(node: ast.AST, prefix: str, public: bool) -> Iterator[tuple[str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                name = f"{prefix}{child.name}"
                is_special = child.name.startswith("__") and child.name.endswith("__")
                yield name, child, public and not child.name.startswith("_") and not is_special
                yield from walk(child, f"{name}.", False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.", public and not child.name.startswith("_"))
            else:
                yield from walk(child, prefix, public)

    yield from walk(tree_of(module), "", True)


def room_of(module: str) -> str:
    parts = Path(module).parts
    return parts[0] if len(parts) > 1 else ""


def test_every_folder_is_a_room_of_the_order() -> None:
    folders = {room_of(module) for module in MODULES} - {""}
    assert folders <= set(ROOMS)
    assert {"__init__.py", "__main__.py", "errors.py", "quoting.py"} == {
        module for module in MODULES if not room_of(module)
    }


def test_rooms_import_only_leftward() -> None:
    def allowed(module: str, name: str) -> bool:
        if module == "__main__.py":
            return name in {"__future__.annotations", "__future__", "nvquant.cli.main"}
        if module == "__init__.py":  # the library's face, which imports them when they are used
            return not name.startswith("nvquant") or name in {"nvquant.api", "nvquant.recipe.schema"}
        package, _, inside = name.partition(".")
        room, target = room_of(module), inside.partition(".")[0]
        rooms = {room, *ROOMS[: ROOMS.index(room)]} if room else set()
        return package != "nvquant" or target in COMMON | rooms or target == "__version__"

    assert faults(lambda module: [name for name in imports_of(module) if not allowed(module, name)]) == {}


def test_imports_within_the_package_are_relative() -> None:
    def absolute(module: str) -> Iterator[str]:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module or ""
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)

    assert faults(lambda module: [name for name in absolute(module) if name.split(".")[0] == "nvquant"]) == {}


def test_other_engines_are_imported_only_where_they_belong() -> None:
    def belongs(module: str, engine: str) -> bool:
        return engine not in NEVER_IMPORTED and ONLY_IN.get(engine, module) == module

    packages = {module: {name.split(".")[0] for name in imports_of(module)} for module in MODULES}
    assert faults(lambda module: [name for name in packages[module] if not belongs(module, name)]) == {}


def test_modules_have_at_most_400_lines_and_functions_60() -> None:
    def too_long(module: str) -> dict[str, int]:
        lines = len((ROOT / module).read_text(encoding="utf-8").splitlines())
        lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node, _ in functions_of(module)}
        found = {name: length for name, length in lengths.items() if length > 60}
        return found | {"the module": lines} if lines > 400 else found

    assert faults(too_long) == {}


def test_public_functions_have_a_docstring_and_all_but_kernels_a_return_annotation() -> None:
    def lacks(module: str) -> list[str]:
        found = list(functions_of(module))
        undescribed = [f"{name}: docstring" for name, node, public in found if public and not ast.get_docstring(node)]
        return undescribed + [f"{name}: return annotation" for name, node, _ in found if node.returns is None]

    assert faults(lambda module: [] if module in ONLY_IN.values() else lacks(module)) == {}


def test_modules_and_public_classes_have_a_docstring() -> None:
    def lacks(module: str) -> list[str]:
        tree = tree_of(module)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        return ["the module"] * (not ast.get_docstring(tree)) + [c.name for c in classes if not ast.get_docstring(c)]

    assert faults(lacks) == {}


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has after running `code`."""
    report = f"import sys; print('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    wrapped = f"try:\n    exec({code!r})\nexcept SystemExit:\n    pass\n{report}"
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("from nvquant.cli.main import main; main(['--help'])") == set()


def test_planning_and_recipes_need_no_torch() -> None:
    code = "import nvquant.cli.plan, nvquant.cli.recipes, nvquant.checkpoint.writer, nvquant.recipe.coverage"
    assert loaded_by(code) <= {"pydantic", "yaml"}
    assert loaded_by("from nvquant.cli.main import main; main(['recipes'])") <= {"pydantic", "yaml"}


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nvquant", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_walk_sees_what_it_should() -> None:
    assert len(MODULES) > 40
    assert set(imports_of("quantizers/mse.py")) >= {"nvquant.format.blocks", "torch", "__future__"}
    assert "nvquant.format.layouts" in set(imports_of("cli/options.py"))
    names = {name: public for name, _, public in functions_of("checkpoint/source.py")}
    assert names["Checkpoint.read"] and names["open_checkpoint"] and not names["_is_folder"]

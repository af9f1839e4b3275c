"""The shape of the code: rooms import only leftward, commands start light, modules and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nvquant
import pytest

ROOT = Path(nvquant.__file__).parent
# In the order in which a tensor meets them; a room may import those to its left, and the modules of COMMON.
ROOMS = [
    *("format", "checkpoint", "recipe", "plan", "stream", "calibrate", "quantizers"),
    *("convert", "serving", "verify", "report", "bench", "publish", "api", "demo", "cli"),
]
COMMON = {"", "errors", "quoting"}
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
# Programs that run beside nvquant, and the one module that may import the second engine.
NEVER_IMPORTED = {"vllm", "modelopt"}
ONLY_IN = {"llmcompressor": "convert/second_opinion.py", "triton": "format/triton_kernels.py"}
HEAVY = ["torch", "transformers", "accelerate", "compressed_tensors", "huggingface_hub", "numpy", "pydantic", "yaml"]
Function = ast.FunctionDef | ast.AsyncFunctionDef

modules = pytest.mark.parametrize("module", MODULES)


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


@modules
def test_rooms_import_only_leftward(module: str) -> None:
    room = room_of(module)
    if module == "__main__.py":
        assert set(imports_of(module)) <= {"__future__.annotations", "__future__", "nvquant.cli.main"}
        return
    if module == "__init__.py":  # the library's face, which imports them when they are used
        ours = {name for name in imports_of(module) if name.startswith("nvquant")}
        assert ours == {"nvquant.api", "nvquant.recipe.schema"}
        return
    allowed = COMMON | ({room, *ROOMS[: ROOMS.index(room)]} if room else set())
    for name in imports_of(module):
        if name.split(".")[0] == "nvquant":
            target = name.split(".")[1] if "." in name else ""
            assert target in allowed or target == "__version__", f"{module} imports {name}"


@modules
def test_imports_within_the_package_are_relative(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] != "nvquant"
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "nvquant" for alias in node.names)


@modules
def test_other_engines_are_imported_only_where_they_belong(module: str) -> None:
    found = {name.split(".")[0] for name in imports_of(module)}
    assert not found & NEVER_IMPORTED
    assert {name for name in found & set(ONLY_IN) if ONLY_IN[name] != module} == set()


@modules
def test_modules_have_at_most_400_lines_and_functions_60(module: str) -> None:
    assert len((ROOT / module).read_text(encoding="utf-8").splitlines()) <= 400
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node, _ in functions_of(module)}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@modules
def test_public_functions_have_a_docstring_and_all_but_kernels_a_return_annotation(module: str) -> None:
    if module in ONLY_IN.values():
        return
    found = list(functions_of(module))
    assert [name for name, node, public in found if public and not ast.get_docstring(node)] == []
    assert [name for name, node, _ in found if node.returns is None] == []


@modules
def test_modules_and_public_classes_have_a_docstring(module: str) -> None:
    tree = tree_of(module)
    assert ast.get_docstring(tree)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in classes if not ast.get_docstring(node)] == []


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

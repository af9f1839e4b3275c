"""The wheel and the source distribution that a stranger installs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.shared import made_once

ROOT = Path(__file__).parents[1]
PACKED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md")
FOLDERS = ("quantize", "calibration", "recipes", "tests")


def build(folder: Path, kind: str, path: str | None = None) -> Path:
    """Build in a copy of the project, and return the file."""
    copy = folder / "source"
    for name in PACKED:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    call = f"from setuptools.build_meta import build_{kind} as build; build({str(folder / 'made')!r})"
    environment = None if path is None else {"PATH": path}
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=copy, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "BuildBackendWarning" not in done.stderr
    (made,) = (folder / "made").iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("this machine has no C compiler")
    (made,) = (made_once(tmp_path_factory, "wheel", lambda folder: build(folder, "wheel")) / "made").iterdir()
    return made


def test_every_folder_of_the_package_is_listed_once() -> None:
    listed = re.findall(r'^    "(nvquant(?:\.\w+)*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    folders = {path.parent.relative_to(ROOT / "quantize") for path in (ROOT / "quantize").rglob("__init__.py")}
    beside = {"nvquant.calibration", "nvquant.calibration.LICENSES", "nvquant.recipes"}
    assert sorted(listed) == sorted({".".join(["nvquant", *folder.parts]) for folder in folders} | beside)


def test_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name


def test_wheel_holds_no_path_of_the_build_machine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        (kernels,) = (name for name in packed.namelist() if name.endswith(".so"))
        assert str(wheel.parents[1]).encode() not in packed.read(kernels)


def test_wheel_builds_without_a_compiler(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    made = build(tmp_path, "wheel", path=str(tmp_path / "bin"))
    with zipfile.ZipFile(made) as packed:
        names = packed.namelist()
    assert "nvquant/format/native.py" in names
    assert not any(name.endswith(".so") for name in names)


def test_sdist_holds_the_package_and_no_part_of_the_tests(tmp_path: Path) -> None:
    with tarfile.open(build(tmp_path, "sdist")) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"setup.py", "quantize/format/native.c", "recipes/nvfp4.yaml", "quantize/py.typed"} <= names
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)

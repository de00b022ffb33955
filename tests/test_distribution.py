"""What is built and installed: an sdist, a platform wheel with the kernels, a pure one without a compiler."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import luce
import luce.ops

ROOT = Path(__file__).parents[1]


def test_the_version_stands_in_one_place() -> None:
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == luce.__version__  # type: ignore[index]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other platforms have tags of their own")
@pytest.mark.parametrize(
    ("symbols", "policy"),
    [
        (b"GLIBC_2.17\0GLIBCXX_3.4.19", "manylinux_2_17"),
        (b"GLIBC_2.2.5\0GLIBC_2.32\0GLIBCXX_3.4\0GLIBCXX_3.4.29", "manylinux_2_34"),
        (b"GLIBC_2.36\0GLIBCXX_3.4.21", "manylinux_2_36"),
        (b"GLIBC_2.17", "manylinux_2_17"),
        (b"GLIBC_2.17\0GLIBCXX_3.4.99", "linux"),
    ],
)
def test_the_tag_is_that_of_the_newest_symbols(tmp_path: Path, symbols: bytes, policy: str) -> None:
    pytest.importorskip("hatchling")
    platform_tag = runpy.run_path(os.fspath(ROOT / "hatch_build.py"))["platform_tag"]
    library = tmp_path / "luce_native.so"
    library.write_bytes(symbols + b"\0")
    assert platform_tag(library).rsplit("_", 2)[0].removesuffix("_x86") == policy


def build(target: str, source: Path, folder: Path, **environment: str) -> Path:
    """Run hatchling on a source tree, and return the one file that it built."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", os.fspath(folder)]
    subprocess.run(command, cwd=source, env={**os.environ, **environment}, check=True, timeout=3600)
    (built,) = folder.iterdir()
    return built


def info(wheel: Path, folder: Path) -> dict[str, object]:
    """Install a wheel alone, and return what ``luce info`` says there."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, os.fspath(folder), os.fspath(wheel)], check=True, timeout=300)
    script = f"""
import importlib.metadata, json, luce, luce.ops
assert luce.__file__.startswith({os.fspath(folder)!r}), luce.__file__
assert importlib.metadata.version("luce") == luce.__version__
print(json.dumps(luce.ops.describe()))
"""
    there = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": os.fspath(folder)}}
    subprocess.run([sys.executable, "-m", "luce", "info"], check=True, timeout=300, **there)  # type: ignore[call-overload]
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, timeout=300, **there
    )  # type: ignore[call-overload]
    described: dict[str, object] = json.loads(done.stdout)
    return described


@pytest.mark.slow
def test_the_platform_wheel_brings_the_kernels_and_nothing_of_the_checkout(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    if luce.ops.describe()["backend"] != "cpu":
        pytest.skip(f"the kernels cannot be built here: {luce.ops.describe()['instruction_set']}")
    wheel = build("wheel", ROOT, tmp_path / "dist")
    assert re.fullmatch(
        rf"luce-{re.escape(luce.__version__)}-py3-none-(manylinux|macosx|linux)_\w+\.whl", wheel.name
    )
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (library,) = [name for name in names if name.startswith("luce/ops/lib/")]
        content = archive.read(library)
    assert {name.split("/")[0] for name in names} == {"luce", f"luce-{luce.__version__}.dist-info"}
    assert not any(name.startswith(("luce/bench", "luce/tests")) for name in names)
    assert {"luce/__init__.py", "luce/py.typed"} <= set(names)
    # One wheel serves every Python: the library binds to PyTorch's stable interface, never to Python's.
    assert not re.search(rb"\0_?Py[A-Z]\w+\0", content)
    assert b"libpython" not in content
    assert b"libtorch_python" not in content
    assert info(wheel, tmp_path / "installed")["backend"] == "cpu"


@pytest.mark.slow
def test_the_sdist_builds_a_pure_wheel_where_there_is_no_compiler(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    sdist = build("sdist", ROOT, tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"luce-{luce.__version__}"
    present = {path.name for path in source.iterdir()}
    assert {"csrc", "src", "tests", "docs", "recipes", "hatch_build.py", "LICENSE", "README.md"} <= present
    assert not (source / "src/luce/ops/lib").exists()
    assert not (source / "benchmarks/results").exists()
    assert sdist.stat().st_size < 2**21
    wheel = build("wheel", source, tmp_path / "wheel", CXX="/nonexistent/c++")
    assert wheel.name == f"luce-{luce.__version__}-py3-none-any.whl"
    described = info(wheel, tmp_path / "installed")
    assert described["backend"] == "reference"
    assert "/nonexistent/c++" in str(described["instruction_set"])

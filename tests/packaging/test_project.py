"""pyproject.toml says what the code needs, and the code imports what it says it imports."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nha_jax

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nha_jax", "pallas_kernels", "train")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def is_measuring_program(path: Path) -> bool:
    """Whether it measures the kernels, beside the operator and others' kernels."""
    package, *inside = path.relative_to(ROOT).parts
    return package == "pallas_kernels" and inside[0] in ("benchmark.py", "tune.py", "benchmarks")


def imported_packages(path: Path, everywhere: bool = True) -> set[str]:
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"__future__"}


def test_every_imported_package_is_a_declared_dependency():
    optional = PROJECT["optional-dependencies"]
    declared = {distribution(r) for r in [*PROJECT["dependencies"], *optional["hf"]]}
    declared.add("jaxlib")  # jax asks for the one of its own version
    known = importlib.metadata.packages_distributions()
    for path in SOURCES:
        # Others' kernels are measured where they are installed: imported when they are asked for.
        everywhere = not is_measuring_program(path)
        for package in imported_packages(path, everywhere) - set(PACKAGES):
            names = {name.lower().replace("_", "-") for name in known.get(package, [package])}
            assert names & declared, f"{path.relative_to(ROOT)} imports {package}: not declared"


def test_every_dependency_is_imported():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    imported = set().union(*map(imported_packages, [*SOURCES, *tests]))
    known = importlib.metadata.packages_distributions()
    used = {n.lower().replace("_", "-") for package in imported for n in known.get(package, [])}
    assert not {distribution(r) for r in PROJECT["dependencies"]} - used


# train -> nha_jax -> pallas_kernels; the kernels' measuring programs may look up at the operator.
FORBIDDEN = {
    "nha_jax": {"train"},
    "pallas_kernels": {"train", "nha_jax"},
    "train": set(),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_of_the_house_point_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = FORBIDDEN[package]
    if is_measuring_program(path):
        forbidden = forbidden - {"nha_jax"}
    assert not imported_packages(path) & forbidden


def test_the_version_is_the_same_everywhere():
    assert nha_jax.__version__ == PROJECT["version"]


def test_every_folder_with_code_is_a_package():
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} would not be in the wheel"


LIGHT = """
import sys
import nha_jax, nha_jax.inference, nha_jax.layers, nha_jax.models, nha_jax.ops
heavy = ("train", "matplotlib", "jsonargparse", "tensorboardX", "grain", "array_record", "orbax",
         "tokenizers", "tqdm", "torch", "transformers", "safetensors")
print(*(name for name in heavy if name in sys.modules))
"""


def test_importing_the_library_loads_only_what_a_model_needs():
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

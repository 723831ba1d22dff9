"""Builds the wheel, installs it into an empty environment and imports all of it there.

`make wheel`, or `python scripts/check_wheel.py` where `build` is installed. Fails when a file of
the packages is missing from the wheel, when a module does not import, or when importing what a
model needs also loads what only training, plotting, the command line or conversion needs.
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nha_jax", "pallas_kernels", "train")

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
names = []
for package in sys.argv[1:]:
    module = importlib.import_module(package)
    assert "site-packages" in module.__file__, f"{package} came from {module.__file__}"
    names.append(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        importlib.import_module(found.name)
        names.append(found.name)
print(f"imported {len(names)} modules")
"""

IMPORT_THE_LIBRARY = """
import sys
import nha_jax, nha_jax.inference, nha_jax.layers, nha_jax.models, nha_jax.ops
heavy = ("train", "matplotlib", "jsonargparse", "tensorboardX", "grain", "array_record", "orbax",
         "tokenizers", "tqdm", "torch", "transformers", "safetensors")
loaded = [name for name in heavy if name in sys.modules]
sys.exit(f"import nha_jax loads {', '.join(loaded)}" if loaded else 0)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch))
        check_contents(wheel)
        venv.create(Path(scratch, "empty"), with_pip=True)
        python = str(Path(scratch, "empty", "bin", "python"))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(*pip, str(wheel), cwd=scratch)
        # -I: neither the working directory nor PYTHONPATH can stand in for the installed wheel.
        run(python, "-I", "-c", IMPORT_EVERYTHING, *PACKAGES, cwd=scratch)
        run(python, "-I", "-c", IMPORT_THE_LIBRARY, cwd=scratch)
    print(f"{wheel.name}: complete, installs, imports")


def build_wheel(out: Path) -> Path:
    # By way of the source distribution, so that it is known to be complete as well.
    run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT), quiet=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    listing = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with zipfile.ZipFile(wheel) as archive:
        # Pages for the reader of the sources stay with the sources.
        needed = {name for name in listing.stdout.split() if not name.endswith(".md")}
        missing = needed - set(archive.namelist())
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(sorted(missing))}")


def run(*command: str, cwd: str | None = None, quiet: bool = False) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=quiet, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}failed: {' '.join(command[:4])} ...")


if __name__ == "__main__":
    main()

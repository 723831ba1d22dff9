"""`make` sets up its environment once, and says in one line what is missing when it cannot.

A stand-in for `python3` answers what the set-up asks of it and writes down each call of pip, so
nothing is installed and the network is not used.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """#!/bin/sh
log={log}
case "$*" in
  --version) echo "Python {version}.0" ;;
  *version_info\\[1\\]*) echo "{minor}" ;;
  *version_info\\[:2\\]*) echo "{version}" ;;
  *"import ensurepip, venv"*) exit {no_venv} ;;
  "-m venv --clear "*)
    mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; : > "$4/pyvenv.cfg"; echo "venv" >> $log ;;
  "-m pip --version") case "$0" in */bin/python) ;; *) exit 1 ;; esac ;;
  "-m pip install "*) for last; do :; done; echo "pip $last" >> $log; exit ${{PIP_FAILS:-0}} ;;
  *) echo "run $*" >> $log ;;
esac
"""


class Project:
    """A copy of what `make` reads, and a stand-in for python3."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "log"
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copy(ROOT / "pyproject.toml", folder)
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        self.python = self.stand_in()
        self.command("nvidia-smi", "exit 1")

    def command(self, name: str, script: str) -> None:
        path = self.python.parent / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def stand_in(self, version: str = "3.12", venv: bool = True, name: str = "python3") -> Path:
        path = self.folder / "commands" / name
        path.parent.mkdir(exist_ok=True)
        major, minor = version.split(".")
        path.write_text(
            STAND_IN.format(
                log=self.log,
                version=version,
                minor=minor if major == "3" else "",
                no_venv=0 if venv else 1,
            )
        )
        path.chmod(0o755)
        return path

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        for name in ("PYTHON", "VENV", "EXTRA", "CONFIG", "ARGS", "JAX_PLATFORMS", "MFLAGS"):
            inherited.pop(name, None)
        path = f"{self.python.parent}{os.pathsep}/usr/bin{os.pathsep}/bin"
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env=inherited | {"PATH": path, "NVIDIA_DEVICE": "/nowhere"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """What python3 was asked to do since the last question."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what is wrong; make adds its own line."""
    assert done.returncode != 0
    lines = [x for x in done.stderr.splitlines() if not x.startswith("make:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


TRAIN = "run -m train.pretrain --config configs/nano.yaml"


def test_pretrain_installs_once_without_the_development_tools(project: Project):
    done = project.make("pretrain")
    assert done.returncode == 0, done.stderr
    assert project.calls() == ["venv", "pip .", TRAIN]
    assert project.make("pretrain").returncode == 0
    assert project.calls() == [TRAIN]


def test_pyproject_newer_than_the_stamp_installs_again_into_the_same_environment(project: Project):
    project.make("pretrain")
    project.calls()
    later = time.time() + 5
    os.utime(project.folder / "pyproject.toml", (later, later))
    assert project.make("pretrain").returncode == 0
    assert project.calls() == ["pip .", TRAIN]


def test_an_extra_that_was_not_there_is_installed_and_stays(project: Project):
    project.make("pretrain")
    project.calls()
    project.make("pretrain", "EXTRA=cuda")
    assert project.calls() == ["pip .[cuda]", TRAIN]
    project.make("pretrain", "EXTRA=cuda")
    project.make("pretrain")
    assert project.calls() == [TRAIN, TRAIN]
    # The tests bring their tools and keep the CUDA plug-in in step with JAX.
    project.make("test")
    assert project.calls() == ["pip .[cuda,dev]", "run -m pytest -n 2 --dist loadfile"]


def test_an_interrupted_installation_starts_over(project: Project):
    assert project.make("pretrain", PIP_FAILS="1").returncode != 0
    assert project.calls() == ["venv", "pip ."]
    assert project.make("pretrain").returncode == 0
    assert project.calls() == ["pip .", TRAIN]
    # A later one that fails must not leave the stamps of the first.
    assert project.make("test", PIP_FAILS="1").returncode != 0
    project.calls()
    project.make("pretrain")
    assert project.calls() == ["pip .", TRAIN]


def test_an_environment_left_without_pip_is_made_again(project: Project):
    (project.folder / ".venv").mkdir()
    (project.folder / ".venv" / "pyvenv.cfg").touch()
    assert project.make("pretrain").returncode == 0
    assert project.calls() == ["venv", "pip .", TRAIN]


def test_a_folder_that_is_no_environment_is_left_alone(project: Project):
    (project.folder / "mine").mkdir()
    precious = project.folder / "mine" / "precious"
    precious.touch()
    assert "mine is there and is no virtual environment" in the_error(
        project.make("pretrain", "VENV=mine")
    )
    assert project.make("clean", "VENV=mine").returncode == 0
    assert precious.exists()


def test_config_and_further_arguments_reach_the_training(project: Project):
    project.make("pretrain", "CONFIG=configs/other.yaml", "ARGS=--steps 5 --resume never")
    assert project.calls()[-1] == (
        "run -m train.pretrain --config configs/other.yaml --steps 5 --resume never"
    )


def test_lint_checks_style_format_and_types(project: Project):
    assert project.make("lint").returncode == 0
    calls = project.calls()
    assert calls[:2] == ["venv", "pip .[dev]"]
    assert calls[2:] == ["run -m ruff check .", "run -m ruff format --check .", "run -m mypy"]


def test_test_all_takes_the_marks_off(project: Project):
    project.make("test-all")
    assert project.calls()[-1] == "run -m pytest -n 2 --dist loadfile -m "


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10", "3.15"])
def test_python_out_of_range_says_what_to_install(project: Project, version: str):
    project.stand_in(version)
    error = the_error(project.make("pretrain", "PYTHON=python3"))
    assert f"python3 is Python {version}.0, Python 3.11 to 3.14 is needed" in error
    assert "PYTHON=python3.1" in error


def test_another_python_in_range_is_named(project: Project):
    project.stand_in("3.9")
    project.stand_in("3.14", name="python3.14")
    error = the_error(project.make("test"))
    assert "there is a python3.14: make PYTHON=python3.14" in error


def test_no_python_at_all_says_what_to_install(project: Project):
    error = the_error(project.make("test", "PYTHON=python3.nowhere"))
    assert "no python3.nowhere here, Python 3.11 to 3.14 is needed" in error


def test_no_venv_module_says_what_to_install(project: Project):
    project.stand_in("3.12", venv=False)
    error = the_error(project.make("pretrain"))
    assert error.startswith("error: python3 has no venv module: install it")
    assert "apt install python3.12-venv" in error
    assert not (project.folder / ".venv").exists()


def test_another_python_than_the_one_of_the_environment_is_refused(project: Project):
    project.make("pretrain")
    project.stand_in("3.13", name="python3.13")
    error = the_error(project.make("pretrain", "PYTHON=python3.13"))
    assert ".venv has Python 3.12, PYTHON=python3.13 is 3.13" in error
    assert project.make("pretrain", "PYTHON=python3.13", "VENV=.venv3.13").returncode == 0


def test_an_unknown_extra_is_refused(project: Project):
    error = the_error(project.make("pretrain", "EXTRA=cud"))
    assert error.startswith("error: EXTRA=cud: no such extra, there are: cuda hf dev")


LOUD = "AN NVIDIA GPU IS HERE"


def test_a_gpu_without_the_extra_is_said_loudly(project: Project):
    assert LOUD not in project.make("pretrain").stderr
    gpu = {"NVIDIA_DEVICE": str(project.log)}
    project.log.touch()
    assert LOUD in project.make("pretrain", **gpu).stderr
    assert LOUD not in project.make("pretrain", JAX_PLATFORMS="cpu", **gpu).stderr
    plugin = project.folder / ".venv/lib/python3.12/site-packages/jax_cuda13_plugin"
    plugin.mkdir(parents=True)
    assert LOUD not in project.make("pretrain", **gpu).stderr


def test_nvidia_smi_alone_shows_a_gpu(project: Project):
    project.command("nvidia-smi", "echo 'GPU 0: a GPU'")
    assert LOUD in project.make("pretrain").stderr


def test_clean_removes_the_environment_and_keeps_the_runs(project: Project):
    project.make("pretrain")
    for kept in ("runs", "data"):
        (project.folder / kept).mkdir()
    assert project.make("clean").returncode == 0
    assert not (project.folder / ".venv").exists()
    assert (project.folder / "runs").is_dir() and (project.folder / "data").is_dir()

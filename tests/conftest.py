"""What every test runs under: devices, annotation checks, float64, Hypothesis, marks.

* CPU with eight simulated devices, unless the run asks for the GPU with `-m gpu`. A test that wants
  one device uses `jax.devices()[:1]`, a test of sharding has up to eight at hand. Processes that a
  test starts inherit the platform, not the eight devices.
* The jaxtyping annotations of our packages are checked at every call (beartype); so nothing here
  may import them before the hook is in place.
* float64 is switched on per test, by the fixture `x64`: the rest runs under what a user has.
* On the CPU, XLA leaves out what makes compiling slow, which is most of what the suite does;
  processes that a test starts inherit it. With the wide sweeps, programs are compiled as users
  compile them; the quick suite does that for some golden files.
* No persistent compilation cache: JAX writes its entries in place, and some tests kill processes.
  For quick repeats of a few tests, `JAX_COMPILATION_CACHE_DIR=.jax_cache pytest ...` is enough.
"""

import os
import re

import hypothesis
import jax
import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

install_import_hook(["nha_jax", "pallas_kernels", "train"], "beartype.beartype")

SIMULATED_DEVICES = 8
# Without LLVM's optimisations; and without the MLIR emitters of fused loops, which take most of the
# time (from 0.11 on there is nothing else).
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"


def _gpu_asked_for(config: pytest.Config) -> bool:
    marks = config.getoption("markexpr")
    return bool(re.search(r"\bgpu\b", marks)) and not re.search(r"\bnot\s+gpu\b", marks)


def _wide_asked_for(config: pytest.Config) -> bool:
    marks = config.getoption("markexpr")
    return not re.search(r"\bnot\s+wide\b", marks)


def pytest_configure(config: pytest.Config) -> None:
    if _gpu_asked_for(config):
        # Several test processes share the GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if not _wide_asked_for(config) and QUICK_COMPILATION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK_COMPILATION}".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not any("gpu" in item.keywords for item in items):
        return
    if not _gpu_asked_for(config):
        reason = "runs on a GPU with `-m gpu`"
    elif jax.default_backend() != "gpu":
        reason = f"needs a GPU that JAX sees; JAX runs on {jax.default_backend()}"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def x64():
    """float64 and int64 in this test alone."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_annotations():
    """Calls reach our own checks of arguments, as those of a user do."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


# A new shape is a new compilation, so a draw may take seconds the first time: no deadline. In CI
# the draws are the same every time, so that a failure there is a failure everywhere.
_HEALTH = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile(
    "local", deadline=None, max_examples=25, suppress_health_check=_HEALTH
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

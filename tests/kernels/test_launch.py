"""The one launcher of kernels: places in its grid, what it tells the compiler, its warning."""

import os
import re
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.launch import launch


def launch_grid(kernel, grid, shape, interpret=True, num_warps=4, num_stages=1):
    return launch(
        kernel,
        name="test",
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        num_warps=num_warps,
        num_stages=num_stages,
        interpret=interpret,
    )


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4)])
def test_every_place_of_the_grid_has_one_program(grid) -> None:
    def kernel(place, start, out):
        assert len(place) == len(grid)
        out[place] = start[0] + sum(10**axis * i for axis, i in enumerate(place))

    places = np.indices(grid)
    expected = 7 + sum(10**axis * i for axis, i in enumerate(places))
    result = launch_grid(kernel, grid, grid)(jnp.array([7], jnp.int32))
    chex.assert_trees_all_equal(np.asarray(result), expected.astype(np.int32))


def test_too_many_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 2,147,483,647 in all"):
        launch_grid(lambda *refs: None, (2**16, 2**15, 1), (1,))


@pytest.mark.parametrize(("num_warps", "num_stages"), [(4, 1), (8, 3), (2, 2)])
def test_the_compiler_is_told_warps_and_stages(num_warps, num_stages) -> None:
    def kernel(place, start, out):
        out[place] = start[0]

    call = launch_grid(kernel, (1,), (1,), False, num_warps, num_stages)
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        traced = jax.jit(call).trace(jax.ShapeDtypeStruct((1,), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"num_(?:stages|warps) = \d+", text) == [
        f"num_stages = {num_stages}",
        f"num_warps = {num_warps}",
    ]


# Prints how many warnings reach a user, then how many JAX gives without the package's filter.
LOWERED = """
    import warnings

    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractDevice, AbstractMesh

    from pallas_kernels.launch import launch

    def count():
        def kernel(place, x, out):
            out[0] = x[0]

        call = launch(
            kernel, name="test", grid=(1,), out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
            num_warps=4, num_stages=1, interpret=False,
        )
        gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
            with warnings.catch_warnings(record=True) as seen:
                if not filtered:
                    warnings.simplefilter("always")
                traced = jax.jit(call).trace(jax.ShapeDtypeStruct((1,), jnp.int32))
                traced.lower(lowering_platforms=("cuda",))
        return sum("Triton" in str(warning.message) for warning in seen)

    for filtered in (True, False):
        print(count())
"""


def test_the_lowerings_deprecation_is_not_shown() -> None:
    """In a process of its own: pytest replaces the filters of this one."""
    command = [sys.executable, "-W", "always", "-c", textwrap.dedent(LOWERED)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, given = map(int, done.stdout.split())
    if not given:
        pytest.skip(f"JAX {jax.__version__} does not deprecate it")
    assert not shown

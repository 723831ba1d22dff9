"""The one launcher of kernels: places in its grid."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.launch import launch


def launch_grid(kernel, grid, shape, interpret=True):
    return launch(
        kernel,
        name="test",
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        num_warps=4,
        num_stages=1,
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

"""The one place that calls `pallas_call`: backend, compiler parameters, aliases."""

import warnings
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    input_output_aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """A `pallas_call` without block specifications: kernels index whole arrays themselves."""
    call = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
        input_output_aliases=input_output_aliases or {},
    )

    def run(*operands: Any) -> Any:
        with warnings.catch_warnings():
            # JAX >= 0.11 deprecates the Triton backend; the package's upper bound on JAX holds.
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*[Tt]riton.*")
            return call(*operands)

    return run

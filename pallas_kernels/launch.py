"""The one place that launches kernels: compiler parameters, interpretation, platform, warning."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir

# JAX 0.11 and newer deprecate this lowering in favour of Mosaic GPU's, with a warning whenever a
# kernel is lowered (when a caller's jit compiles: a filter around the call would come too early).
# It works in every version that the package admits (jax<0.13), and users can do nothing about it.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)


# Of one launch in CUDA. Pallas itself lays long second and third axes out on the first.
_MAX_PROGRAMS = 2**31 - 1


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
    """`pl.pallas_call` through the Triton lowering, every ref whole and in device memory.

    Args:
      kernel: takes its place in the grid, a tuple; then the refs of the inputs in their pytrees;
        then those of the outputs in one.
      name: of the kernel, as a profiler shows it.
      grid: programs on each of up to three axes; the first one varies fastest.
      out_shape: a pytree of `jax.ShapeDtypeStruct`.
      num_warps: of 32 threads, per program.
      num_stages: of the software pipeline in loops.
      interpret: run it as JAX operations, on any device.
      input_output_aliases: from the flat index of an input to that of the output that replaces it.

    Returns:
      A function from the inputs to the outputs.

    Raises:
      ValueError: a grid of more programs than a launch can have.
    """
    programs = math.prod(grid)
    if programs > _MAX_PROGRAMS:
        raise ValueError(
            f"{name}: a grid of {grid} programs, expected at most {_MAX_PROGRAMS:,} in all: split "
            "the batch, or the sequence with a cache"
        )
    shapes, out_tree = jax.tree.flatten(out_shape)

    def run(*args: Any) -> Any:
        arrays, tree = jax.tree.flatten(args)
        if not interpret:
            arrays[-1] = _on_cuda_p.bind(arrays[-1])

        def body(*refs):
            inputs = jax.tree.unflatten(tree, refs[: len(arrays)])
            place = tuple(pl.program_id(axis) for axis in range(len(grid)))
            kernel(place, *inputs, jax.tree.unflatten(out_tree, refs[len(arrays) :]))

        results = pl.pallas_call(
            body,
            name=name,
            grid=grid,
            out_shape=shapes,
            # Never left out: without it the choice between this lowering and Mosaic GPU's depends
            # on the version of JAX.
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=interpret,
            input_output_aliases=input_output_aliases or {},
        )(*arrays)
        return jax.tree.unflatten(out_tree, results)

    return run


def _on_cuda_lowering(ctx, x):
    return [x]


def _elsewhere_lowering(ctx, x):
    platform = (ctx.platforms or ctx.module_context.platforms)[0]
    raise NotImplementedError(
        "implementation='pallas_triton' runs on NVIDIA GPUs, and this program is compiled for "
        f"{platform}: use implementation='xla' there ('pallas_triton_interpret' in tests)"
    )


# The identity, which can only be lowered for CUDA: Pallas's own message for other platforms names
# none of this package's options.
_on_cuda_p = Primitive("nha_on_cuda")
_on_cuda_p.def_abstract_eval(lambda x: x)
_on_cuda_p.def_impl(jax.jit(_on_cuda_p.bind))  # outside of jit, too
mlir.register_lowering(_on_cuda_p, _elsewhere_lowering)
mlir.register_lowering(_on_cuda_p, _on_cuda_lowering, platform="cuda")

"""Others' kernels at the same shapes, measured in the same way and the same run.

They compute other things than the operator: the rows say what the same tokens cost elsewhere.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nha_jax.ops import rotate
from pallas_kernels.benchmarks.attribution import Timing
from pallas_kernels.benchmarks.cases import Case
from pallas_kernels.benchmarks.inputs import Inputs, draw_inputs, rotating, with_gradients
from pallas_kernels.benchmarks.timing import measure

# Compiling and tuning its kernels is most of what the PyTorch process does.
_TORCH_TIMEOUT_S = 900


class NotInstalled(RuntimeError):
    """The peer's package is missing."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Someone else's kernel.

    Attributes:
      description: what it computes.
      package: the module it needs beyond JAX; None: nothing.
      measure: (case, backward, runs, timer, bytes of the L2) -> Timing.
    """

    description: str
    package: str | None
    measure: Callable[[Case, bool, int, str, int], Timing]


def measure_peer(
    name: str, case: Case, *, backward: bool, runs: int, timer: str, l2_bytes: int
) -> Timing:
    """Times a peer at a case's shape.

    Raises:
      NotInstalled: its package is missing.
      Exception: whatever the peer raises where it does not run.
    """
    peer = PEERS[name]
    if peer.package is not None and importlib.util.find_spec(peer.package) is None:
        raise NotInstalled(f"no module {peer.package!r}")
    return peer.measure(case, backward, runs, timer, l2_bytes)


def _jax_peer(
    forward: Callable[..., jax.Array],
    differentiated: Callable[[Inputs], tuple[jax.Array, ...]],
    draw: Callable[[Case, int], Inputs] = draw_inputs,
) -> Callable[[Case, bool, int, str, int], Timing]:
    """A peer that JAX runs; `forward` takes the case, the differentiated arrays, the inputs."""

    def measured(case: Case, backward: bool, runs: int, timer: str, l2_bytes: int) -> Timing:
        def draw_one(seed: int) -> Inputs:
            inputs = draw(case, seed)
            return inputs if backward else dataclasses.replace(inputs, cotangent=None)

        def of_case(*arguments):
            return forward(case, *arguments)

        function = with_gradients(of_case, differentiated, backward)
        program, sets = rotating(function, draw_one, l2_bytes)
        return measure(program, runs=runs, timer=timer, warm_up=max(3, sets))

    return measured


def _qkv(inputs: Inputs) -> tuple[jax.Array, ...]:
    return inputs.q, inputs.k, inputs.v


def _without_gates(case: Case, seed: int) -> Inputs:
    """Attention reads no gates: among the rotating buffers they would only be ballast."""
    return draw_inputs(dataclasses.replace(case, num_slots=0, documents=1), seed)


def _cudnn(windowed: bool, rope: bool) -> Callable[[Case, bool, int, str, int], Timing]:
    def forward(case: Case, q, k, v, inputs: Inputs) -> jax.Array:
        if rope:
            q, k = rotate(q, inputs.rope), rotate(k, inputs.rope)
        # W tokens, the current one included: W - 1 to the left. Without is_causal the window would
        # reach into the future.
        window = (case.static_window - 1, 0) if windowed else None
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation="cudnn"
        )

    return _jax_peer(forward, _qkv, _without_gates)


def _draw_gla(case: Case, seed: int) -> Inputs:
    """GLA has as many key/value heads as query heads, and a gate for each key channel."""
    heads, size = case.num_heads, case.head_size
    return draw_inputs(
        dataclasses.replace(case, num_kv_heads=heads, num_slots=size, documents=1, rope=False), seed
    )


def _gla(case: Case, q, k, v, gates, inputs: Inputs) -> jax.Array:
    from jla.ops import linear_attention

    # By name: the automatic choice would fall back to plain JAX without a word.
    out, _ = linear_attention("gla", q, k, v, g=gates, impl="mosaic_gpu")
    return out.astype(jnp.bfloat16)


def _qkv_gates(inputs: Inputs) -> tuple[jax.Array, ...]:
    return inputs.q, inputs.k, inputs.v, inputs.log_decay


def _torch_gsa(case: Case, backward: bool, runs: int, timer: str, l2_bytes: int) -> Timing:
    """In a process of its own: two frameworks' profilers do not share one."""
    request = {
        "batch": case.batch,
        "length": case.length,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_size": case.head_size,
        "num_slots": case.num_slots,
        "backward": backward,
        "runs": runs,
        "timer": timer,
        "l2_bytes": l2_bytes,
    }
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.benchmarks.peer_torch", json.dumps(request)],
        capture_output=True,
        text=True,
        timeout=_TORCH_TIMEOUT_S,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return Timing.from_json(json.loads(done.stdout.strip().splitlines()[-1]))


PEERS: dict[str, Peer] = {
    "cudnn_causal": Peer("cuDNN causal attention", None, _cudnn(False, False)),
    "cudnn_causal_rope": Peer("XLA's rotation, then cuDNN causal", None, _cudnn(False, True)),
    "cudnn_window": Peer("cuDNN attention in a window of W tokens", None, _cudnn(True, False)),
    "cudnn_window_rope": Peer("XLA's rotation, then cuDNN windowed", None, _cudnn(True, True)),
    "fla_gsa": Peer("flash-linear-attention's gated slot attention", "fla", _torch_gsa),
    "jla_gla": Peer(
        "jax-linear-attention's gated linear attention",
        "jla",
        _jax_peer(_gla, _qkv_gates, _draw_gla),
    ),
}

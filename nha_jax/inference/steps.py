"""The two compiled programs of generation: read a piece of the prompts, decode a block of tokens.

Both take a state whose buffers are donated and return the next one. Rows that are finished, or have
no token in a piece, see padding (document id 0), which leaves their cache unchanged bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nha_jax.inference.layout import Layout
from nha_jax.inference.sampling import SamplingConfig, choose_tokens, log_probabilities
from nha_jax.inference.state import GenerationState

NOTHING = -1  # in a block's tokens: the row was finished before

# Any id but 0; the same in every call, so that each call continues the row's one document.
_DOCUMENT = 1


class Block(NamedTuple):
    """What one call of `decode_block` made.

    Attributes:
      state: after each row's last emitted token.
      tokens: [n,B] int32, `NOTHING` where a row emitted none.
      log_probs: of these tokens, [n,B] float32, in nats.
      remaining: tokens that each row may still emit, [B] int32; 0: the row is finished.
      stopped: rows whose last token was a stop token, [B] bool.
    """

    state: Any
    tokens: Any
    log_probs: Any
    remaining: Any
    stopped: Any


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def read_piece(
    graph: Any,
    layout: Layout | None,
    parameters: Any,
    state: GenerationState,
    tokens: jax.Array,
    valid: jax.Array | None,
) -> GenerationState:
    """Reads one piece of the prompts.

    Args:
      graph: of the model (static).
      layout: of the state, where the model is on a mesh (static).
      parameters: of the model.
      state: donated.
      tokens: [B,T] int32, each row's own in front of its padding.
      valid: [B,T] bool, false on padding; None: there is none.

    Returns:
      The state after each row's last valid token.
    """
    read: Callable[..., GenerationState] = functools.partial(_read, graph, layout)
    if layout is not None:
        read = layout.automatic(read, layout.state)
    return read(parameters, state, tokens, valid)


def _read(
    graph: Any,
    layout: Layout | None,
    parameters: Any,
    state: GenerationState,
    tokens: jax.Array,
    valid: jax.Array | None,
) -> GenerationState:
    model = nnx.merge(graph, parameters)
    # Without padding no document ids are needed, and without those more kernels serve.
    segment_ids = None if valid is None else jnp.where(valid, _DOCUMENT, 0)
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    hidden_BTD, cache = model.hidden_states(
        jnp.where(valid, tokens, 0),
        segment_ids=segment_ids,
        cache=state.cache.within(_DOCUMENT) if segment_ids is None else state.cache,
        return_cache=True,
    )
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    last_B = jnp.max(jnp.where(valid, index, -1), axis=1)
    # Only the last token's logits are wanted: [B,P], never [B,T,P].
    last_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(last_B, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.where((last_B >= 0)[:, None], model.readout(last_BD), state.logits)
    rows = jnp.arange(tokens.shape[0])[:, None]
    counts = state.counts.at[rows, jnp.where(valid, tokens, 0)].add(valid.astype(jnp.int32))
    # A row's tokens are in front of its padding.
    last = jnp.sum(valid, axis=1)[:, None] + jnp.arange(state.recent.shape[1])
    recent = jnp.take_along_axis(jnp.concatenate([state.recent, tokens], axis=1), last, axis=1)
    read = dict(cache=cache, logits=logits, counts=counts, recent=recent)
    return _placed(layout, dataclasses.replace(state, **read))


def _placed(layout: Layout | None, state: GenerationState) -> GenerationState:
    # Left to the compiler, a state could come back cut in another way than it went in: then its
    # buffers cannot be reused, and the next call is another program.
    return state if layout is None else layout.constrain(state, layout.state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def decode_block(
    graph: Any,
    layout: Layout | None,
    length: int,
    sampling: SamplingConfig,
    parameters: Any,
    state: GenerationState,
    remaining: jax.Array,
    stop_tokens: jax.Array,
) -> Block:
    """Emits up to `length` tokens a row without asking the host.

    Args:
      graph: of the model (static).
      layout: of the state, where the model is on a mesh (static).
      length: n (static).
      sampling: how tokens are chosen (static).
      parameters: of the model.
      state: donated.
      remaining: tokens that each row may still emit, [B] int32.
      stop_tokens: ids that finish a row, [S] int32.

    Returns:
      The block. Each emitted token, a stop token included, was read by the model. The loop ends
      early when all rows are finished.
    """
    decode: Callable[..., Block] = functools.partial(_decode, graph, layout, length, sampling)
    if layout is not None:
        decode = layout.automatic(decode, Block(layout.state, *[layout.replicated] * 4))
    return decode(parameters, state, remaining, stop_tokens)


def _decode(
    graph: Any,
    layout: Layout | None,
    length: int,
    sampling: SamplingConfig,
    parameters: Any,
    state: GenerationState,
    remaining: jax.Array,
    stop_tokens: jax.Array,
) -> Block:
    model = nnx.merge(graph, parameters)
    batch = state.logits.shape[0]
    rows = jnp.arange(batch)

    def unfinished(carry: tuple[jax.Array, Block]) -> jax.Array:
        step, block = carry
        return (step < length) & jnp.any(block.remaining > 0)

    def emit(carry: tuple[jax.Array, Block]) -> tuple[jax.Array, Block]:
        step, block = carry
        state, active = block.state, block.remaining > 0
        chosen = choose_tokens(state.logits, state.counts, state.keys, state.position, sampling)
        log_probs = jnp.where(active, log_probabilities(state.logits, chosen), 0)
        logits, cache = model(
            jnp.where(active, chosen, 0)[:, None],
            segment_ids=jnp.where(active, _DOCUMENT, 0)[:, None],
            cache=state.cache,
            return_cache=True,
        )
        followed = jnp.concatenate([state.recent[:, 1:], chosen[:, None]], axis=1)
        stopped = active & jnp.any(chosen[:, None] == stop_tokens[None], axis=1)
        state = dataclasses.replace(
            state,
            cache=cache,
            logits=jnp.where(active[:, None], logits[:, 0], state.logits),
            counts=state.counts.at[rows, chosen].add(active.astype(jnp.int32)),
            recent=jnp.where(active[:, None], followed, state.recent),
        )
        state = _placed(layout, state)
        return step + 1, Block(
            state=state,
            tokens=block.tokens.at[step].set(jnp.where(active, chosen, NOTHING)),
            log_probs=block.log_probs.at[step].set(log_probs),
            remaining=jnp.where(active & ~stopped, block.remaining - 1, 0),
            stopped=block.stopped | stopped,
        )

    first = Block(
        state=state,
        tokens=jnp.full((length, batch), NOTHING, jnp.int32),
        log_probs=jnp.zeros((length, batch), jnp.float32),
        remaining=remaining,
        stopped=jnp.zeros((batch,), bool),
    )
    block = lax.while_loop(unfinished, emit, (jnp.zeros((), jnp.int32), first))[1]
    if layout is None:
        return block
    seen = layout.constrain(tuple(block[1:]), layout.replicated)
    return Block(_placed(layout, block.state), *seen)

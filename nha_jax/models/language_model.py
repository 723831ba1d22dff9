"""A decoder language model of Native Hybrid Attention layers and their baselines."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nha_jax.layers.attention import NativeHybridAttention
from nha_jax.layers.block import Block
from nha_jax.layers.checks import Window, check_array, check_cache_rows, check_documents
from nha_jax.layers.fusion import WeightedSumFusion
from nha_jax.layers.norm import RMSNorm
from nha_jax.layers.parameters import normal_parameter, small_init_stddev
from nha_jax.layers.positions import document_positions
from nha_jax.layers.rotary import rotary_tables
from nha_jax.models.cache import ModelCache, outreaches
from nha_jax.models.config import LayerKind, ModelConfig
from nha_jax.models.layer import Shared
from nha_jax.models.stack import run_layers, stack_counts
from nha_jax.models.unstacked import unstack_blocks


class LanguageModel(nnx.Module):
    """Token embeddings, L pre-norm blocks, a final norm and a readout.

    The parameters of all layers of one kind are stacked along a leading axis (logical name
    "layers"): `embedding [P,D]`, `blocks.<kind>.…  [layers of that kind, …]`, `final_norm.scale`
    and, if the embeddings are not tied, `unembedding [D,P]`. Neither the tree nor the initial
    values depend on the windows: any checkpoint loads under any windows. `unstack` gives each layer
    its own arrays instead.

    Args:
      config: what to build.
      rngs: of which the `params` stream is used.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        param_dtype = jnp.dtype(config.param_dtype)
        stddev = small_init_stddev(config.width)
        self.embedding = normal_parameter(
            rngs, (config.vocab_size, config.width), stddev, param_dtype, ("vocab", "embed")
        )
        key = rngs.params()
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(config.num_layers))
        kinds = [layer.kind for layer in config.layers()]
        self.blocks = nnx.Dict(
            {
                kind: _stacked_blocks(
                    config, kind, keys[jnp.asarray([i for i, k in enumerate(kinds) if k == kind])]
                )
                for kind in config.kinds
            }
        )
        self.final_norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.unembedding = (
            None
            if config.tie_embeddings
            else normal_parameter(
                rngs, (config.width, config.vocab_size), stddev, param_dtype, ("embed", "vocab")
            )
        )

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Any:
        """Logits of the next token.

        Args:
          tokens: token ids.
          **options: those of `hidden_states`.

        Returns:
          float32 logits `[B,T,P]`, or `(logits[, slot mass][, cache])` in this order.

        Raises:
          ValueError, NotImplementedError: as `hidden_states`.
        """
        outputs = self.hidden_states(tokens, **options)
        if isinstance(outputs, tuple):
            return (self.readout(outputs[0]), *outputs[1:])
        return self.readout(outputs)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "b T"] | None = None,
        windows: tuple[Window, ...] | None = None,
        cache: ModelCache | None = None,
        return_cache: bool = False,
        return_slot_mass: bool = False,
    ) -> Any:
        """The residual stream after the final norm; `readout` makes it logits.

        Args:
          tokens: token ids in `[0, P)`.
          segment_ids: document ids; 0 is padding, any change of id starts a document. None: one
            document.
          positions: for the rotation, batch axis 1 or B; None: position within the document,
            continuing the cache's.
          windows: instead of the config's, repeated to the depth; None: the cache's, else the
            config's.
          cache: the state to start from.
          return_cache: also return the state after the last token. Without `cache` the state starts
            empty, with room for these T tokens in layers that read the whole document.
          return_slot_mass: also return the probability that went to the slots, per layer.

        Returns:
          `[B,T,D]` in the compute dtype, or `(hidden[, slot mass][, cache])` in this order; slot
          mass is `[L,B,T]` float32, the mean over heads, 0 on padding.

        Raises:
          ValueError: a bad argument, by name.
          NotImplementedError: the named implementation cannot serve the call, with the reasons.
        """
        config = self.config
        check_array("tokens", tokens, jnp.integer, [(None, None)], "[B,T]")
        batch, length = tokens.shape
        check_documents(batch, length, segment_ids, positions)
        _check_cache(cache, batch)
        parameters = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        _check_axes({"tokens": tokens, "segment_ids": segment_ids, "cache": cache, **parameters})
        if windows is None and cache is not None:
            windows = cache.windows
        layers = config.layers(windows)
        if cache is not None and cache.windows != tuple(layer.window for layer in layers):
            raise ValueError(f"windows={windows}: expected those of the cache, {cache.windows}")
        if return_cache and cache is None:
            cache = self.init_cache(batch, max_length=length, windows=windows).as_new()
        if positions is None:
            state = (None, None) if cache is None else (cache.segment_id, cache.segment_length)
            positions = document_positions(length, segment_ids, *state)
            _check_room(cache, positions, segment_ids)
        rope = None
        if config.rope_theta is not None:
            rope = rotary_tables(positions, config.key_size, config.rope_theta, config.rope_scaling)

        x = self.embedding[...].astype(config.compute_dtype)[tokens]
        x, slot_mass, stacks = run_layers(
            self.kinds(),
            layers,
            x,
            Shared(rope, segment_ids, return_slot_mass),
            None if cache is None else cache.stacks,
            config.remat,
        )
        hidden = self.final_norm(x)
        results: list[Any] = [hidden]
        if return_slot_mass:
            results.append(slot_mass)
        if return_cache and cache is not None and stacks is not None:
            results.append(ModelCache(stacks, cache.windows, cache.max_length))
        return tuple(results) if len(results) > 1 else hidden

    def kinds(self) -> dict[LayerKind, Block | Sequence[Block]]:
        """The blocks of each layer kind, stacked or not, in order of first appearance."""
        return {kind: self.blocks[kind] for kind in self.config.kinds}

    def unstack(self) -> "LanguageModel":
        """Gives every layer arrays of its own, in place: for inference, the faster form.

        A decoded token then reads each weight once; from stacks, XLA on GPUs copies each layer's
        weights first. Compiling takes as much longer as the model has layers. The tree becomes
        `blocks.<kind>.<number>.…`, which checkpoints of training do not know. The memory of the
        stacks is free again unless something else holds them; one stack at a time is in memory
        twice. Twice is once.

        What was made from the stacked model no longer fits it: graph definitions, states and
        optimizers are those of another tree, and a stacked `Block` that is held elsewhere has lost
        its parameters.

        Returns:
          The model itself.

        Raises:
          ValueError: a parameter that cannot be split, by name, as those of an abstract model.
            Then, and when memory runs out or on Ctrl-C, the model is stacked as before.
        """
        stacked = {kind: block for kind, block in self.kinds().items() if isinstance(block, Block)}
        for kind, layers in unstack_blocks(stacked, self.config.layers()).items():
            self.blocks[kind] = layers
        return self

    def readout(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch P"]:
        """Float32 logits of hidden states; any leading axes, so that a loss can go in chunks."""
        dtype = self.config.compute_dtype
        kernel = self.embedding[...].T if self.unembedding is None else self.unembedding[...]
        return jnp.matmul(
            hidden.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32
        )

    def init_cache(
        self,
        batch: int,
        *,
        max_length: int,
        windows: tuple[Window, ...] | None = None,
        bounded: bool = False,
    ) -> ModelCache:
        """An empty cache.

        Args:
          batch: rows B.
          max_length: the longest document in tokens, if a layer reads all of it; no other layer
            then keeps more. Where no layer does, text of any length fits.
          windows: of the calls to come; None: the config's.
          bounded: whether `max_length` bounds windows that are longer like "full" ones.

        Raises:
          ValueError: a bad argument, by name.
        """
        layers = self.config.layers(windows)
        pattern = tuple(layer.window for layer in layers)
        bounded = "full" in pattern or (bounded and outreaches(pattern, max_length))
        stacks = []
        for spec, count in stack_counts(layers).items():
            block = self.blocks[spec.kind]
            attention = (block if isinstance(block, Block) else block[0]).attention
            one = attention.init_cache(
                batch, max_length=max_length, window=spec.window, bounded=bounded
            )
            stacks.append(jax.tree.map(lambda leaf, n=count: jnp.repeat(leaf[None], n, 0), one))
        return ModelCache(tuple(stacks), pattern, max_length if bounded else None)


def make_attention(config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs) -> NativeHybridAttention:
    """The attention layer of one kind, with the config's options."""
    cls = WeightedSumFusion if kind == "fusion" else NativeHybridAttention
    return cls(
        config.width,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        num_slots=0 if kind in ("full", "swa") else config.num_slots,
        window=next(layer.window for layer in config.layers() if layer.kind == kind),
        slot_lag=config.slot_lag if kind == "nha" else None,
        empty_slots=config.empty_slots,
        gate_normalizer=config.gate_normalizer,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        silu_values=config.silu_values,
        slot_feature_map=config.slot_feature_map,
        output_norm=config.output_norm,
        norm_eps=config.norm_eps,
        scale=config.attention_scale,
        depth=config.num_layers,
        implementation=config.implementation,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _make_block(config: ModelConfig, kind: LayerKind, key: jax.Array) -> Block:
    return Block(
        lambda rngs: make_attention(config, kind, rngs),
        config.width,
        config.mlp_width,
        depth=config.num_layers,
        norm_eps=config.norm_eps,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        rngs=nnx.Rngs(params=key),
    )


def _stacked_blocks(config: ModelConfig, kind: LayerKind, keys: jax.Array) -> Block:
    """One block whose parameters have a leading axis of layers, each drawn from its own key."""

    def draw(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(_make_block(config, kind, key), nnx.Param))

    values = jax.vmap(draw)(keys)
    block = nnx.eval_shape(lambda: _make_block(config, kind, jax.random.key(0)))
    nnx.update(block, values)
    for _, parameter in nnx.iter_graph(block):
        if isinstance(parameter, nnx.Param):
            names = parameter.get_metadata("logical_axes")
            parameter.set_metadata(logical_axes=("layers", *names))
    return block


def _check_cache(cache: Any, batch: int) -> None:
    if cache is None:
        return
    if not isinstance(cache, ModelCache):
        raise ValueError(
            f"cache is a {type(cache).__name__}: expected one made by init_cache of this model"
        )
    check_cache_rows(cache.length.shape[0], batch)


def _check_axes(arrays: dict[str, Any]) -> None:
    """Raises where an array is cut over axes of which JAX wants every operation to speak."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        # The type of an array tells of such axes only, also under jit.
        spec = jax.typeof(leaf).sharding.spec
        if any(axis is not None for axis in spec):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{name} is cut by {spec} over mesh axes of type Explicit: a LanguageModel runs "
                f"under axes of type Auto; make the mesh with "
                f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes), "
                f"or call the model in a function of jax.sharding.auto_axes"
            )


def _check_room(
    cache: ModelCache | None, positions: jax.Array, segment_ids: jax.Array | None
) -> None:
    """Raises where concrete lengths show that a bounded layer would lose tokens."""
    if cache is None or cache.max_length is None or isinstance(positions, jax.core.Tracer):
        return
    longest = int(jnp.max(positions if segment_ids is None else positions * (segment_ids != 0))) + 1
    if longest > cache.max_length:
        raise ValueError(
            f"cache has max_length={cache.max_length}: a document would reach {longest} tokens, "
            f"and layers with a longer window, or 'full', read all of it; make a longer cache"
        )

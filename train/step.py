"""The training state and the one pure function that moves it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from nha_jax.models import LanguageModel, ModelConfig, logical_axes, weight_decay_mask
from train.config import PretrainConfig
from train.loss import chunked_cross_entropy
from train.optimizer import learning_rate_schedule, make_optimizer
from train.sharding import (
    BATCH_SPEC,
    abstract_arrays,
    optimizer_shardings,
    parameter_shardings,
    replicated,
)

Batch = Mapping[str, Array]
Metrics = dict[str, Any]


class TrainState(NamedTuple):
    """Everything that a step changes; also as shapes or shardings of these.

    Attributes:
        step: Updates made so far, an int32 scalar.
        params: Pure dict of the model's parameters.
        opt_state: State of the optimizer.
    """

    step: Any
    params: Any
    opt_state: Any


class Trainer(NamedTuple):
    """What a step is made of besides its state; nothing here changes during a run.

    Attributes:
        config: The run.
        mesh: The devices.
        graphdef: The model without its parameters.
        optimizer: The optimizer.
        schedule: Learning rate of each update.
        axes: Logical axes of each parameter.
        abstract_state: Shapes, dtypes and shardings of the state.
    """

    config: PretrainConfig
    mesh: Mesh
    graphdef: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    axes: Any
    abstract_state: TrainState

    def model(self, params: Any) -> LanguageModel:
        """The model with these parameters, inside a jitted function."""
        # Left to itself the partitioner looks tokens up in shards of the model's width and then
        # moves the activations of the whole batch; moving the table is cheaper.
        vocabulary = self.abstract_state.params["embedding"].sharding.spec[0]
        table = jax.lax.with_sharding_constraint(
            params["embedding"], NamedSharding(self.mesh, PartitionSpec(vocabulary))
        )
        return nnx.merge(self.graphdef, {**params, "embedding": table})


def make_trainer(config: PretrainConfig, mesh: Mesh) -> Trainer:
    """Set up model, optimizer and shardings, without an array on any device."""
    axes = logical_axes(config.model)
    schedule = learning_rate_schedule(config.schedule, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule, weight_decay_mask(config.model))
    shapes = jax.eval_shape(lambda: _initial_state(config, optimizer))
    param_shardings = parameter_shardings(mesh, axes, shapes.params)
    shardings = TrainState(
        step=replicated(mesh),
        params=param_shardings,
        opt_state=optimizer_shardings(mesh, optimizer, shapes.opt_state, param_shardings),
    )
    abstract_model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(abstract_model, nnx.Param)
    return Trainer(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        optimizer=optimizer,
        schedule=schedule,
        axes=axes,
        abstract_state=abstract_arrays(shapes, shardings),
    )


def _initial_params(config: ModelConfig, seed: int) -> Any:
    model = LanguageModel(config, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _initial_state(config: PretrainConfig, optimizer: optax.GradientTransformation) -> TrainState:
    params = _initial_params(config.model, config.seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def initialise_state(trainer: Trainer) -> TrainState:
    """The state before the first step, each device computing its own shards only."""
    shardings = jax.tree.map(lambda array: array.sharding, trainer.abstract_state)
    initialise = jax.jit(
        lambda: _initial_state(trainer.config, trainer.optimizer), out_shardings=shardings
    )
    return initialise()


def documents(config: PretrainConfig, batch: Batch) -> dict[str, Any]:
    """What tells the model of a batch's documents: nothing where rows are read as one text.

    Padding, which stands at the end of a row, is then read like any token; no target sees it.
    """
    if not config.data.mask_documents:
        return {}
    return {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}


def make_train_step(trainer: Trainer) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function from a state and a global batch to the next state and its metrics.

    The loss is the sum over all valid targets of the global batch, divided by their number: how
    the batch is cut into microbatches or over devices does not matter.
    """
    config = trainer.config
    num_microbatches = config.grad_accumulation
    rows = NamedSharding(trainer.mesh, BATCH_SPEC)
    microbatch_rows = NamedSharding(trainer.mesh, PartitionSpec(None, *BATCH_SPEC))

    def loss_fn(params: Any, batch: Batch, num_targets: Array) -> tuple[Array, Metrics]:
        model = trainer.model(params)
        hidden = model.hidden_states(batch["tokens"], **documents(config, batch))
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
        sums = chunked_cross_entropy(
            model.readout,
            hidden,
            batch["targets"],
            batch["loss_mask"],
            chunk_size=config.loss.chunk_size,
        )
        loss = sums.nats / num_targets
        z_loss = config.loss.z_loss * sums.z_squared / num_targets
        return loss + z_loss, {"loss": loss, "z_loss": z_loss}

    def gradients(params: Any, batch: Batch, num_targets: Array) -> tuple[Any, Metrics]:
        gradient_fn = jax.grad(loss_fn, has_aux=True)
        if num_microbatches == 1:
            return gradient_fn(params, batch, num_targets)

        def to_microbatches(x: Array) -> Array:
            # Rows i, i + A, i + 2A, … make microbatch i: each takes an equal share of the rows
            # that a device holds, so none of them moves.
            x = x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x, microbatch_rows)

        def add_microbatch(total: Any, microbatch: Batch) -> tuple[Any, None]:
            gradient = gradient_fn(params, microbatch, num_targets)
            return jax.tree.map(jnp.add, total, gradient), None

        microbatches = jax.tree.map(to_microbatches, dict(batch))
        zero = jnp.zeros((), jnp.float32)
        zeros = jax.tree.map(jnp.zeros_like, params), {"loss": zero, "z_loss": zero}
        return jax.lax.scan(add_microbatch, zeros, microbatches)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        num_targets = jnp.sum(batch["loss_mask"], dtype=jnp.float32)
        gradient, metrics = gradients(state.params, batch, jnp.maximum(num_targets, 1.0))
        updates, opt_state = trainer.optimizer.update(gradient, state.opt_state, state.params)
        metrics |= {
            "num_targets": num_targets,
            "learning_rate": trainer.schedule(state.step),
            "gradient_norm": optax.tree.norm(gradient),
            "parameter_norm": optax.tree.norm(state.params),
            "gradient_norms": group_norms(gradient, trainer),
            "parameter_norms": group_norms(state.params, trainer),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def group_norms(tree: Any, trainer: Trainer) -> dict[str, Float[Array, "..."]]:
    """Euclidean norms of parameters or gradients.

    Args:
        tree: Pure dict of arrays, like the parameters.
        trainer: Knows which of them are stacked by layer, and of what kind each layer is.

    Returns:
        ``layers``: one number a layer, first to last; and a scalar for everything else, by name.
    """
    squares: dict[str, Array] = {}
    leaf_axes = jax.tree.leaves(trainer.axes, is_leaf=lambda node: isinstance(node, tuple))
    for (path, leaf), axes in zip(jax.tree.leaves_with_path(tree), leaf_axes, strict=True):
        stacked = axes[:1] == ("layers",)
        # Parameters are at blocks.<kind>.… in stacks by layer, or at <name>.….
        group = path[1].key if stacked else path[0].key
        summed = tuple(range(1 if stacked else 0, leaf.ndim))
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=summed)
        squares[group] = squares.get(group, jnp.zeros((), jnp.float32)) + square
    kinds = [layer.kind for layer in trainer.config.model.layers()]
    stacks = {kind: squares.pop(kind) for kind in dict.fromkeys(kinds)}
    by_layer = [stacks[kind][kinds[:layer].count(kind)] for layer, kind in enumerate(kinds)]
    return {name: jnp.sqrt(square) for name, square in squares.items()} | {
        "layers": jnp.sqrt(jnp.stack(by_layer))
    }

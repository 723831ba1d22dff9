"""The validation pass: loss, perplexity, bits per byte, and what the slots are used for."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.tokenizer import Tokenizer
from train.data import Split, make_loader
from train.loss import chunked_cross_entropy
from train.sharding import BATCH_SPEC, process_block, to_global_batch
from train.step import Batch, Trainer, documents


class ValidationSums(NamedTuple):
    """Sums over a batch on the devices (float32), or over a pass on the host (float64).

    Attributes:
        nats: Negative log-likelihood of the valid targets, in nats.
        num_targets: Valid targets.
        num_bytes: UTF-8 bytes that the valid targets stand for.
        slot_mass: Share of attention that went to the slots, summed over the tokens; ``[L]``.
        num_tokens: Tokens that are not padding.
    """

    nats: Any
    num_targets: Any
    num_bytes: Any
    slot_mass: Any
    num_tokens: Any


class ValidationResult(NamedTuple):
    """What a validation pass found.

    Attributes:
        loss: Mean negative log-likelihood of a target, in nats.
        perplexity: Its exponential.
        bits_per_byte: Nats of all targets, in bits, over the UTF-8 bytes they stand for.
        slot_mass: Mean share of attention that went to the slots, per layer.
        num_targets: Targets in the pass.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    slot_mass: tuple[float, ...]
    num_targets: int


def make_validation_step(
    trainer: Trainer, tokenizer: Tokenizer
) -> Callable[[Any, Batch], ValidationSums]:
    """The pure function from parameters and a global batch to the sums of the pass."""
    rows = jax.sharding.NamedSharding(trainer.mesh, BATCH_SPEC)
    byte_lengths = tokenizer.byte_lengths()

    def validation_step(params: Any, batch: Batch) -> ValidationSums:
        model = trainer.model(params)
        hidden, slot_mass_LBT = model.hidden_states(
            batch["tokens"], return_slot_mass=True, **documents(trainer.config, batch)
        )
        mask = batch["loss_mask"]
        is_token = batch["segment_ids"] > 0
        sums = chunked_cross_entropy(
            model.readout,
            jax.lax.with_sharding_constraint(hidden, rows),
            batch["targets"],
            mask,
            chunk_size=trainer.config.loss.chunk_size,
        )
        target_bytes = jnp.asarray(byte_lengths, jnp.int32)[batch["targets"]]
        return ValidationSums(
            nats=sums.nats,
            num_targets=jnp.sum(mask, dtype=jnp.float32),
            num_bytes=jnp.sum(jnp.where(mask, target_bytes, 0), dtype=jnp.float32),
            slot_mass=jnp.sum(slot_mass_LBT * is_token, axis=(1, 2), dtype=jnp.float32),
            num_tokens=jnp.sum(is_token, dtype=jnp.float32),
        )

    return validation_step


def validate(
    trainer: Trainer,
    validation_step: Callable[[Any, Batch], ValidationSums],
    params: Any,
    split: Split,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> ValidationResult | None:
    """One pass over the validation split, the same batches every time.

    Args:
        trainer: The model and the mesh.
        validation_step: From ``make_validation_step``, compiled.
        params: Parameters to evaluate.
        split: The validation split.
        should_stop: Asked after every batch.

    Returns:
        The result, or None if it was told to stop.

    Raises:
        DataError: A record of the data is damaged.
        ConfigError: The mesh gives this process no block of the batch.
    """
    batch_size = trainer.config.microbatch_size
    index, count = process_block(trainer.mesh, batch_size)
    limit = trainer.config.validation.batches
    totals: list[np.ndarray] | None = None
    with make_loader(
        split, batch_size=batch_size, process_index=index, process_count=count, num_epochs=1
    ) as loader:
        for number, local_batch in enumerate(loader):
            if number == limit:
                break
            sums = validation_step(params, to_global_batch(trainer.mesh, local_batch, batch_size))
            # In float64 on the host: a whole split is too long a sum for float32.
            values = [np.asarray(value, np.float64) for value in jax.device_get(sums)]
            totals = (
                values if totals is None else [a + b for a, b in zip(totals, values, strict=True)]
            )
            if should_stop():
                return None
    assert totals is not None, "a split has at least one row"
    return _result(ValidationSums(*totals))


def _result(sums: ValidationSums) -> ValidationResult:
    nats, num_targets, num_bytes = float(sums.nats), float(sums.num_targets), float(sums.num_bytes)
    loss = nats / max(num_targets, 1)
    return ValidationResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / max(num_bytes, 1),
        slot_mass=tuple((np.asarray(sums.slot_mass) / max(float(sums.num_tokens), 1)).tolist()),
        num_targets=int(num_targets),
    )

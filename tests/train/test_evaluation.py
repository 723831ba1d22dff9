"""The validation pass and the sample against plain computations with the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nha_jax.compilation_cache import use_compilation_cache
from nha_jax.tokenizer import Tokenizer
from train.data import open_split
from train.evaluation import make_validation_step, validate
from train.sample import generate, prompt_ids
from train.sharding import make_mesh
from train.step import initialise_state, make_trainer


@pytest.fixture(autouse=True)
def share_compilations(shared_compilations) -> None:
    use_compilation_cache(shared_compilations)


@pytest.fixture
def trained(make_config):
    """A model, its parameters and the validation split."""

    def make(**changes):
        config = make_config(**changes)
        trainer = make_trainer(config, make_mesh(config))
        split = open_split(
            config.data.directory, "validation", context=config.context, seed=config.seed
        )
        # Sharper than at the start, so that tokens differ in probability.
        params = jax.tree.map(lambda leaf: 3.0 * leaf, initialise_state(trainer).params)
        return trainer, params, split

    return make


def compiled_step(trainer, split):
    return jax.jit(make_validation_step(trainer, split.tokenizer))


def test_pass_covers_the_split_once_and_measures_it(trained) -> None:
    trainer, params, split = trained()
    assert split.num_rows % trainer.config.batch_size != 0, "the last batch must need padding"
    result = validate(trainer, compiled_step(trainer, split), params, split)

    batch = jax.tree.map(jnp.asarray, split.batch(np.arange(split.num_rows)))

    @jax.jit
    def plain(params):
        logits, slot_mass = trainer.model(params)(
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            return_slot_mass=True,
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]), slot_mass

    nats, slot_mass = jax.device_get(plain(params))
    mask = np.asarray(batch["loss_mask"])
    targets = np.asarray(batch["targets"])[mask]
    loss = nats[mask].mean()
    assert result is not None and result.num_targets == mask.sum() == split.num_targets
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(result.perplexity, np.exp(loss), rtol=1e-4)
    # A byte tokenizer: every target is a byte, but for the end of a document.
    num_bytes = np.sum(targets < 256)
    assert num_bytes < len(targets)
    bits = nats[mask].sum() / np.log(2) / num_bytes
    np.testing.assert_allclose(result.bits_per_byte, bits, rtol=1e-5)
    tokens = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(result.slot_mass, slot_mass[:, tokens].mean(1), rtol=1e-4)
    assert all(0 < mass < 1 for mass in result.slot_mass)


def test_pass_can_be_limited_and_stopped(trained) -> None:
    trainer, params, split = trained(validation__batches=1)
    step = compiled_step(trainer, split)
    limited = validate(trainer, step, params, split)
    assert limited is not None and 0 < limited.num_targets < split.num_targets
    assert validate(trainer, step, params, split, should_stop=lambda: True) is None


@pytest.mark.parametrize("mesh", [{}, {"mesh__fsdp": 2, "mesh__tensor": 2}], ids=["one", "cut"])
def test_greedy_sample_takes_the_likeliest_token_each_time(trained, mesh) -> None:
    trainer, params, split = trained(
        sample__num_tokens=6, sample__prompt="slots of ", sample__temperature=0.0, **mesh
    )
    text = generate(trainer, params, split.tokenizer)
    tokens = [split.tokenizer.bos_id, *split.tokenizer.encode("slots of ")]
    length = len(tokens) + 6

    @jax.jit
    def likeliest(params, padded, count):
        mask = (jnp.arange(length) < count).astype(jnp.int32)
        logits = trainer.model(params)(padded[None], segment_ids=mask[None])
        return jnp.argmax(logits[0, count - 1])

    while len(tokens) < length and tokens[-1] != split.tokenizer.eos_id:
        padded = np.zeros(length, np.int32)
        padded[: len(tokens)] = tokens
        tokens.append(int(likeliest(params, jnp.asarray(padded), len(tokens))))
    assert text == split.tokenizer.decode(tokens)
    assert text.startswith("slots of ")


def test_space_after_the_prompt_is_the_next_word_s() -> None:
    """Where tokens begin with spaces; a byte is a byte."""
    merging = Tokenizer.train_bpe(["The cat and the hat and an ant. " * 20], 280)
    assert [merging.decode([i]) for i in merging.encode("The and")][-1] == " and"
    for prompt in ("The ", "The", "The cat and "):
        assert prompt_ids(merging, prompt) == merging.encode(prompt.rstrip())
    assert prompt_ids(merging, "") == prompt_ids(merging, " ") == []
    assert merging.decode(prompt_ids(merging, "The\n")) == "The\n"
    assert prompt_ids(Tokenizer.bytes(), "def ") == list(b"def ")


def test_sample_at_a_temperature_is_repeatable_and_can_be_stopped(trained) -> None:
    trainer, params, split = trained(sample__num_tokens=8, sample__temperature=1.0)
    first = generate(trainer, params, split.tokenizer)
    assert first == generate(trainer, params, split.tokenizer)
    answers = iter([False, False, True])
    stopped = generate(trainer, params, split.tokenizer, should_stop=lambda: next(answers))
    assert stopped is None

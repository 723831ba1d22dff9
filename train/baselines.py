"""How far one gets without a neural network: unigram and bigram entropies.

The models are counted on the training split and measured on the validation split, on exactly
the targets a language model is measured on there: so they compare with its loss.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from train.data.split import Split

_CHUNK_TOKENS = 2**20
_CHUNK_ROWS = 256


class EntropyBaselines(NamedTuple):
    """Cross-entropies on the validation split.

    Attributes:
      unigram_loss: of a token given nothing, nats per target.
      bigram_loss: of a token given the token before, nats per target.
      unigram_bits_per_byte: the same in bits per UTF-8 byte of the targets.
      bigram_bits_per_byte: likewise.
    """

    unigram_loss: float
    bigram_loss: float
    unigram_bits_per_byte: float
    bigram_bits_per_byte: float


def entropy_baselines(
    train: Split, validation: Split, *, max_tokens: int = 200_000_000
) -> EntropyBaselines:
    """Counts n-grams on the training split and measures them on the validation split.

    Unigram: `p(b) = (c(b) + 1) / (c + P)`. Bigram, with Witten-Bell smoothing (Witten and Bell
    1991, method C): `p(b|a) = (c(ab) + s(a) p(b)) / (c(a) + s(a))` where `s(a)` is the number of
    distinct tokens that follow `a`.

    Args:
      train: counted, document by document.
      validation: measured: all its rows.
      max_tokens: stop counting after the document that reaches this many tokens.

    Raises:
      DataError: a record of the data is damaged.
    """
    vocab_size = train.manifest.vocab_size
    pairs, counts = _count_pairs(train, vocab_size, max_tokens)
    bytes_of = train.tokenizer.byte_lengths()
    previous, following = np.divmod(pairs, vocab_size)
    unigram = np.bincount(following, weights=counts, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    after = np.bincount(previous, weights=counts, minlength=vocab_size)
    distinct = np.bincount(previous, minlength=vocab_size).astype(np.float64)

    unigram_nats = bigram_nats = 0.0
    num_bytes = num_targets = 0
    for start in range(0, validation.num_rows, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, validation.num_rows)
        batch = validation.batch(np.arange(start, stop))
        mask = batch["loss_mask"]
        a = batch["tokens"][mask].astype(np.int64)
        b = batch["targets"][mask].astype(np.int64)
        seen = _lookup(pairs, counts, a * vocab_size + b)
        context = after[a] + distinct[a]
        # A token never seen before another says nothing: its successor is a unigram.
        with np.errstate(invalid="ignore"):
            bigram = np.where(context > 0, (seen + distinct[a] * unigram[b]) / context, unigram[b])
        unigram_nats -= float(np.log(unigram[b]).sum())
        bigram_nats -= float(np.log(bigram).sum())
        num_bytes += int(bytes_of[b].sum())
        num_targets += len(b)
    to_bits_per_byte = 1 / np.log(2) / max(num_bytes, 1)
    num_targets = max(num_targets, 1)
    return EntropyBaselines(
        unigram_loss=unigram_nats / num_targets,
        bigram_loss=bigram_nats / num_targets,
        unigram_bits_per_byte=float(unigram_nats * to_bits_per_byte),
        bigram_bits_per_byte=float(bigram_nats * to_bits_per_byte),
    )


def _count_pairs(
    split: Split, vocab_size: int, max_tokens: int
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Distinct pairs of neighbours `a * vocab_size + b`, sorted, and how often each occurs."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    pending: list[np.ndarray] = []
    pending_tokens = counted = 0
    for document in split.documents():
        tokens = document.astype(np.int64)
        pending.append(tokens[:-1] * vocab_size + tokens[1:])
        pending_tokens += len(tokens)
        counted += len(tokens)
        if pending_tokens >= _CHUNK_TOKENS:
            pairs, counts = _merge(pairs, counts, pending)
            pending, pending_tokens = [], 0
        if counted >= max_tokens:
            break
    return _merge(pairs, counts, pending)


def _merge(
    pairs: np.ndarray, counts: np.ndarray, more: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    if not more:
        return pairs, counts
    new, new_counts = np.unique(np.concatenate(more), return_counts=True)
    merged, index = np.unique(np.concatenate((pairs, new)), return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, index, np.concatenate((counts, new_counts)))
    return merged, total


def _lookup(
    pairs: Int64[np.ndarray, " pairs"],
    counts: Int64[np.ndarray, " pairs"],
    wanted: Int64[np.ndarray, " n"],
) -> Float64[np.ndarray, " n"]:
    index = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    return np.where(pairs[index] == wanted, counts[index], 0).astype(np.float64)

"""Unigram and bigram entropies against a count by hand."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpus import make_texts, quiet, write_texts

from train.baselines import entropy_baselines
from train.data import Split, open_split
from train.prepare_data import PrepareConfig, prepare


def by_hand(train: Split, validation: Split) -> tuple[float, float, int, int]:
    """Nats of all validation targets under both models, their number and their bytes."""
    vocab_size = train.manifest.vocab_size
    unigrams: Counter[int] = Counter()
    bigrams: dict[int, Counter[int]] = {}
    for document in train.documents():
        tokens = document.tolist()
        unigrams.update(tokens[1:])
        for a, b in itertools.pairwise(tokens):
            bigrams.setdefault(a, Counter())[b] += 1
    total = sum(unigrams.values())
    unigram_nats = bigram_nats = 0.0
    number = size = 0
    for document in validation.documents():
        tokens = document.tolist()
        for start in range(0, len(tokens), validation.context):
            piece = tokens[start : start + validation.context]
            for a, b in itertools.pairwise(piece):
                unigram = (unigrams[b] + 1) / (total + vocab_size)
                after = bigrams.get(a, Counter())
                bigram = unigram
                if after:
                    bigram = (after[b] + len(after) * unigram) / (after.total() + len(after))
                unigram_nats -= math.log(unigram)
                bigram_nats -= math.log(bigram)
                number += 1
                size += train.tokenizer.token_bytes([b])
    return unigram_nats, bigram_nats, number, size


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:290"])
def test_entropies_are_those_counted_by_hand(tmp_path: Path, tokenizer: str) -> None:
    write_texts(tmp_path / "texts", [*make_texts(60), "§ rare ¶" * 3, "zyxw" * 9])
    config = PrepareConfig(
        input=(str(tmp_path / "texts"),),
        output=str(tmp_path / "out"),
        tokenizer=tokenizer,
        validation_fraction=0.3,
    )
    prepare(config, progress=False, log=quiet)
    train, validation = (
        open_split(tmp_path / "out", name, context=50, seed=0) for name in ("train", "validation")
    )
    unigram, bigram, number, size = by_hand(train, validation)
    assert number == validation.num_targets
    found = entropy_baselines(train, validation)
    np.testing.assert_allclose(
        found,
        [
            unigram / number,
            bigram / number,
            unigram / math.log(2) / size,
            bigram / math.log(2) / size,
        ],
        rtol=1e-12,
    )
    assert found.bigram_loss < found.unigram_loss


def test_counting_can_be_limited(split: Split, data_directory: Path) -> None:
    validation = open_split(data_directory, "validation", context=128, seed=0)
    everything = entropy_baselines(split, validation)
    little = entropy_baselines(split, validation, max_tokens=2000)
    assert little.bigram_loss > everything.bigram_loss
    assert entropy_baselines(split, validation, max_tokens=10**9) == everything

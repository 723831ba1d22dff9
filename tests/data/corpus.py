"""Small corpora for the tests of this folder."""

import random
from pathlib import Path

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "épsilon",
    "zeta",
    "η",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 600 words, all different."""
    generator = random.Random(seed)
    return [
        f"text {i}: " + " ".join(generator.choices(WORDS, k=int(600 ** generator.random())))
        for i in range(count)
    ]


def quiet(line: str) -> None:
    """Takes the lines that `prepare` would print."""


def write_texts(folder: Path, texts: list[str]) -> None:
    """One file per text."""
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode("utf-8"))

"""What data is prepared from and how, and whether a directory holds just that already."""

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

from nha_jax.tokenizer import MIN_BPE_SIZE, bpe_size
from train.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DataError,
    Manifest,
    find_damage,
    preparation_command,
    read_manifest,
)
from train.data.sources import STDLIB, Fingerprint, ReadCounts, find_files


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
      input: text files, folders, globs, `.jsonl`, `.jsonl.gz` and `.jsonl.zst` files, or
        "stdlib", the standard library of the running Python (its tests left out).
      output: the data directory to write.
      tokenizer: "bytes"; "bpe:N", a byte-level BPE with N ids trained on the training split; or
        the path of a JSON file of the tokenizers library.
      bos_token: token of a tokenizers file that opens a document; null: found by usual names.
      eos_token: token of a tokenizers file that closes a document; null: found by usual names.
      text_key: key of a JSON line's object that holds the text.
      validation_fraction: expected share of the documents that go to the validation split.
      max_bytes: stop after the document that reaches this many bytes of text; null: read all.
      shard_tokens: begin a new shard after this many tokens.
      overwrite: replace an output directory that was prepared in another way.

    Raises:
      DataError: a field that cannot be, by name.
    """

    input: tuple[str, ...]
    output: str
    tokenizer: str = "bytes"
    bos_token: str | None = None
    eos_token: str | None = None
    text_key: str = "text"
    validation_fraction: float = 0.01
    max_bytes: int | None = None
    shard_tokens: int = 2**27
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.input or isinstance(self.input, str):
            raise DataError(f"data: input={self.input!r} must list at least one file or folder")
        if "" in self.input:
            raise DataError(f"data: input={self.input!r} has an empty name")
        if not self.output:
            raise DataError("data: output is empty; name the directory to write")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(
                f"data: validation_fraction={self.validation_fraction} must be at least 0 and"
                " below 1"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise DataError(f"data: max_bytes={self.max_bytes} must be at least 1, or null")
        if self.shard_tokens < 1:
            raise DataError(f"data: shard_tokens={self.shard_tokens} must be at least 1")
        if not self.tokenizer:
            raise DataError("data: tokenizer is empty; give bytes, bpe:N or a file")
        try:
            bpe_size(self.tokenizer)
        except ValueError:
            raise DataError(
                f"data: tokenizer={self.tokenizer!r} must give a number of ids of at least"
                f" {MIN_BPE_SIZE}, as in 'bpe:8192'"
            ) from None

    def recorded(self) -> dict[str, object]:
        """The settings that decide what is written, as the manifest keeps them."""
        settings = dataclasses.asdict(self)
        del settings["output"], settings["overwrite"]
        return settings | {"input": sorted(self.input)}


def text_files(config: PrepareConfig, counts: ReadCounts | None = None) -> list[Path]:
    """The files of the input, as `find_files` finds them; the output's own are none of them."""
    return find_files(config.input, counts=counts, leave_out=Path(config.output))


def fingerprint_of(config: PrepareConfig, texts: list[Path]) -> Fingerprint:
    """Of all files that are read: the texts, and the tokenizer's if it comes from a file."""
    if config.tokenizer == "bytes" or bpe_size(config.tokenizer) is not None:
        return Fingerprint.of(texts)
    path = Path(config.tokenizer)
    return Fingerprint.of([*texts, path / TOKENIZER_NAME if path.is_dir() else path])


def find_prepared(
    config: PrepareConfig, output: Path, log: Callable[[str], None]
) -> Manifest | None:
    """The manifest of an output that needs no preparation, or None.

    Raises:
      DataError: the output holds something else, or was prepared with other settings or from other
        files.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST_NAME).is_file():
        raise DataError(
            f"data: output {output} exists and is not a data directory; name another one"
        )
    if config.overwrite:
        return None
    manifest = read_manifest(output)
    recorded, wanted = manifest.preparation["config"], config.recorded()
    different = [
        f"{key} {recorded.get(key)!r} there, {wanted[key]!r} here"
        for key in wanted
        if recorded.get(key) != _as_json(wanted[key])
    ]
    if different:
        raise DataError(
            f"data: {output} was prepared with other settings ({'; '.join(different)});"
            " name another output, or prepare it again with"
            f" `{preparation_command(output, wanted)}`"
        )
    _check_input(config, output, manifest, log)
    if (problem := find_damage(output, manifest)) is not None:
        log(f"data: {problem}; preparing {output} again")
        return None
    log(f"data: {output} is prepared already")
    return manifest


def _check_input(
    config: PrepareConfig, output: Path, manifest: Manifest, log: Callable[[str], None]
) -> None:
    """Raises `DataError` if the input has other files than when the output was prepared from it.

    What cannot be told is said in a line: the input may not be on this machine.
    """
    again = f"`{preparation_command(output, config.recorded())}`"
    if (recorded := manifest.preparation.get("input")) is None:
        log(
            f"data: {output} does not record which files it was prepared from; if there are others"
            f" now, prepare it again with {again}"
        )
        return
    before = Fingerprint(**recorded)
    try:
        now = fingerprint_of(config, text_files(config))
    except (DataError, OSError) as error:
        log(f"data: whether the input of {output} has changed cannot be told: {error}")
        return
    if now.names_and_sizes != before.names_and_sizes:
        found, python = f"{before} then, {now} now", manifest.preparation["python"]
        if STDLIB in config.input and python != platform.python_version():
            found += f"; Python {python} then, {platform.python_version()} now"
        raise DataError(
            f"data: the input of {output} is not what it was prepared from ({found}); prepare it"
            f" again with {again}, or name another output; training takes it as it is with"
            " `--data.input '[]'`"
        )
    if now.newest > before.newest:
        log(
            f"data: files of the input of {output} were modified after it was prepared; if their"
            f" text is another, prepare it again with {again}"
        )


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

"""Turns text into shards of tokenized documents: `python -m train.prepare_data --help`.

    python -m train.prepare_data --input texts/ more/*.jsonl.zst --output data/mine
    python -m train.prepare_data --input corpus.jsonl --tokenizer bpe:32000 --output data/bpe
    python -m train.prepare_data --input stdlib --output data/stdlib

A text file is one document, a line of JSON lines is one document. Empty documents and exact
duplicates are dropped. Whether a document is for training or for validation is decided by a
hash of its content, so it does not depend on what else there is or in which order. What is written
is described in `train.data.manifest`.

A directory that was prepared with the same settings is left as it is, unless files of it are
missing or damaged: then it is prepared again. Other settings and other input (files that are new,
gone, renamed or of another size) need `--overwrite true`.

Exit status: 0; 2 after an error of one line; 75 after SIGTERM or Ctrl-C, of which nothing is kept:
the same command starts over.
"""

from train.signals import EXIT_RESUMABLE, exit_on_signals, signals_raise

if __name__ == "__main__":
    exit_on_signals()  # now: the imports below take a second

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nha_jax.tokenizer import Tokenizer, bpe_size, load_tokenizer
from train.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DataError,
    Manifest,
    SplitEntry,
    read_manifest,
    sha256_of_file,
    verify,
)
from train.data.preparation import PrepareConfig, find_prepared, fingerprint_of, text_files
from train.data.sources import ReadCounts, read_documents
from train.data.writer import RECORD_TOKENS, SplitWriter
from train.schema import ConfigError, check_values, read_file, read_option, split_options

_BATCH_BYTES = 4 * 2**20


def prepare(
    config: PrepareConfig,
    *,
    progress: bool = True,
    log: Callable[[str], None] = print,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Prepares a data directory, or finds it prepared already with the same settings and input.

    One that is damaged is prepared again, as far as that shows without reading the shards
    (`train.data.manifest.verify` reads them).

    Everything is written to a temporary folder beside the output and renamed at the end: an
    interrupted preparation leaves no half-written data directory, and the next one removes
    what it left. Processes that prepare the same directory at the same time wait for the first.

    Args:
      config: what to prepare.
      progress: draw a progress bar where there is a terminal.
      log: called with each line to print.
      check: called before each document; what it raises ends the preparation.

    Returns:
      The manifest of the data directory.

    Raises:
      DataError: bad input; an output directory that was prepared with other settings or from other
        files, holds something else or cannot be written.
    """
    output = Path(config.output)
    try:
        return _prepare(config, output, progress, log, check)
    except OSError as error:
        raise DataError(f"data: output {output} cannot be prepared: {error}") from error


def _prepare(
    config: PrepareConfig,
    output: Path,
    progress: bool,
    log: Callable[[str], None],
    check: Callable[[], None],
) -> Manifest:
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(output.parent / f".{output.name}.lock"):
        _remove_leftovers(output, log)
        if (found := find_prepared(config, output, log)) is not None:
            return found
        replaced_hash = _hash_of(output)
        began = time.monotonic()
        temporary = output.parent / f"{_temporary_prefix(output)}{os.getpid()}"
        temporary.mkdir()
        try:
            documents = functools.partial(_documents, config, progress, check)
            manifest = _write_all(config, temporary, documents, log)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if output.exists():
            replaced = output.parent / f"{_temporary_prefix(output)}replaced"
            os.rename(output, replaced)
            os.rename(temporary, output)
            shutil.rmtree(replaced)
        else:
            os.rename(temporary, output)
    log(f"data: wrote {output} in {time.monotonic() - began:.1f} s")
    if replaced_hash not in (None, manifest.hash):
        log(
            f"data: the tokens of {output} are others than before: a run that was trained on those"
            " can not go on with these"
        )
    return manifest


def split_of(digest: bytes, validation_fraction: float) -> str:
    """The split of a document, from the digest of its content."""
    return (
        "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _temporary_prefix(output: Path) -> str:
    return f".{output.name}.preparing-"


def _remove_leftovers(output: Path, log: Callable[[str], None]) -> None:
    prefix = _temporary_prefix(output)
    for path in sorted(output.parent.iterdir()):
        if path.name.startswith(prefix):
            log(f"data: removing what an interrupted preparation left: {path}")
            shutil.rmtree(path)


def _hash_of(output: Path) -> str | None:
    try:
        return read_manifest(output).hash
    except DataError:
        return None


@dataclasses.dataclass
class _Counts(ReadCounts):
    documents: int = 0
    empty: int = 0
    duplicates: int = 0


# The function below, of the files, the counts and a title for the bar.
Documents = Callable[[list[Path], "_Counts", str], Iterator[tuple[str, str, int]]]


def _documents(
    config: PrepareConfig,
    progress: bool,
    check: Callable[[], None],
    files: list[Path],
    counts: _Counts,
    title: str,
) -> Iterator[tuple[str, str, int]]:
    """Yields (split, text, UTF-8 bytes) of each distinct document, with a progress bar."""
    from tqdm import tqdm

    seen: set[bytes] = set()
    read = 0
    size = sum(path.stat().st_size for path in files)
    bar_of = functools.partial(tqdm, unit="B", unit_scale=True, unit_divisor=1024)
    # disable=None: no bar where there is no terminal.
    with bar_of(total=size, desc=title, disable=None if progress else True) as bar:
        for text in read_documents(
            files, text_key=config.text_key, counts=counts, advance=bar.update
        ):
            check()
            content = text.encode("utf-8")
            if not content:
                counts.empty += 1
                continue
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if digest in seen:
                counts.duplicates += 1
                continue
            seen.add(digest)
            counts.documents += 1
            yield split_of(digest, config.validation_fraction), text, len(content)
            read += len(content)
            if config.max_bytes is not None and read >= config.max_bytes:
                break


def _make_tokenizer(config: PrepareConfig, files: list[Path], documents: Documents) -> Tokenizer:
    try:
        if config.tokenizer == "bytes":
            return Tokenizer.bytes()
        if (size := bpe_size(config.tokenizer)) is not None:
            found = documents(files, _Counts(), "training the tokenizer")
            texts = (text for split, text, _ in found if split == "train")
            return Tokenizer.train_bpe(texts, size)
        tokenizer = load_tokenizer(
            config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token
        )
        tokenizer.byte_lengths()  # Raises now rather than at the first validation.
        return tokenizer
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"data: {error}") from None


def _write_all(
    config: PrepareConfig, folder: Path, documents: Documents, log: Callable[[str], None]
) -> Manifest:
    counts = _Counts()
    files = text_files(config, counts)
    tokenizer = _make_tokenizer(config, files, documents)
    fingerprint = fingerprint_of(config, files)
    (folder / TOKENIZER_NAME).write_text(tokenizer.to_json(), encoding="utf-8")
    writers = {
        name: SplitWriter(folder, name, tokenizer.dtype, config.shard_tokens)
        for name in ("train", "validation")
    }
    try:
        pending: list[tuple[str, str, int]] = []
        pending_bytes = 0
        for item in documents(files, counts, "tokenizing"):
            pending.append(item)
            pending_bytes += item[2]
            if pending_bytes >= _BATCH_BYTES:
                _write_batch(tokenizer, writers, pending)
                pending, pending_bytes = [], 0
        _write_batch(tokenizer, writers, pending)
        splits = {name: writer.close() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    _check_not_empty(config, counts, splits)
    manifest = Manifest(
        dtype=tokenizer.dtype.name,
        record_tokens=RECORD_TOKENS,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=sha256_of_file(folder / TOKENIZER_NAME),
        splits=splits,
        preparation={
            "config": config.recorded(),
            "input": dataclasses.asdict(fingerprint),
            "counts": dataclasses.asdict(counts),
            "python": platform.python_version(),
        },
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    for line in _report(counts, manifest):
        log(line)
    return manifest


def _write_batch(
    tokenizer: Tokenizer, writers: "dict[str, SplitWriter]", batch: list[tuple[str, str, int]]
) -> None:
    documents = tokenizer.encode_documents([text for _, text, _ in batch])
    for (split, _, size), tokens in zip(batch, documents, strict=True):
        writers[split].write(tokens, size)


def _check_not_empty(config: PrepareConfig, counts: _Counts, splits: dict[str, SplitEntry]) -> None:
    inputs = ", ".join(config.input)
    if counts.documents == 0:
        raise DataError(
            f"data: no documents in {inputs}: {counts.files} files read, {counts.empty} documents"
            f" empty, {counts.not_utf8} not UTF-8"
        )
    for name, other in (("train", "lower"), ("validation", "raise")):
        if splits[name].documents == 0 and (name == "train" or config.validation_fraction > 0):
            raise DataError(
                f"data: none of the {counts.documents} documents of {inputs} falls into the"
                f" {name} split; {other} validation_fraction={config.validation_fraction} or"
                " give more documents"
            )


def _report(counts: _Counts, manifest: Manifest) -> Iterator[str]:
    yield (
        f"data: {counts.files:,} files, {counts.documents:,} documents; dropped"
        f" {counts.duplicates:,} duplicates and {counts.empty:,} empty ones; skipped"
        f" {counts.not_utf8:,} not UTF-8"
        + (f" ({', '.join(counts.not_utf8_examples)})" if counts.not_utf8 else "")
    )
    if counts.not_files:
        yield (
            f"data: skipped {counts.not_files:,} names of no regular file"
            f" ({', '.join(counts.not_files_examples)})"
        )
    for name, split in manifest.splits.items():
        yield (
            f"data: {name}: {split.documents:,} documents, {split.tokens:,} tokens,"
            f" {split.text_bytes:,} bytes of text, {len(split.shards)} shards"
        )


def main(arguments: list[str] | None = None, *, out: IO[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def log(line: str) -> None:
        print(line, file=out or sys.stdout, flush=True)

    try:
        if any(argument in ("-h", "--help") for argument in arguments):
            _print_help()
            return 0
        options = split_options(arguments, lists=("input",))
        if (directory := options.pop("verify", None)) is not None:
            if options:
                raise ConfigError(f"--verify and --{next(iter(options))}: give one of them")
            manifest = verify(directory)
            log(f"data: {directory} is intact (hash {manifest.hash[:16]})")
            return 0
        config = _parse(options)
        with signals_raise():
            prepare(config, log=log)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped: nothing was kept, the same command starts over.", file=sys.stderr)
        return EXIT_RESUMABLE
    return 0


def _parse(options: dict[str, Any]) -> PrepareConfig:
    file = options.pop("config", None)
    values = {} if file is None else read_file(Path(file))
    check_values(PrepareConfig, values)
    for key, given in options.items():
        values[key] = given if key == "input" else read_option(PrepareConfig, key, given)
    values = {"input": (), "output": ""} | values
    values["input"] = tuple(values["input"])
    if "validation_fraction" in values:
        values["validation_fraction"] = float(values["validation_fraction"])  # 0 is a number, too
    return PrepareConfig(**values)


def _print_help() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m train.prepare_data",
        description="Turns text into shards of tokenized documents.",
    )
    parser.add_argument("--config", type=str, help="a YAML file with these settings")
    parser.add_argument("--verify", help="only check the files of this data directory by hash")
    parser.add_argument(
        "--input", nargs="+", type=str, help='files, folders, globs, .jsonl[.gz|.zst], or "stdlib"'
    )
    parser.add_argument("--output", type=str, help="the data directory to write")
    parser.add_class_arguments(PrepareConfig, skip={"input", "output"})
    parser.print_help()


if __name__ == "__main__":
    sys.exit(main())

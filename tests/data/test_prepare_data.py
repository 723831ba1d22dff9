"""Preparation: inputs, duplicates, the split, interruption, damage, bad input."""

import errno
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zstandard
from corpus import make_texts, quiet, write_texts

from nha_jax.tokenizer import Tokenizer, load_tokenizer
from train.data import DataError, Manifest, open_split, read_manifest, verify
from train.data.sources import find_files
from train.data.writer import SplitWriter
from train.prepare_data import PrepareConfig, main, prepare
from train.signals import EXIT_RESUMABLE, STOP_SIGNALS


def prepare_quietly(
    tmp_path: Path, *inputs: object, output: str = "out", log=quiet, **settings
) -> Manifest:
    config = PrepareConfig(
        input=tuple(map(str, inputs)),
        output=str(tmp_path / output),
        **{"validation_fraction": 0.2} | settings,
    )
    return prepare(config, progress=False, log=log)


def documents_of(directory: Path) -> dict[str, list[str]]:
    """The texts of each split, in stored order; checks BOS and EOS on the way."""
    found = {}
    for name in ("train", "validation"):
        split = open_split(directory, name, context=64, seed=0)
        tokenizer = split.tokenizer
        found[name] = []
        for tokens in split.documents():
            assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            found[name].append(tokenizer.decode(tokens))
    return found


def test_every_document_is_there_once(data_directory: Path, texts: list[str]) -> None:
    found = documents_of(data_directory)
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    manifest = read_manifest(data_directory)
    assert len(manifest.splits["train"].shards) > 1
    for name, documents in found.items():
        entry = manifest.splits[name]
        size = sum(len(text.encode("utf-8")) for text in documents)
        assert (entry.documents, entry.text_bytes) == (len(documents), size)
        assert entry.tokens == size + 2 * len(documents)
    assert verify(data_directory) == manifest


def test_the_split_depends_on_nothing_but_content(tmp_path: Path) -> None:
    texts = make_texts(60)
    write_texts(tmp_path / "all", texts)
    write_texts(tmp_path / "backwards", texts[::-1])
    write_texts(tmp_path / "half", texts[:30])
    for name in ("all", "backwards", "half"):
        prepare_quietly(tmp_path, tmp_path / name, output=f"{name}-out")
    everything = documents_of(tmp_path / "all-out")
    backwards = documents_of(tmp_path / "backwards-out")
    half = documents_of(tmp_path / "half-out")
    assert set(everything["validation"]) == set(backwards["validation"])
    assert set(half["validation"]) == set(everything["validation"]) & set(texts[:30])
    assert 3 <= len(everything["validation"]) <= 25  # 12 expected


def test_all_kinds_of_input(tmp_path: Path) -> None:
    texts = make_texts(50)
    write_texts(tmp_path / "folder" / "deep", texts[:10])
    (tmp_path / "folder" / ".hidden").write_text("not to be read")
    (tmp_path / "single.md").write_text(texts[10])
    write_texts(tmp_path / "globbed", texts[11:20])
    lines = [json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "plain.jsonl").write_text("".join(lines[20:30]) + "\n  \n")
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.writelines(lines[30:40])
    compress = zstandard.ZstdCompressor().compress
    frames = [compress("".join(part).encode()) for part in (lines[40:45], lines[45:50])]
    (tmp_path / "packed.jsonl.zst").write_bytes(b"".join(frames))
    manifest = prepare_quietly(
        tmp_path,
        tmp_path / "folder",
        tmp_path / "single.md",
        tmp_path / "glob*" / "*.txt",
        tmp_path / "*.jsonl*",
    )
    found = documents_of(tmp_path / "out")
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert manifest.preparation["counts"]["files"] == 10 + 1 + 9 + 3


def test_links_are_followed_once_and_keep_their_kind(tmp_path: Path) -> None:
    texts = make_texts(30)
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "0123abcd"
    blob.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.jsonl").symlink_to(blob)
    (tmp_path / "b.jsonl").symlink_to(blob)
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nothing")
    counts = prepare_quietly(tmp_path, tmp_path / "*.jsonl").preparation["counts"]
    assert (counts["files"], counts["documents"], counts["duplicates"]) == (1, 30, 0)
    assert counts["not_files_examples"] == [str(tmp_path / "broken.jsonl")]


@pytest.mark.parametrize("item", ["links", "l*"])
def test_linked_folders_are_read_once(tmp_path: Path, item: str) -> None:
    texts = make_texts(30)
    write_texts(tmp_path / "real", texts)
    (tmp_path / "links" / "deep").mkdir(parents=True)
    (tmp_path / "links" / "sub").symlink_to("../real")
    (tmp_path / "links" / "deep" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "in_a_circle").symlink_to(tmp_path / "links")
    counts = prepare_quietly(tmp_path, tmp_path / item).preparation["counts"]
    assert (counts["files"], counts["documents"], counts["duplicates"]) == (30, 30, 0)


@pytest.mark.parametrize("pattern", ["", "*"])
def test_what_is_no_file_is_left_out_and_told(tmp_path: Path, pattern: str) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    os.mkfifo(tmp_path / "texts" / "pipe.txt")  # Reading it would never end.
    (tmp_path / "texts" / "nowhere").symlink_to(tmp_path / "nothing")
    (tmp_path / "texts" / "itself").symlink_to("itself")
    lines: list[str] = []
    manifest = prepare_quietly(tmp_path, tmp_path / "texts" / pattern, log=lines.append)
    counts = manifest.preparation["counts"]
    assert (counts["files"], counts["documents"], counts["not_files"]) == (30, 30, 3)
    (line,) = [line for line in lines if "skipped 3 names" in line]
    found = [str(tmp_path / "texts" / name) for name in ("itself", "nowhere", "pipe.txt")]
    assert sorted(counts["not_files_examples"]) == found
    assert all(name in line for name in found)


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    secret = tmp_path / "texts" / "secret"
    secret.mkdir()
    scandir = os.scandir

    def guarded(path):
        if path == str(secret):  # Of the superuser, modes would keep nothing.
            raise PermissionError(errno.EACCES, "Permission denied", str(secret))
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    with pytest.raises(DataError, match=rf"cannot read {secret}: Permission denied"):
        prepare_quietly(tmp_path, tmp_path / "texts")


def test_duplicates_and_empty_documents_are_dropped_before_the_split(tmp_path: Path) -> None:
    texts = make_texts(30)
    write_texts(tmp_path / "texts", texts + texts[:7] + ["", ""])
    manifest = prepare_quietly(tmp_path, tmp_path / "texts")
    counts = manifest.preparation["counts"]
    assert (counts["documents"], counts["duplicates"], counts["empty"]) == (30, 7, 2)
    found = documents_of(tmp_path / "out")
    assert sorted(found["train"] + found["validation"]) == sorted(texts)


def test_what_is_not_utf8_is_skipped_and_counted(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    (tmp_path / "texts" / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "lines.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": "na\xefve"}\n{"text": "\\ud800"}\n'
    )
    counts = prepare_quietly(tmp_path, tmp_path / "texts", tmp_path / "lines.jsonl").preparation[
        "counts"
    ]
    assert (counts["documents"], counts["not_utf8"]) == (31, 3)
    assert any("latin1.txt" in example for example in counts["not_utf8_examples"])
    assert any("lines.jsonl:2" in example for example in counts["not_utf8_examples"])


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    texts = make_texts(30)
    write_texts(tmp_path / "texts", texts)
    write_texts(tmp_path / "moved", texts)
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in texts)
    )
    first = prepare_quietly(tmp_path, tmp_path / "texts", output="1")
    same = [
        prepare_quietly(tmp_path, tmp_path / "moved", output="2", shard_tokens=5000),
        prepare_quietly(tmp_path, tmp_path / "lines.jsonl", output="3", text_key="body"),
    ]
    assert {manifest.hash for manifest in same} == {first.hash}
    (tmp_path / "texts" / "0003.txt").write_text("changed")
    others = [
        prepare_quietly(tmp_path, tmp_path / "texts", output="4"),
        prepare_quietly(tmp_path, tmp_path / "moved", output="5", validation_fraction=0.6),
        prepare_quietly(tmp_path, tmp_path / "moved", output="6", tokenizer="bpe:300"),
    ]
    assert len({manifest.hash for manifest in [first, *others]}) == 4


def test_max_bytes_stops_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(40))
    sizes = [path.stat().st_size for path in find_files([str(tmp_path / "texts")])]
    limit = sum(sizes[:20]) - 1
    manifest = prepare_quietly(tmp_path, tmp_path / "texts", max_bytes=limit)
    assert manifest.preparation["counts"]["documents"] == 20
    assert sum(split.text_bytes for split in manifest.splits.values()) == limit + 1


def test_bpe_is_trained_on_the_training_split_alone(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(40))
    prepare_quietly(tmp_path, tmp_path / "texts", tokenizer="bpe:290")
    found = documents_of(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer == Tokenizer.train_bpe(found["train"], 290)
    assert tokenizer != Tokenizer.train_bpe(found["train"] + found["validation"], 290)


def test_a_long_document_spans_records(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", [*make_texts(20), "0123456789" * 5000])
    prepare_quietly(tmp_path, tmp_path / "texts")
    found = documents_of(tmp_path / "out")
    assert "0123456789" * 5000 in found["train"] + found["validation"]


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    files = find_files(["stdlib"])
    assert {"argparse.py", "typing.py"} <= {path.name for path in files}
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in files)
    manifest = prepare_quietly(tmp_path, "stdlib", max_bytes=2_000_000)
    assert sum(split.text_bytes for split in manifest.splits.values()) >= 2_000_000


def test_prepared_data_is_found_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    first = prepare_quietly(tmp_path, tmp_path / "texts")
    marker = tmp_path / "out" / "manifest.json"
    before = marker.stat().st_mtime_ns
    assert prepare_quietly(tmp_path, tmp_path / "texts") == first
    assert marker.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"validation_fraction 0\.2 there, 0\.3 here"):
        prepare_quietly(tmp_path, tmp_path / "texts", validation_fraction=0.3)
    replaced = prepare_quietly(
        tmp_path, tmp_path / "texts", validation_fraction=0.3, overwrite=True
    )
    assert read_manifest(tmp_path / "out") == replaced != first
    assert [path.name for path in tmp_path.glob(".out.preparing*")] == []


def test_other_input_files_are_never_ignored(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    first = prepare_quietly(tmp_path, tmp_path / "texts")
    (tmp_path / "texts" / "new.txt").write_text("a new one")
    with pytest.raises(DataError, match=r"30 files of .* then, 31 files of .* now") as caught:
        prepare_quietly(tmp_path, tmp_path / "texts")
    assert "--overwrite true`" in str(caught.value)
    assert verify(tmp_path / "out") == first
    replaced = prepare_quietly(tmp_path, tmp_path / "texts", overwrite=True)
    assert replaced.preparation["counts"]["documents"] == 31
    (tmp_path / "texts" / "0007.txt").rename(tmp_path / "texts" / "renamed.txt")
    with pytest.raises(DataError, match="is not what it was prepared from"):
        prepare_quietly(tmp_path, tmp_path / "texts")
    assert verify(tmp_path / "out") == replaced


@pytest.mark.parametrize("name", ["tokenizer.json", "."])
def test_another_tokenizer_under_the_same_name_is_never_ignored(tmp_path: Path, name: str) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    settings = {"tokenizer": str(tmp_path / name)}
    (tmp_path / "tokenizer.json").write_text(Tokenizer.train_bpe(make_texts(30), 300).to_json())
    first = prepare_quietly(tmp_path, tmp_path / "texts", **settings)
    assert prepare_quietly(tmp_path, tmp_path / "texts", **settings) == first
    (tmp_path / "tokenizer.json").write_text(Tokenizer.train_bpe(make_texts(30), 310).to_json())
    with pytest.raises(DataError, match="is not what it was prepared from"):
        prepare_quietly(tmp_path, tmp_path / "texts", **settings)


def lines_of_second_preparation(tmp_path: Path, change: Callable[[], object]) -> list[str]:
    """What is printed when the input, or the manifest, has changed in a way that may not matter."""
    write_texts(tmp_path / "texts", make_texts(30))
    first = prepare_quietly(tmp_path, tmp_path / "texts")
    change()
    lines: list[str] = []
    assert prepare_quietly(tmp_path, tmp_path / "texts", log=lines.append).hash == first.hash
    assert lines.pop() == f"data: {tmp_path / 'out'} is prepared already"
    return lines


def test_the_same_input_is_no_news(tmp_path: Path) -> None:
    assert lines_of_second_preparation(tmp_path, lambda: None) == []


def test_the_same_library_is_no_news(tmp_path: Path) -> None:
    prepare_quietly(tmp_path, "stdlib", max_bytes=1_000_000)
    lines: list[str] = []
    prepare_quietly(tmp_path, "stdlib", max_bytes=1_000_000, log=lines.append)
    assert lines == [f"data: {tmp_path / 'out'} is prepared already"]


def test_the_library_of_another_python_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.sources._stdlib_files", lambda counts: [tmp_path / "a.py"])
    (tmp_path / "a.py").write_text("1")
    prepare_quietly(tmp_path, "stdlib", validation_fraction=0.0)
    (tmp_path / "a.py").write_text("123")
    monkeypatch.setattr("platform.python_version", lambda: "4.0.0")
    with pytest.raises(DataError, match=r"Python 3\.\S+ then, 4\.0\.0 now"):
        prepare_quietly(tmp_path, "stdlib", validation_fraction=0.0)


def test_input_that_is_gone_is_told(tmp_path: Path) -> None:
    (line,) = lines_of_second_preparation(tmp_path, lambda: shutil.rmtree(tmp_path / "texts"))
    assert "cannot be told" in line and f"{tmp_path / 'texts'}' does not exist" in line


def test_input_of_the_same_size_that_was_modified_is_told(tmp_path: Path) -> None:
    def touch() -> None:
        later = time.time() + 10
        os.utime(tmp_path / "texts" / "0003.txt", (later, later))

    (line,) = lines_of_second_preparation(tmp_path, touch)
    assert "were modified after it was prepared" in line and "--overwrite true`" in line


def test_a_manifest_that_does_not_record_its_input_is_still_good(tmp_path: Path) -> None:
    def forget() -> None:
        path = tmp_path / "out" / "manifest.json"
        content = json.loads(path.read_text())
        del content["preparation"]["input"]
        path.write_text(json.dumps(content))

    (line,) = lines_of_second_preparation(tmp_path, forget)
    assert "does not record which files" in line and "--overwrite true`" in line


def test_the_output_is_no_input_of_its_own(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    first = prepare_quietly(tmp_path / "texts", tmp_path / "texts")
    assert prepare_quietly(tmp_path / "texts", tmp_path / "texts") == first
    assert prepare_quietly(tmp_path / "texts", tmp_path / "texts", overwrite=True) == first


def test_preparing_at_the_same_time_is_done_once(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(100))
    config = PrepareConfig(
        input=(str(tmp_path / "texts"),), output=str(tmp_path / "out"), validation_fraction=0.2
    )
    lines: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        manifests = list(
            pool.map(lambda _: prepare(config, progress=False, log=lines.append), range(4))
        )
    assert all(manifest == manifests[0] for manifest in manifests)
    assert sum("wrote" in line for line in lines) == 1
    assert sum("prepared already" in line for line in lines) == 3


NEVER_DONE = """
import runpy, time
from train.data import sources

def read_documents(files, **settings):
    time.sleep(600)
    yield ""

sources.read_documents = read_documents
runpy.run_module("train.prepare_data", run_name="__main__", alter_sys=True)
"""


def stopped_by(number: signal.Signals, tmp_path: Path) -> tuple[int, list[Path]]:
    """Exit status of a preparation stopped in the middle, and what it had written by then."""
    write_texts(tmp_path / "texts", make_texts(30))
    command = [sys.executable, "-c", NEVER_DONE, "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--input", str(tmp_path / "texts")], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (left := list(tmp_path.glob(".out.preparing-*/tokenizer.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(number)
        process.wait(60)
    return process.returncode, left


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stopped_preparation_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    status, left = stopped_by(number, tmp_path)
    assert status == EXIT_RESUMABLE and left
    assert {path.name for path in tmp_path.iterdir()} == {"texts", ".out.lock"}


def test_killed_preparation_starts_over(tmp_path: Path) -> None:
    _, left = stopped_by(signal.SIGKILL, tmp_path)
    assert left and not (tmp_path / "out").exists()
    lines: list[str] = []
    config = PrepareConfig(
        input=(str(tmp_path / "texts"),), output=str(tmp_path / "out"), validation_fraction=0.2
    )
    manifest = prepare(config, progress=False, log=lines.append)
    assert any("interrupted" in line and str(left[0].parent) in line for line in lines)
    assert not list(tmp_path.glob(".out.preparing-*"))
    assert manifest.preparation["counts"]["documents"] == 30
    assert verify(tmp_path / "out") == manifest


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(5))
    (tmp_path / "texts" / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2 is not JSON"):
        prepare_quietly(tmp_path, tmp_path / "texts")
    assert {path.name for path in tmp_path.iterdir()} == {"texts", ".out.lock"}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_check_between_documents_ends_it_and_leaves_nothing(
    tmp_path: Path, tokenizer: str
) -> None:
    class StopHereError(Exception):
        pass

    asked = []

    def check() -> None:
        asked.append(True)
        if len(asked) == 3:
            raise StopHereError

    write_texts(tmp_path / "in", make_texts(8))
    config = PrepareConfig(
        input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), tokenizer=tokenizer
    )
    with pytest.raises(StopHereError):
        prepare(config, progress=False, log=quiet, check=check)
    assert len(asked) == 3 and not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "preparing" in path.name]


def test_an_interrupt_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    monkeypatch.setattr("train.prepare_data._BATCH_BYTES", 1)

    # In the middle of a document: the shard has a record that nothing has counted.
    open_shard = SplitWriter._shard

    class Shard:
        def __init__(self, shard):
            self.shard = shard

        def write(self, payload):
            self.shard.write(payload)
            raise KeyboardInterrupt

    monkeypatch.setattr(SplitWriter, "_shard", lambda self: Shard(open_shard(self)))
    arguments = ["--input", str(tmp_path / "texts"), "--output", str(tmp_path / "out")]
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert main(arguments) == EXIT_RESUMABLE
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert capsys.readouterr().err.strip().startswith("Stopped: nothing was kept")
    assert {path.name for path in tmp_path.iterdir()} == {"texts", ".out.lock"}


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_compressed_input(tmp_path: Path, suffix: str) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(30)).encode()
    packed = (
        gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor().compress(content)
    )
    path = tmp_path / f"lines.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=rf"lines\.jsonl\.{suffix} is damaged or truncated"):
        prepare_quietly(tmp_path, path)
    path.write_bytes(b"this is not compressed at all")
    with pytest.raises(DataError, match=rf"lines\.jsonl\.{suffix} is damaged"):
        prepare_quietly(tmp_path, path)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt' does not exist"):
        prepare_quietly(tmp_path, tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"\*\.none' matches no file"):
        prepare_quietly(tmp_path, tmp_path / "*.none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty' matches no file"):
        prepare_quietly(tmp_path, tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(DataError, match=r"no documents in .*1 documents empty"):
        prepare_quietly(tmp_path, tmp_path / "empty")
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(DataError, match="validation split; raise validation_fraction"):
        prepare_quietly(tmp_path, tmp_path / "one.txt", validation_fraction=1e-6)
    (tmp_path / "lines.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"jsonl:1 has no key 'text' \(found \['body'\]\)"):
        prepare_quietly(tmp_path, tmp_path / "lines.jsonl")
    (tmp_path / "lines.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match="of type int, expected a string"):
        prepare_quietly(tmp_path, tmp_path / "lines.jsonl")
    with pytest.raises(DataError, match="tokenizer: cannot read"):
        prepare_quietly(tmp_path, tmp_path / "one.txt", tokenizer=str(tmp_path / "no.json"))
    with pytest.raises(DataError, match=r"output .*one\.txt/data cannot be prepared: .*one\.txt"):
        prepare_quietly(tmp_path, tmp_path / "one.txt", output="one.txt/data")
    with pytest.raises(DataError, match="is not a data directory"):
        prepare_quietly(tmp_path, tmp_path / "one.txt", output="empty")


@pytest.mark.parametrize(
    "value", ["1" * 5000, "[" * 200_000 + "]" * 200_000], ids=["long number", "deep list"]
)
def test_json_beyond_what_python_reads_is_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "lines.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "b", "x": {value}}}\n')
    with pytest.raises(DataError, match=r"lines\.jsonl:2 is JSON that Python cannot read: \w+"):
        prepare_quietly(tmp_path, tmp_path / "lines.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": ()}, "input"),
        ({"output": ""}, "output"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1\.0"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"tokenizer": "bpe:many"}, "bpe:many"),
        ({"tokenizer": "bpe:257"}, "bpe:257.* at least 258"),
        ({"tokenizer": ""}, "tokenizer is empty"),
        ({"input": ("",)}, "has an empty name"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PrepareConfig(**{"input": ("x",), "output": "y"} | settings)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_texts(tmp_path / "a", make_texts(20))
    write_texts(tmp_path / "b", make_texts(20, seed=1))
    output = str(tmp_path / "new" / "out")
    arguments = ["--input", str(tmp_path / "a"), str(tmp_path / "b"), "--output", output]
    assert main([*arguments, "--tokenizer", "bpe:300", "--validation_fraction", "0.2"]) == 0
    assert "40 documents" in capsys.readouterr().out
    assert read_manifest(output).vocab_size == 300
    assert main(["--verify", output]) == 0
    assert "is intact" in capsys.readouterr().out
    assert main(["--input", str(tmp_path / "c"), "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data: ") and error.count("\n") == 1
    assert main(["--help"]) == 0
    assert "--validation_fraction" in capsys.readouterr().out


def test_settings_of_a_file_under_those_of_the_command_line(tmp_path: Path) -> None:
    write_texts(tmp_path / "a", make_texts(20))
    file = tmp_path / "settings.yaml"
    file.write_text(f"input: [{tmp_path}/a]\noutput: {tmp_path}/out\nvalidation_fraction: 2e-1\n")
    assert main(["--config", str(file), "--tokenizer=bpe:300", "--max_bytes", "null"]) == 0
    recorded = read_manifest(tmp_path / "out").preparation["config"]
    assert (recorded["validation_fraction"], recorded["tokenizer"]) == (0.2, "bpe:300")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--no_such_setting 3", "unknown key 'no_such_setting'"),
        ("--text_keys 3", "unknown key 'text_keys'; did you mean text_key?"),
        ("--max_bytes many", "max_bytes=many: expected an integer or null"),
        ("--overwrite maybe", "overwrite=maybe: expected true or false"),
        ("--validation_fraction null", "validation_fraction=null: expected a number"),
        ("--validation_fraction 2", "data: validation_fraction=2.0 must be"),
        ("--input", "--input: a value is missing"),
        ("--input c", "--input: given twice, with ['a', 'b'] and ['c']"),
        ("--text_key a b", "'b' on the command line: expected --key value"),
        ("--verify out", "--verify and --input: give one of them"),
        ("--config absent.yaml", "--config absent.yaml: No such file"),
        ("--config {file}", "max_bytes='3': expected an integer or null"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: str, expected: str
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text('max_bytes: "3"\n')
    given = ["--input", "a", "b", "--output", str(tmp_path / "out")]
    assert main([*given, *arguments.format(file=file).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")


def test_damage_is_found(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(30))

    def damaged(name: str, change) -> Path:
        output = tmp_path / name
        prepare_quietly(tmp_path, tmp_path / "texts", output=name)
        change(output)
        return output

    def open_both(directory: Path) -> None:
        for name in ("train", "validation"):
            open_split(directory, name, context=64, seed=0)

    def truncate(directory: Path) -> None:
        shard = directory / "train-00000.arrayrecord"
        os.truncate(shard, shard.stat().st_size - 100)

    def flip(name: str):
        def change(directory: Path) -> None:
            content = bytearray((directory / name).read_bytes())
            content[len(content) // 2] ^= 1
            (directory / name).write_bytes(content)

        return change

    with pytest.raises(DataError, match=r"train-00000\.arrayrecord is truncated"):
        open_both(damaged("truncated", truncate))
    with pytest.raises(DataError, match=r"validation-00000\.arrayrecord is missing"):
        open_both(damaged("gone", lambda d: (d / "validation-00000.arrayrecord").unlink()))
    with pytest.raises(DataError, match=r"train-lengths\.npy has changed"):
        open_both(damaged("lengths", flip("train-lengths.npy")))
    with pytest.raises(DataError, match=r"tokenizer\.json has changed"):
        open_both(damaged("tokenizer", flip("tokenizer.json")))
    with pytest.raises(DataError, match=r"train-00000\.arrayrecord has changed"):
        verify(damaged("flipped", flip("train-00000.arrayrecord")))
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        open_both(damaged("unmanifest", lambda d: (d / "manifest.json").unlink()))

    def edit(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(path.read_text().replace('"dtype": "uint16"', '"dtype": "uint8"'))

    with pytest.raises(DataError, match="was changed"):
        open_both(damaged("edited", edit))
    with pytest.raises(DataError, match="is not a manifest"):
        open_both(damaged("cut", lambda d: os.truncate(d / "manifest.json", 40)))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("train-00000.arrayrecord", "is truncated: 10 bytes"),
        ("validation-lengths.npy", "has changed"),
        ("tokenizer.json", "has changed"),
    ],
)
def test_damaged_data_is_prepared_again(tmp_path: Path, name: str, problem: str) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    first = prepare_quietly(tmp_path, tmp_path / "texts")
    os.truncate(tmp_path / "out" / name, 10)
    lines: list[str] = []
    again = prepare_quietly(tmp_path, tmp_path / "texts", log=lines.append)
    assert again == first == verify(tmp_path / "out")
    assert f"{name} " in lines[0] and problem in lines[0]
    assert lines[0].endswith(f"; preparing {tmp_path / 'out'} again")
    assert not any("others than before" in line for line in lines)


def test_damage_names_the_command_that_mends_it(tmp_path: Path) -> None:
    write_texts(tmp_path / "my texts", make_texts(30))
    first = prepare_quietly(tmp_path, tmp_path / "my texts", tokenizer="bpe:300")
    (tmp_path / "out" / "train-lengths.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-lengths\.npy has changed") as caught:
        opened(tmp_path)
    _, command = str(caught.value).split("prepare the data again with ")
    python, option, module, *arguments = shlex.split(command.strip("`"))
    assert (python, option, module) == ("python", "-m", "train.prepare_data")
    assert main(arguments) == 0
    assert verify(tmp_path / "out") == first


def test_other_tokens_in_the_place_of_some_are_told(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    prepare_quietly(tmp_path, tmp_path / "texts")
    lines: list[str] = []
    prepare_quietly(tmp_path, tmp_path / "texts", overwrite=True, log=lines.append)
    assert not any("others than before" in line for line in lines)
    (tmp_path / "texts" / "0003.txt").write_text("changed")
    prepare_quietly(tmp_path, tmp_path / "texts", overwrite=True, log=lines.append)
    assert "others than before" in lines[-1]


def test_flipped_bytes_in_a_shard_never_become_other_tokens(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", make_texts(30))
    prepare_quietly(tmp_path, tmp_path / "texts")
    shard = tmp_path / "out" / "train-00000.arrayrecord"
    content = shard.read_bytes()
    sound = [tokens.copy() for tokens in opened(tmp_path).documents()]
    detected = 0
    for position in range(200, 4000, 371):
        flipped = bytearray(content)
        flipped[position] ^= 4
        shard.write_bytes(flipped)
        try:
            found = list(opened(tmp_path).documents())
        except DataError:
            detected += 1
            continue
        for a, b in zip(sound, found, strict=True):
            np.testing.assert_array_equal(a, b)
    assert detected > 0


def opened(tmp_path: Path):
    return open_split(tmp_path / "out", "train", context=64, seed=0)

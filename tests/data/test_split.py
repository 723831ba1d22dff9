"""Rows of a split: segments, masks, positions; batches by step; what is refused."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpus import make_texts, quiet, write_texts

from train.data import DataError, Split, open_split
from train.prepare_data import PrepareConfig, prepare


def pieces_of(row: dict[str, np.ndarray]) -> list[list[int]]:
    """The tokens of each segment of a row."""
    ids = row["segment_ids"]
    return [row["tokens"][ids == i].tolist() for i in range(1, ids.max() + 1)]


def test_an_epoch_holds_every_token_of_every_document_once(split: Split) -> None:
    found = sorted(
        piece for index in range(split.num_rows) for piece in pieces_of(split.row(0, index))
    )
    wanted = sorted(
        document[start : start + 128].tolist()
        for document in split.documents()
        for start in range(0, len(document), 128)
    )
    assert found == wanted
    assert sum(map(len, found)) == split.num_tokens
    assert len(found) == split.num_segments


def test_rows_are_full_and_counted(split: Split) -> None:
    lengths = [len(document) for document in split.documents()]
    assert split.num_cut_documents == sum(length > 128 for length in lengths) > 0
    assert split.num_cut_documents < split.num_documents == len(lengths)
    assert split.fill >= 0.97
    assert f"{100 * split.fill:.2f} % full" in split.summary()
    np.testing.assert_array_equal(
        split.segment_lengths(),
        np.bincount(
            [min(128, length - start) for length in lengths for start in range(0, length, 128)],
            minlength=129,
        ),
    )


def test_rows_that_cannot_be_full_are_said_to_be_so(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", [f"{i:038d}" for i in range(40)])  # 40 tokens each.
    config = PrepareConfig(
        input=(str(tmp_path / "texts"),), output=str(tmp_path / "out"), validation_fraction=0.0
    )
    prepare(config, progress=False, log=quiet)
    split = open_split(tmp_path / "out", "train", context=64, seed=0)
    assert (split.num_rows, split.fill, split.num_cut_documents) == (40, 0.625, 0)
    assert "62.50 % full (another context would waste less)" in split.summary()


def test_masks_targets_and_positions(split: Split) -> None:
    targets = 0
    for index in range(split.num_rows):
        row = split.row(0, index)
        ids, mask = row["segment_ids"], row["loss_mask"]
        tokens = ids > 0
        # Segments count up from 1 without a gap, then padding.
        steps = np.diff(ids[tokens])
        assert ids[0] == 1 and ((steps == 0) | (steps == 1)).all()
        assert not tokens[tokens.sum() :].any()
        same = np.append(ids[1:] == ids[:-1], False) & tokens
        np.testing.assert_array_equal(mask, same)
        np.testing.assert_array_equal(row["targets"][:-1][mask[:-1]], row["tokens"][1:][mask[:-1]])
        starts = np.flatnonzero(np.diff(ids, prepend=0) > 0)
        expected = np.zeros(128, int)
        for start in starts:
            expected[start:] = np.arange(128 - start)
        np.testing.assert_array_equal(row["positions"], np.where(tokens, expected, 0))
        for name in ("tokens", "targets", "positions"):
            assert row[name].dtype == np.int32
            assert not row[name][~tokens].any()
        assert not row["targets"][~mask].any()
        targets += mask.sum()
    assert targets == split.num_targets


def test_documents_that_fit_stay_whole(split: Split) -> None:
    tokenizer = split.tokenizer
    for index in range(split.num_rows):
        for piece in pieces_of(split.row(0, index)):
            begins, ends = piece[0] == tokenizer.bos_id, piece[-1] == tokenizer.eos_id
            # A piece that is not a whole document is full, or the end of a cut one.
            assert (begins and ends) or len(piece) == 128 or ends


def test_batches_go_through_epochs_without_leaving_out_a_row(split: Split) -> None:
    batch_size, epochs = 37, 3
    assert split.num_rows % batch_size  # So epochs end inside a batch.
    steps = -(-epochs * split.num_rows // batch_size)
    rows = np.concatenate([split.batch_rows(step, batch_size) for step in range(steps)])
    by_epoch = rows[: epochs * split.num_rows].reshape(epochs, split.num_rows)
    for epoch in by_epoch:
        assert sorted(epoch.tolist()) == list(range(split.num_rows))
    assert (by_epoch[0] != by_epoch[1]).any() and (by_epoch[1] != by_epoch[2]).any()
    far = 10**12
    np.testing.assert_array_equal(
        split.batch_rows(far, 8)[3:5],
        split.locate(np.array([8 * far + 3, 8 * far + 4])),
    )


def test_the_seed_decides_packing_and_order(data_directory: Path, split: Split) -> None:
    again = open_split(data_directory, "train", context=128, seed=7)
    other = open_split(data_directory, "train", context=128, seed=8)
    first = [split.row(0, i)["tokens"] for i in range(5)]
    assert all(np.array_equal(a, again.row(0, i)["tokens"]) for i, a in enumerate(first))
    assert not all(np.array_equal(a, other.row(0, i)["tokens"]) for i, a in enumerate(first))
    assert split.identity() == again.identity() != other.identity()


def copy_of(data_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_directory, tmp_path / "copy"))


def test_the_plan_is_stored_found_again_and_made_again_when_damaged(
    data_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = copy_of(data_directory, tmp_path)
    shutil.rmtree(directory / "plans", ignore_errors=True)
    row = open_split(directory, "train", context=96, seed=3).row(0, 0)["tokens"]
    (path,) = (directory / "plans").iterdir()
    before = path.stat().st_mtime_ns
    open_split(directory, "train", context=96, seed=3)
    assert path.stat().st_mtime_ns == before and not caplog.records
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"abc")
    found = open_split(directory, "train", context=96, seed=3).row(0, 0)["tokens"]
    np.testing.assert_array_equal(found, row)
    assert "is damaged and is made again" in caplog.text
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    data_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: Split
) -> None:
    directory = copy_of(data_directory, tmp_path)
    shutil.rmtree(directory / "plans", ignore_errors=True)
    (directory / "plans").write_text("in the way")
    found = open_split(directory, "train", context=128, seed=7)
    assert "stays in memory" in caplog.text
    for opened in (found, pickle.loads(pickle.dumps(found))):
        np.testing.assert_array_equal(opened.row(1, 4)["tokens"], split.row(1, 4)["tokens"])


def test_pickled_splits_are_small_and_equal(split: Split) -> None:
    pickled = pickle.dumps(split)
    assert len(pickled) < 5000
    np.testing.assert_array_equal(
        pickle.loads(pickled).row(0, 3)["tokens"], split.row(0, 3)["tokens"]
    )


def test_what_does_not_fit_is_refused(data_directory: Path, split: Split, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'"):
        open_split(data_directory, "test", context=64, seed=0)
    with pytest.raises(DataError, match="context=1 is too small"):
        open_split(data_directory, "train", context=1, seed=0)
    split.check_vocabulary(258)
    with pytest.raises(DataError, match=r"model\.vocab_size=257 is smaller than the 258"):
        split.check_vocabulary(257)
    write_texts(tmp_path / "texts", make_texts(5))
    config = PrepareConfig(
        input=(str(tmp_path / "texts"),), output=str(tmp_path / "out"), validation_fraction=0.0
    )
    prepare(config, progress=False, log=quiet)
    with pytest.raises(DataError, match=r"validation split of .* is empty"):
        open_split(tmp_path / "out", "validation", context=64, seed=0)

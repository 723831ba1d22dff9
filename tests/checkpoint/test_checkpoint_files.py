"""The manifest finds every kind of damage to every file, and names the file."""

import json

import pytest

from nha_jax.models.checkpoint_files import (
    MANIFEST,
    DamagedCheckpointError,
    step_directories,
    verify,
    write_manifest,
)

CONTENT = {
    "root.json": b"{}",
    "params/d/0a": bytes(range(256)) * 40,
    "params/manifest": b"abc",
    "training/d/0b": b"\x00" * 100,
    "empty": b"",
}


@pytest.fixture
def checkpoint(tmp_path):
    root = tmp_path / "7"
    for name, content in CONTENT.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_manifest(root)
    return root


def test_sound_checkpoint_passes(checkpoint):
    assert set(verify(checkpoint)) == set(CONTENT)
    assert not list(checkpoint.glob("*.tmp"))


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(DamagedCheckpointError, match="is missing") as caught:
        verify(checkpoint)
    assert caught.value.file == name
    assert str(checkpoint / "") in f"{caught.value.checkpoint}/"
    assert name in str(caught.value)


@pytest.mark.parametrize("name", [name for name in CONTENT if CONTENT[name]])
def test_truncated_file_is_named_with_its_sizes(checkpoint, name):
    path = checkpoint / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=f"{size - 1:,} bytes instead of {size:,}"):
        verify(checkpoint)


@pytest.mark.parametrize("name", [name for name in CONTENT if CONTENT[name]])
def test_one_flipped_bit_is_found(checkpoint, name):
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="changed bytes") as caught:
        verify(checkpoint)
    assert caught.value.file == name


def test_every_byte_of_the_manifest_counts(checkpoint):
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(DamagedCheckpointError) as caught:
            verify(checkpoint)
        assert caught.value.file == MANIFEST


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"files": 3}'])
def test_manifest_of_another_shape_is_damage(checkpoint, content):
    (checkpoint / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=MANIFEST):
        verify(checkpoint)


def test_unknown_manifest_field_is_damage(checkpoint):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=MANIFEST):
        verify(checkpoint)


def test_items_limit_what_is_read(checkpoint):
    (checkpoint / "training/d/0b").write_bytes(b"\x01" * 100)
    assert set(verify(checkpoint, ["params"])) == {
        "root.json",
        "empty",
        "params/d/0a",
        "params/manifest",
    }
    with pytest.raises(DamagedCheckpointError, match="training/d/0b"):
        verify(checkpoint, ["training"])


def test_a_new_file_is_no_damage(checkpoint):
    (checkpoint / "note.txt").write_text("kept this one")
    verify(checkpoint)


def test_step_directories_in_order_of_steps(tmp_path):
    for name in ["10", "9", "0", "007", "11.damaged", "12.unfinished", "x", "-3"]:
        (tmp_path / name).mkdir()
    assert list(step_directories(tmp_path)) == [0, 9, 10]
    assert step_directories(tmp_path / "nowhere") == {}

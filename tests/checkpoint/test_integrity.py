"""Start-up: leftovers go, damaged checkpoints stay aside, the newest sound one is used."""

import subprocess
import sys

import pytest

from nha_jax.models.checkpoint_files import step_directories, verify, write_manifest
from train import integrity


def make_checkpoint(root, step, content=b"some bytes"):
    folder = root / str(step)
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "0").write_bytes(content)
    write_manifest(folder)
    return folder


def damage_by_flip(folder):
    path = folder / "params" / "0"
    path.write_bytes(b"Some bytes")


def damage_by_truncation(folder):
    path = folder / "params" / "0"
    path.write_bytes(b"")


def damage_by_loss(folder):
    (folder / "params" / "0").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").unlink()


DAMAGES = [damage_by_flip, damage_by_truncation, damage_by_loss, damage_manifest]


def test_newest_sound_of_nothing_is_none(tmp_path):
    assert integrity.newest_sound(tmp_path, print) is None
    assert integrity.newest_sound(tmp_path / "nowhere", print) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_kept_and_passed_over(tmp_path, damage):
    make_checkpoint(tmp_path, 5)
    newest = make_checkpoint(tmp_path, 10)
    damage(newest)
    kept = sorted(path.relative_to(newest) for path in newest.rglob("*"))
    lines = []

    assert integrity.newest_sound(tmp_path, lines.append) == 5

    aside = tmp_path / "10.damaged"
    assert not newest.exists()
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == kept
    name = "manifest.json" if damage is damage_manifest else "params/0"
    assert len(lines) == 1
    assert str(newest) in lines[0] and name in lines[0] and str(aside) in lines[0]


def test_a_file_in_the_place_of_the_newest_is_passed_over_too(tmp_path):
    make_checkpoint(tmp_path, 5)
    (tmp_path / "10").write_text("no folder")
    lines = []
    assert integrity.newest_sound(tmp_path, lines.append) == 5
    assert (tmp_path / "10.damaged").read_text() == "no folder"
    assert len(lines) == 1 and str(tmp_path / "10.damaged") in lines[0]


def test_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(tmp_path):
    make_checkpoint(tmp_path, 5)
    for count in (1, 2, 3):
        damage_by_loss(make_checkpoint(tmp_path, 10))
        integrity.newest_sound(tmp_path, print)
        assert len(list(tmp_path.glob("10.damaged*"))) == count


def test_none_sound_stops_and_goes_on_stopping(tmp_path):
    for step in (5, 10):
        damage_by_flip(make_checkpoint(tmp_path, step))
    for _ in range(2):  # the second start finds only what the first set aside
        with pytest.raises(integrity.NoSoundCheckpointError, match=r"5\.damaged"):
            integrity.newest_sound(tmp_path, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.damaged", "5.damaged"]


def test_sound_newest_leaves_damaged_older_alone(tmp_path):
    damage_by_flip(make_checkpoint(tmp_path, 5))
    make_checkpoint(tmp_path, 10)
    assert integrity.newest_sound(tmp_path, print) == 10
    assert list(step_directories(tmp_path)) == [5, 10]


def test_leftovers_are_removed_with_a_line_each(tmp_path):
    sound = make_checkpoint(tmp_path, 5)
    leftovers = ["10.unfinished.orbax-checkpoint-tmp", "15.unfinished", "3.deleting"]
    for name in leftovers:
        (tmp_path / name / "params").mkdir(parents=True)
        (tmp_path / name / "params" / "0").write_bytes(b"half")
    (tmp_path / "4.damaged").mkdir()
    (tmp_path / "notes.unfinished").write_text("a file of the user's")
    lines = []
    integrity.remove_leftovers(tmp_path, lines.append)
    remaining = {"5", "4.damaged", "notes.unfinished"}
    assert {path.name for path in tmp_path.iterdir()} == remaining
    assert len(lines) == 3
    for name in leftovers:
        assert any(str(tmp_path / name) in line and "interrupted" in line for line in lines)
    verify(sound)


def test_deletion_interrupted_at_any_point_leaves_only_a_leftover(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, 5)

    def interrupted(path):
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(integrity.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        integrity.delete_checkpoint(folder)
    monkeypatch.undo()
    assert step_directories(tmp_path) == {}
    integrity.remove_leftovers(tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_an_error_with_the_numbers(tmp_path, monkeypatch):
    usage = integrity.shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(integrity.shutil, "disk_usage", lambda path: usage)
    integrity.check_free_space(tmp_path, 2**29)
    with pytest.raises(integrity.DiskFullError, match=r"1,073,741,824 bytes free") as caught:
        integrity.check_free_space(tmp_path, 2**30)
    assert str(tmp_path) in str(caught.value)


def test_two_processes_cannot_share_a_folder(tmp_path):
    program = (
        "import sys, pathlib; from train import integrity\n"
        "integrity.lock_directory(pathlib.Path(sys.argv[1]))\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(integrity.DirectoryInUseError, match=str(tmp_path)):
            integrity.lock_directory(tmp_path)
        other.kill()
        other.wait()
        integrity.lock_directory(tmp_path)  # a killed process holds nothing

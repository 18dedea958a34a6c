"""The directory of a checkpoint appears whole or not at all, and nothing else is touched."""

import os
import shutil
from pathlib import Path

import pytest

from dropserve.model.checkpoint import CheckpointError, Output
from tests.model.toys import tree


def write(place: Path, text: str = "new") -> None:
    """Write a directory that looks like a checkpoint at ``place``."""
    with Output(place) as output:
        (output.staging / "checkpoint.json").write_text(text)
        (output.staging / text).write_text(text)
        output.commit()


def fail_in_the_middle(place: Path) -> None:
    """Raise KeyError with half of the files written."""
    with Output(place) as output:
        (output.staging / "half").write_text("written")
        raise KeyError


def test_an_output_appears_whole_and_readable(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "er" / "toy"
    write(place)
    assert tree(tmp_path) == [
        "deep",
        "deep/er",
        "deep/er/toy",
        "deep/er/toy/checkpoint.json",
        "deep/er/toy/new",
    ]
    assert place.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("place", ["toy", "deep/er/toy"])
def test_nothing_appears_when_the_work_fails(tmp_path: Path, place: str) -> None:
    with pytest.raises(KeyError):
        fail_in_the_middle(tmp_path / place)
    assert tree(tmp_path) == []


def test_nothing_appears_without_commit(tmp_path: Path) -> None:
    with Output(tmp_path / "toy") as output:
        (output.staging / "file").write_text("written")
    assert tree(tmp_path) == []


def test_an_older_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "toy", "old")
    with pytest.raises(KeyError):
        fail_in_the_middle(tmp_path / "toy")
    assert tree(tmp_path) == ["toy", "toy/checkpoint.json", "toy/old"]
    write(tmp_path / "toy", "new")
    assert tree(tmp_path) == ["toy", "toy/checkpoint.json", "toy/new"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    write(tmp_path / "toy")
    assert tree(tmp_path) == ["toy", "toy/checkpoint.json", "toy/new"]


def test_an_older_checkpoint_is_replaced_despite_the_leftovers_of_a_killed_run(
    tmp_path: Path,
) -> None:
    write(tmp_path / "toy", "old")
    # The leftovers of a run that was killed between the two renames of its commit.
    shutil.copytree(tmp_path / "toy", tmp_path / ".toy.old")
    write(tmp_path / "toy", "new")
    assert (tmp_path / "toy" / "new").is_file()


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "toy").symlink_to(tmp_path / "disk")
    write(tmp_path / "toy", "old")
    write(tmp_path / "toy", "new")
    assert (tmp_path / "toy").is_symlink()
    assert tree(tmp_path) == ["disk", "disk/checkpoint.json", "disk/new", "toy"]


def test_the_working_directory_can_be_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path / "toy")
    write(Path("."))
    assert tree(tmp_path) == ["toy", "toy/checkpoint.json", "toy/new"]


def test_a_place_that_holds_no_checkpoint_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("content")
    before = tree(tmp_path)
    for name in ("folder", "file"):
        with pytest.raises(CheckpointError, match=f"{name} is there already"):
            Output(tmp_path / name)
    assert tree(tmp_path) == before


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    # Not even root can write below a regular file.
    (tmp_path / "file").write_text("content")
    for place in (tmp_path / "file" / "toy", tmp_path / "file" / "deep" / "toy"):
        with pytest.raises(CheckpointError, match="cannot write to") as refused:
            Output(place)
        assert str(place) in str(refused.value)
    assert os.listdir(tmp_path) == ["file"]

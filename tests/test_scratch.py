"""Folders for temporary files outlive their process only until the next one comes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.caching.plan import clean
from qskd.storage import scratch
from qskd.storage.scratch import scratch_folder

HOLD = """
import time
from qskd.storage.scratch import scratch_folder
with scratch_folder("held") as folder:
    (folder / "file").write_text("something")
    print(folder, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    scratch._remove_orphans.cache_clear()
    return tmp_path


def test_nothing_is_left_after_the_block_even_when_it_raises(temporary: Path) -> None:
    def fail() -> None:
        with scratch_folder("mine") as folder:
            (folder / "below").mkdir()
            assert folder.parent == temporary
            raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        fail()
    assert not list(temporary.iterdir())


def test_a_killed_process_s_folder_goes_with_the_next_one_and_a_living_one_s_stays(temporary: Path) -> None:
    dead, alive = (subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        folders = [Path(process.stdout.readline().strip()) for process in (dead, alive) if process.stdout]
        dead.send_signal(signal.SIGKILL)
        dead.wait(10)
        assert all((folder / "file").exists() for folder in folders)
        with scratch_folder("next"):
            assert not folders[0].exists()
            assert (folders[1] / "file").exists()
    finally:
        alive.kill()
        alive.wait(10)


def test_what_a_killed_cache_job_left_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    hold = "import time; from qskd.storage.scratch import locked_folder\n"
    hold += "with locked_folder('.writing-', FOLDER) as folder: print(folder, flush=True); time.sleep(100)"
    command = [sys.executable, "-c", hold.replace("FOLDER", repr(str(tmp_path)))]
    dead, alive = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        folders = [Path(process.stdout.readline().strip()) for process in (dead, alive) if process.stdout]
        dead.kill()
        dead.wait(10)
        clean(str(tmp_path))
        assert [folder.exists() for folder in folders] == [False, True]
    finally:
        alive.kill()
        alive.wait(10)


def test_folders_that_are_not_ours_stay(temporary: Path) -> None:
    other = temporary / "someone-s"
    other.mkdir()
    aim = temporary / "aim"
    aim.mkdir()
    (temporary / f"{scratch.PREFIX}link").symlink_to(aim)
    with scratch_folder("mine"):
        pass
    assert other.exists()
    assert aim.exists()


def test_a_folder_removed_before_it_was_locked_is_made_again(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, seen = scratch._lock, []

    def another_was_faster(handle: int, wait: bool) -> bool:
        if not seen:
            (first,) = temporary.glob(f"{scratch.PREFIX}*")
            first.rmdir()
        seen.append(handle)
        return lock(handle, wait)

    monkeypatch.setattr(scratch, "_lock", another_was_faster)
    with scratch_folder("mine") as folder:
        assert folder.exists()
    assert len(seen) == 2


def test_a_file_system_without_locks_still_gives_a_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_lock", lambda handle, wait: False)
    began = time.monotonic()
    with scratch_folder("mine") as folder:
        assert os.listdir(temporary) == [folder.name]
    assert time.monotonic() - began < 5

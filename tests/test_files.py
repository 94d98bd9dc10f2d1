"""The writers of files and folders, under kills and beside each other."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from kit import die_at

from smlstm.data.files import (
    FolderInUse,
    atomic_file,
    code_digest,
    find_committed,
    identity,
    is_sealed,
    lock_folder,
    locked,
    remove_torn,
    write_file,
    write_json,
    write_together,
)

FORK = multiprocessing.get_context("fork")
STEPS = ((os, "fsync"), (os, "replace"), (os, "open"), (Path, "unlink"), (Path, "mkdir"))


def in_a_child(work, *arguments):
    "Exit code of a process that does this."
    child = FORK.Process(target=work, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def write_and_die(path, moment):
    die_at(moment, *STEPS)
    write_file(path, "new" * 1000)


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    outcomes = set()
    for moment in range(20):
        path = write_file(tmp_path / f"{moment}.txt", "old" * 1000)
        code = in_a_child(write_and_die, path, moment)
        text = path.read_text()
        assert text in ("old" * 1000, "new" * 1000)
        outcomes.add((code, text[:3]))
        if code == 0:
            break
    assert outcomes == {(-9, "old"), (-9, "new"), (0, "new")}
    with lock_folder(tmp_path):
        assert not list(tmp_path.glob("*.tmp*"))  # whoever holds the lock removes what was torn


def test_torn_files_of_others_stay_until_they_are_old(tmp_path):
    young, old, other = (tmp_path / f".{name}.tmp" for name in ("a.1", "a.2", "b.1"))
    for path in (young, old, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    write_file(tmp_path / "a", "text")
    assert (young.exists(), old.exists(), other.exists()) == (True, False, True)
    remove_torn(tmp_path, older_than=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_refused_write_names_the_file_and_leaves_it(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", {"n": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: make room.*a.json") as error:
        write_json(path, {"n": 2})
    assert error.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"n": 1} and list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_block_is_not_dressed_up(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def write_pair_and_die(folder, moment):
    die_at(moment, *STEPS)
    write_together(folder, {"a": b"new" * 500, "b": b"new" * 500}, {"format": 1})


def test_files_written_together_are_never_mixed(tmp_path):
    outcomes = set()
    for moment in range(40):
        folder = tmp_path / str(moment)
        write_together(folder, {"a": b"old" * 500, "b": b"old" * 500}, {"format": 1})
        (folder / "mine").write_text("stays")
        code = in_a_child(write_pair_and_die, folder, moment)
        index = json.loads((folder / "config.json").read_text())
        assert is_sealed(index)
        (content,) = {find_committed(folder, name, checksum).read_bytes() for name, checksum in index["files"].items()}
        outcomes.add((code, content[:3]))
        write_together(folder, {"a": b"end", "b": b"end"}, {"format": 1})
        assert {path.name for path in folder.iterdir()} == {"a", "b", "mine", "config.json"}
        if code == 0:
            break
    assert outcomes == {(-9, b"old"), (-9, b"new"), (0, b"new")}


def add_ones(folder, times):
    for _ in range(times):
        with locked(folder / ".lock", "busy", wait=-1):
            path = folder / "count"
            write_file(path, str(int(path.read_text()) + 1))


def test_a_lock_lets_one_process_in_at_a_time(tmp_path):
    write_file(tmp_path / "count", "0")
    children = [FORK.Process(target=add_ones, args=(tmp_path, 25)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert (tmp_path / "count").read_text() == "75"


def hold(folder, ready):
    with lock_folder(folder):
        ready.set()
        time.sleep(60)


def test_a_killed_holder_lets_go(tmp_path):
    ready = FORK.Event()
    child = FORK.Process(target=hold, args=(tmp_path, ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(FolderInUse, match="another process is writing to"), lock_folder(tmp_path):
        pass
    child.kill()
    child.join()
    with lock_folder(tmp_path, wait=5):
        pass


def test_a_changed_module_changes_the_identity(tmp_path, monkeypatch):
    from smlstm.data import files

    for name in ("data/a.py", "model/b.py", "evidence/c.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1")
    seen = []

    def note():
        code_digest.cache_clear()
        found = code_digest(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(files, "code_digest", lambda: found)
            seen.append(identity({"epochs": 5}))

    note()
    (tmp_path / "evidence/c.py").write_text("x = 2")
    note()  # evidence computes nothing that is kept
    (tmp_path / "model/b.py").write_text("x = 2")
    note()
    (tmp_path / "model/b.py").rename(tmp_path / "model/d.py")
    note()
    assert seen[0] == seen[1] and len(set(seen)) == 3
    code_digest.cache_clear()

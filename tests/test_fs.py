"""Atomic files, locks between processes, and processes that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dypo.runtime.fs import atomic_write, is_safe_name, new_file, replaced, take_lock


def python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def test_what_is_written_replaces_the_old_file_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    atomic_write(path, "né")
    assert path.read_bytes() == "né".encode()
    with replaced(path) as file:
        file.write(b"\0\xff")
        assert path.read_bytes() == "né".encode()  # until the end of the block
    assert path.read_bytes() == b"\0\xff"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ValueError("a row"), KeyboardInterrupt()])
def test_whatever_ends_the_writing_early_leaves_the_old_file_alone(tmp_path, fault):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    with pytest.raises(type(fault)) as caught, replaced(path) as file:
        file.write(b"half")
        raise fault
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    if isinstance(fault, OSError):
        assert caught.value.filename == str(path) and caught.value.errno == 28


def test_a_folder_that_is_not_there_is_named_by_the_file_that_was_meant(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/a\.json'"):
        atomic_write(tmp_path / "no" / "a.json", "text")


def test_all_writers_bring_their_file_to_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name)), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", Path(a).name)), replace(a, b)))
    atomic_write(tmp_path / "a", "text")
    with new_file(tmp_path / "b") as file:
        file.write(b"text")
        assert (tmp_path / "b").stat().st_size == 0  # still in memory
    assert done == [("fsync", "a.tmp"), ("replace", "a.tmp"), ("fsync", "b")]
    assert (tmp_path / "b").stat().st_size == 4


def test_a_lock_keeps_other_processes_out_until_its_file_is_closed(tmp_path):
    other = python(
        "import sys\nfrom megatron_dypo.runtime.fs import take_lock\n"
        "print(take_lock(open(sys.argv[1], 'a'))); print(take_lock(open(sys.argv[1], 'a'), 60))",
        str(tmp_path / "lock"),
    )
    with (tmp_path / "lock").open("a") as file:
        assert take_lock(file)
        assert other.stdout.readline() == "False\n"
        time.sleep(0.3)
        assert other.poll() is None  # it waits
    assert other.communicate(timeout=30)[0] == "True\n"


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGUSR1])
def test_a_process_ends_with_its_parent_by_the_signal_that_it_asked_for(by):
    """A parent that starts a sleeping child is killed; this process adopts the child and sees how it ended."""
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, sys, time; '\n"
        "    'from megatron_dypo.runtime.prctl import die_with_parent; '\n"
        "    'die_with_parent(signal.Signals(int(sys.argv[1]))); print(0, flush=True); '\n"
        "    'time.sleep(60)', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)\n"
    )
    watch = (
        "import os, signal, subprocess, sys\nfrom megatron_dypo.runtime.prctl import adopt_orphans\nadopt_orphans()\n"
        "parent = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)\n"
        "pid = int(parent.stdout.readline()); parent.kill(); parent.wait()\n"
        "print(os.WTERMSIG(os.waitpid(pid, 0)[1]))\n"
    )
    said, _ = python(watch, code, str(int(by))).communicate(timeout=30)
    assert said == f"{int(by)}\n"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\nb", "a\0", None, 3])
def test_a_name_that_leaves_its_folder_or_hides_is_not_safe(name):
    assert not is_safe_name(name) and is_safe_name("a.b")

import os
import stat
from pathlib import Path

import pytest

from talib_fast.storage import write_atomically


def content(text):
    return lambda file: file.write(text)


def test_writes_bytes_and_leaves_nothing_beside_them(tmp_path):
    path = tmp_path / "table.npz"
    write_atomically(path, content(b"one"))
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["table.npz"]


def test_replaces_what_was_there(tmp_path):
    path = tmp_path / "table"
    write_atomically(path, content(b"a longer text"))
    write_atomically(path, content(b"short"))
    assert path.read_bytes() == b"short" and os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize("kind", [str, Path])
def test_missing_folders_are_made(tmp_path, kind):
    path = tmp_path / "a" / "b" / "table"
    write_atomically(kind(path), content(b"x"))
    assert path.read_bytes() == b"x"


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically("table", content(b"x"))
    assert os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [None, b"old"])
def test_failure_half_way_leaves_the_old_file(tmp_path, error, existing):
    path = tmp_path / "table"
    if existing is not None:
        path.write_bytes(existing)

    def fail(file):
        file.write(b"half")
        raise error("half way")

    with pytest.raises(error, match="half way"):
        write_atomically(path, fail)
    assert os.listdir(tmp_path) == ([] if existing is None else ["table"])
    assert existing is None or path.read_bytes() == existing


def test_target_shows_its_old_content_while_a_file_beside_it_is_written(tmp_path):
    path = tmp_path / "table"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append((path.read_bytes(), len(os.listdir(tmp_path))))

    write_atomically(path, write)
    assert seen == [(b"old", 2)] and path.read_bytes() == b"new"


def test_content_is_on_disk_before_it_takes_the_targets_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_atomically(tmp_path / "table", content(b"x"))
    assert calls == ["fsync", "replace"]


def test_target_that_is_a_folder_stays(tmp_path):
    (tmp_path / "table").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "table", content(b"x"))
    assert os.listdir(tmp_path) == ["table"] and os.listdir(tmp_path / "table") == []


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        write_atomically(tmp_path / "table", content(b"x"))
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "table").stat().st_mode) == mode

import errno
import io
import multiprocessing
import os
import random
import shutil
import stat
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from talib_fast import storage
from talib_fast.finetune.co_tuning import Relationship
from talib_fast.finetune.delta import channel_attention
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
    for holder, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_atomically(tmp_path / "table", content(b"x"))
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_synchronize(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(code, os.strerror(code))))
    write_atomically(tmp_path / "table", content(b"x"))
    assert (tmp_path / "table").read_bytes() == b"x"


def test_a_disk_that_fails_to_synchronize(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_atomically(tmp_path / "table", content(b"x"))
    assert not list(tmp_path.iterdir())


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


# ---- A process is killed while it rewrites a cache. A cache has two versions, 1 and 2, made with other options: who
# wants one of them writes it over the other.


class Content:
    """What :func:`write_atomically` itself is given."""

    name = "content"

    def ask(self, path, version):
        write_atomically(path, lambda file: [file.write(bytes([version]) * 2**20) for _ in range(4)])

    def holds(self, path, version):
        return path.read_bytes() == bytes([version]) * 2**22


class OfRelationship:
    name = "relationship.npz"

    def __init__(self):
        torch.manual_seed(0)
        labels = torch.arange(200).repeat(2)
        self.loader, self.classifier = [(torch.randn(len(labels), 3), labels)], nn.Linear(3, 500)

    def ask(self, path, version):
        return Relationship(self.loader, self.classifier, "cpu", path, temperature=version).relationship

    def holds(self, path, version):
        found, stale = with_staleness(self.ask, path, version)
        np.testing.assert_array_equal(found, self.ask(None, version))
        return not stale


class OfAttention:
    name = "attention.safetensors"

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 2))
        self.batches = [(torch.randn(4, 3, 6, 6), torch.arange(4) % 2) for _ in range(2)]

    def ask(self, path, version):
        return channel_attention(self.model, self.batches, ["2", "0"], max_batches=version, progress=False, cache=path)

    def holds(self, path, version):
        found, stale = with_staleness(self.ask, path, version)
        torch.testing.assert_close(found, self.ask(None, version), rtol=0, atol=0)
        return not stale


def with_staleness(ask, path, version):
    """What a copy of the cache gives, and whether it was the other version. It is never one that can't be read."""
    copy = shutil.copy(path, path.parent / f"copy.of.{path.name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ask(copy, version)
    os.unlink(copy)
    assert all("it was made from another" in str(warning.message) for warning in caught)
    return found, bool(caught)


def rewrite_for_ever(cache, path, parent):
    """Tells ``parent`` half-way through every piece that goes into a file, and waits for its word."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.modules["tqdm.auto"] = None  # it takes a semaphore, which a killed process can't give back

    class Halting(io.FileIO):
        def write(self, data):
            data = bytes(data)
            super().write(data[: len(data) // 2])
            parent.send("half-way")
            parent.recv()
            super().write(data[len(data) // 2 :])
            return len(data)

    really_open = Path.open
    storage.Path.open = lambda path, mode, *rest: (Halting if mode == "xb" else really_open)(path, mode, *rest)
    while True:
        for version in (2, 1):
            cache.ask(path, version)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX system's")
@pytest.mark.parametrize("kind", [Content, OfRelationship, OfAttention])
def test_killing_a_process_in_the_middle_of_a_write_leaves_the_old_cache(kind, tmp_path):
    cache, path, draw = kind(), tmp_path / kind.name, random.Random(0)
    context = multiprocessing.get_context("forkserver")  # it loads torch once, not once for every process to kill
    context.set_forkserver_preload(["pytest", "talib_fast.finetune"])
    cache.ask(path, 1)
    for mid_write in (True, False) * 3:
        left_over = set(os.listdir(tmp_path))
        here, there = context.Pipe()
        process = context.Process(target=rewrite_for_ever, args=(cache, path, there), daemon=True)
        process.start()
        there.close()
        for _ in range(draw.randrange(30)):
            here.recv()
            here.send("go on")
        here.recv()
        before = path.read_bytes()
        if not mid_write:  # at whatever moment
            here.send("go on")
            time.sleep(draw.random() * 1e-3)
        process.kill()
        process.join()
        here.close()
        assert process.exitcode == -9
        if mid_write:
            assert path.read_bytes() == before
            assert len(set(os.listdir(tmp_path)) - left_over) == 1, "the half-written file beside it"
        assert sum(cache.holds(path, version) for version in (1, 2)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.ask(path, 1)
        cache.ask(path, 2)
    assert cache.holds(path, 2), "with all that the killed ones left over beside it"

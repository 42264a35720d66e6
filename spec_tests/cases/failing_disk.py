"""A disk that stops in the middle: after so many calls the process is dead, and perhaps the power gone."""

from refimpl.train.checkpoints.disk import Disk


class Killed(BaseException):
    """No handler of the program runs after a kill -9; this passes through all that catch Exception."""


class DyingDisk(Disk):
    """Dies in call number `alive`: just before it does anything, or in a write having written half. Nothing works afterwards.

    It remembers what a power failure would take with it: content not synced, names in folders not synced since.
    """

    def __init__(self, alive):
        self.alive, self.calls = alive, []
        self.unsynced, self.fresh, self.renamed = set(), set(), []

    def _call(self, name, path):
        if len(self.calls) >= self.alive:
            raise Killed
        self.calls.append((name, path.name))
        if len(self.calls) == self.alive and name != "write":
            raise Killed

    def make_folder(self, path):
        self._call("make", path)
        super().make_folder(path)

    def create(self, path):
        self._call("create", path)
        self.fresh.add(path)
        self.unsynced.add(path)
        return super().create(path)

    def writer(self, f, path):
        return _DyingFile(self, f, path)

    def sync(self, f, path):
        self._call("sync", path)
        super().sync(f, path)
        self.unsynced.discard(path)

    def sync_folder(self, path):
        self._call("sync folder", path)
        super().sync_folder(path)
        self.fresh = {p for p in self.fresh if p.parent != path}
        self.renamed = [(old, new) for old, new in self.renamed if new.parent != path]

    def rename(self, old, new):
        self._call("rename", old)
        super().rename(old, new)
        self.renamed.append((old, new))
        self.unsynced, self.fresh = (
            {new / p.name if p.parent == old else p for p in s} for s in (self.unsynced, self.fresh)
        )

    def remove(self, path):
        self._call("remove", path)
        super().remove(path)

    def cut_power(self, *, names):
        """What the next boot finds: unsynced files empty; with `names` False unsynced names are not there, renames undone."""
        for path in self.unsynced:
            if path.exists():
                path.write_bytes(b"")
        if names:
            return
        for path in self.fresh:
            path.unlink(missing_ok=True)
        for old, new in reversed(self.renamed):
            if new.exists():
                new.rename(old)


class _DyingFile:
    def __init__(self, disk, f, path):
        self._disk, self._f, self._path = disk, f, path

    def write(self, data):
        self._disk._call("write", self._path)
        if len(self._disk.calls) == self._disk.alive:
            self._f.write(data[: len(data) // 2])
            raise Killed
        return self._f.write(data)


class FullDisk(Disk):
    """Has room for so many bytes, then the system's error, after a part of the write that no longer fits."""

    def __init__(self, room):
        self.room = room

    def writer(self, f, path):
        return _FullFile(self, f, path)


class _FullFile:
    def __init__(self, disk, f, path):
        self._disk, self._f, self._path = disk, f, path

    def write(self, data):
        if self._disk.room <= 0:
            raise OSError(28, "No space left on device", str(self._path))
        n = self._f.write(data[: self._disk.room])
        self._disk.room -= n
        return n

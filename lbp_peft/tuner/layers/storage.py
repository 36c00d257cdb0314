"""Moves the values of a weight out of the memory that training needs, and keeps them readable.

On a CPU the values go to a file that is mapped into memory: the result is an ordinary tensor, whose pages the operating
system reads when they are used and drops when memory is short. The mapping is private, so that writing to the tensor
changes memory and never the file.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import mmap
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

_FREE_SPACE_LEFT = 2**30
_CHUNK = 2**23
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_OTHER_FOLDER = "/var/tmp"  # usually on a disk
_MADV_DONTNEED = 4
_CAN_UNLINK_OPEN_FILES = os.name == "posix"


@dataclass(frozen=True)
class FileStamp:
    """A file as it was when a weight was found to equal its contents.

    Attributes:
        path: The file.
        inode: Its device and number, which tell whether the path still leads to the same file.
        state: Its size in bytes and the time of its last change in ns.
        offset: Where the weight begins in it, in bytes.
        num_bytes: The size of the weight.
        digest: A digest of the weight's bytes.
    """

    path: str
    inode: tuple[int, int]
    state: tuple[int, int]
    offset: int = 0
    num_bytes: int = 0
    digest: bytes = b""

    @classmethod
    def of(cls, path: str) -> FileStamp:
        """The stamp of a file as it is now. Raises OSError where there is none."""
        status = os.stat(path)
        return cls(path, (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns))

    def was_overwritten(self) -> bool:
        """Whether the weight in the file was changed since.

        A file that was deleted or replaced stays intact where it is mapped. If the time of its last change is new, its
        contents are read: it may only have been touched, or written again with the same contents.
        """
        try:
            now = FileStamp.of(self.path)
            if now.inode != self.inode or now.state == self.state:
                return False
            return _digest_in_file_of(now.state, self.path, self.offset, self.num_bytes) != self.digest
        except OSError:
            return False


def copy_to_file(weight: Tensor) -> Tensor:
    """Copy a weight to a temporary file without a name, which disappears with the tensor, or with the process.

    Args:
        weight: A contiguous tensor of any shape, dtype and device.

    Returns:
        A tensor on the CPU, mapped from the file. None of its pages is in memory yet.

    Raises:
        OSError: there is no folder on a disk for it, not enough space (1 GiB is left free), or it cannot be written.
    """
    if not _CAN_UNLINK_OPEN_FILES:  # a file that is in use has to keep its name there, and would outlive the process
        raise OSError(errno.ENOTSUP, f"not supported on {sys.platform}")
    folder = _folder()
    if shutil.disk_usage(folder).free < weight.nbytes + _FREE_SPACE_LEFT:
        raise OSError(errno.ENOSPC, f"less than 1 GiB would be left free in {folder}")
    descriptor, path = tempfile.mkstemp(prefix="lbp-peft-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_bytes(weight.detach().cpu()))
            file.flush()
            os.fsync(file.fileno())  # errors of the disk are raised here rather than lost
        # PyTorch's own mapped storages count as shared memory, and cannot be passed to another process.
        with open(path, "rb") as file:
            private = mmap.mmap(file.fileno(), weight.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.unlink(path)
    return torch.frombuffer(private, dtype=weight.dtype).as_strided(weight.shape, weight.stride())


def release_pages(weight: Tensor) -> FileStamp | None:
    """Drop the pages of a weight that is mapped from a file already and equals its contents to the bit.

    That is how safetensors loads checkpoints on the CPU. Pages that are dropped are read again when they are used.

    Args:
        weight: A contiguous tensor on the CPU.

    Returns:
        The file; None if the weight lies elsewhere or was changed since it was loaded, and nothing was dropped.
    """
    try:
        mapping = _mapping(weight)
        if mapping is None:
            return None
        path, offset = mapping
        before = FileStamp.of(path)
        digest = hashlib.blake2b(_bytes(weight)).digest()
        if _digest_in_file(path, offset, weight.nbytes) != digest or FileStamp.of(path) != before:
            return None
        stamp = replace(before, offset=offset, num_bytes=weight.nbytes, digest=digest)
    except OSError:
        return None
    # Pages that the weight shares with its neighbours are left alone, since the neighbours may have changed.
    page = os.sysconf("SC_PAGE_SIZE")
    start, end = -(-weight.data_ptr() // page) * page, (weight.data_ptr() + weight.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
    return stamp


def copy_to_host_memory(weight: Tensor) -> Tensor:
    """Copy a weight to the CPU's memory, pinned for fast transfers if possible."""
    try:
        copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.device.type == "cuda")
    except RuntimeError:  # the system limits how much may be pinned
        copy = torch.empty(weight.shape, dtype=weight.dtype)
    return copy.copy_(weight.detach())


def _bytes(weight: Tensor) -> memoryview:
    array: Any = weight.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _digest_in_file(path: str, offset: int, num_bytes: int) -> bytes:
    """The digest of a part of a file. Raises OSError where it cannot be read."""
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, num_bytes, _CHUNK):
            digest.update(file.read(min(_CHUNK, num_bytes - start)))
    return digest.digest()


@functools.lru_cache(4096)  # base weights are asked for in every pass with a disabled adapter
def _digest_in_file_of(state: tuple[int, int], path: str, offset: int, num_bytes: int) -> bytes:
    return _digest_in_file(path, offset, num_bytes)


def _mapping(weight: Tensor) -> tuple[str, int] | None:
    """The file that a tensor's memory is privately mapped from, and the offset of the tensor in it."""
    if sys.platform != "linux":
        return None
    first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split(maxsplit=1)[0].split("-"))
        if not start <= first < end:
            continue
        match = re.fullmatch(r"\S+ rw-p (\S+) \S+ [1-9]\d* +(/.+)", line)
        if match is None or last > end or match[2].endswith(" (deleted)"):
            return None
        return match[2], int(match[1], 16) + first - start
    return None


def _folder() -> str:
    for folder in dict.fromkeys((tempfile.gettempdir(), _OTHER_FOLDER)):
        if os.path.isdir(folder) and os.access(folder, os.W_OK) and not _is_in_memory(os.path.realpath(folder)):
            return folder
    raise OSError(errno.ENOENT, "no folder for temporary files lies on a disk and can be written to")


@functools.cache
def _is_in_memory(folder: str) -> bool:
    mounts = [part for part in psutil.disk_partitions(all=True) if Path(folder).is_relative_to(Path(part.mountpoint))]
    nearest = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return nearest is not None and nearest.fstype in _IN_MEMORY

"""Memory that a process shares with its child, for arrays: a copy on each side instead of many switches between the two at a pipe.

Its size is fixed (sealed), so that the child cannot make the parent fail by shrinking it, and it takes no memory before it is written.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from appliance.core.child_protocol import ProtocolError

_KEPT_BYTES: Final = 32 << 20


class SharedMemory:
    """One payload at a time, from the parent or from the child.

    Args:
        descriptor: of :func:`create`; the object closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        """Create shared memory of at most ``size`` bytes; raises OSError."""
        descriptor = os.memfd_create("payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(descriptor)

    def write(self, buffers: list[memoryview]) -> None:
        """Write the buffers of a payload one after the other; raises ProtocolError where they do not fit."""
        place = 0
        for buffer in buffers:
            if place + len(buffer) > len(self._map):
                raise ProtocolError("a payload that is too large")
            self._map[place : place + len(buffer)] = buffer
            place += len(buffer)

    def take(self, size: int) -> bytearray:
        """Return a copy of a payload, and free the memory of a large one; raises ProtocolError where it cannot be so large."""
        if size > len(self._map):
            raise ProtocolError("a payload that is too large")
        with memoryview(self._map) as whole:
            payload = bytearray(whole[:size])
        if size > _KEPT_BYTES:
            self._map.madvise(mmap.MADV_REMOVE)
        return payload

    def close(self) -> None:
        """Unmap the memory."""
        self._map.close()
        os.close(self.descriptor)

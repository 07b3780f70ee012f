"""The first program of the process that runs a snapshot: it shuts the doors, then starts guest.py.

    python -P data/confine.py SOCKET HOME [HIDDEN ...]

Where the system allows it, the process enters namespaces of its own. Folders HIDDEN are empty
there, nothing but the folder HOME can be written, there is no network, and whatever the process
starts ends with it. It runs as an ordinary user too; containers often forbid it, and then HOME and
a scrubbed environment are all there is.

The standard library alone is used here: Linux lets only a process of one thread enter a user
namespace, and numpy starts threads when it is imported. Not to be edited for a record.
"""

import ctypes
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
NEW_MOUNTS, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000
READ_ONLY = 1
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442  # the system call's number, the same on every architecture
PARENT_DEATH_SIGNAL = 1

LIBC = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments):
    """A function of the C library. Raises OSError where it returns -1."""
    if getattr(LIBC, function)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int):
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None)


def make_writable(target: str, is_writable: bool, flags: int = 0):
    """Of a mount, and with AT_RECURSIVE of all below it."""
    to_set = 0 if is_writable else READ_ONLY
    to_clear = READ_ONLY if is_writable else 0
    attributes = struct.pack("=4Q", to_set, to_clear, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    place = (ctypes.c_long(AT_FDCWD), target.encode(), ctypes.c_ulong(flags))
    call("syscall", ctypes.c_long(MOUNT_SETATTR), *place, attributes, size)


def enter_namespaces(home: str, hidden: list[str]):
    """Raises OSError where the system does not allow one of these."""
    user, group = os.getuid(), os.getgid()
    call("unshare", NEW_USER | NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    mount("none", "/", "none", RECURSIVE | PRIVATE)
    mount(home, home, "none", BIND)
    make_writable("/", False, AT_RECURSIVE)
    make_writable(home, True)
    for folder in hidden:
        mount("none", folder, "tmpfs", READ_ONLY)


def end_with_parent():
    call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL)


def main(number: str, home: str, *hidden: str) -> int:
    """Greets on the socket with the guest's process id and what holds it; waits for its end."""
    end_with_parent()
    try:
        enter_namespaces(home, list(hidden))
        isolation = "namespaces"
    except OSError as error:
        isolation = f"working directory alone ({error.strerror})"
    os.chdir(home)
    guest = os.fork()  # the first process of its namespace: all others there end with it
    if guest == 0:
        end_with_parent()
        program = Path(__file__).with_name("guest.py")
        os.execv(sys.executable, [sys.executable, "-P", str(program), number])
    greeting = json.dumps({"process": guest, "isolation": isolation}).encode()
    with socket.socket(fileno=int(number)) as connection:
        connection.sendall(struct.pack("<QQ", len(greeting), 0) + greeting)
    os.waitpid(guest, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

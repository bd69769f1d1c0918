"""Locks a process up before it runs somebody's code: no network, no files but those given, limits on what it may use.

Runs as a plain script's import in a process of its own and imports the standard library only. Whatever the operating
system refuses is reported as missing rather than passed over; the guards inside Python hold everywhere.
"""

import ctypes
import os
import sys
from collections.abc import Iterable
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_NO_NEW_PRIVS = 38
# System calls of Landlock have the same numbers on every architecture (Linux 5.13 and newer).
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
READ = EXECUTE | READ_FILE | READ_DIR
ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # by version; later: 16 rights
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15
TCP, SCOPES = 3, 3  # bind and connect; abstract sockets and signals
# What Python and torch read of the system. Nothing of a user is in there.
SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/sys", "/System", "/Library", "/proc/self",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/sys/vm", "/dev/urandom", "/dev/random",
    "/dev/zero",
)  # fmt: skip
OPENING = ("open", "os.listdir", "os.scandir")
WRITABLE = ("/dev/null", "/dev/shm", "/dev/tty")
FORBIDDEN = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
             "socket.gethostbyname", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill",
             "subprocess.Popen", "pty.spawn", "ftplib.connect", "http.client.connect", "os.startfile")  # fmt: skip


def lock(readable: Iterable[str], writable: Iterable[str], limits: dict[str, int]) -> dict[str, str]:
    """Lock this process up, as far as the system lets it, for good.

    Args:
        readable: files and folders it may read, besides the system's own.
        writable: folders it may write to.
        limits: {name of a RLIMIT: value}.

    Returns:
        What holds: {"network", "files", "limits": in words}.
    """
    own_space = _leave_namespaces()
    held = {
        "network": "a network of its own with nothing in it" if own_space else "sockets refused by Python",
        "limits": _limit(limits, own_space),
    }
    allowed = [*readable, *SYSTEM, *writable, *WRITABLE]
    by_kernel = _landlock([*readable, *SYSTEM], [*writable, *WRITABLE])
    held["files"] = f"its own files and the system's ({'Landlock' if by_kernel else 'refused by Python'})"
    _refuse_in_python(None if by_kernel else [os.path.realpath(path) for path in allowed])
    return held


def _leave_namespaces() -> bool:
    """Move into user, network and IPC namespaces of one's own, as the same user; False where that is not allowed."""
    if not sys.platform.startswith("linux"):
        return False
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("gid_map", f"{group} {group} 1"), ("uid_map", f"{user} {user} 1")):
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        except OSError:
            continue  # an unmapped user may do less, not more
    return True


def _limit(limits: dict[str, int], own_space: bool) -> str:
    try:
        import resource
    except ImportError:  # Windows has none
        return "none"
    held = []
    for name, value in limits.items():
        # The number of processes is counted over all of a user's, so it means something in a namespace only.
        if not hasattr(resource, name) or (name == "RLIMIT_NPROC" and not own_space):
            continue
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (OSError, ValueError):
            continue
        held.append(name.removeprefix("RLIMIT_").lower())
    return ", ".join(held) or "none"


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _landlock(readable: list[str], writable: list[str]) -> bool:
    """Allow only these files and folders through the kernel's Landlock; False where there is none."""
    if not sys.platform.startswith("linux"):
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    version = call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    rights = ALL_RIGHTS.get(version, (1 << 16) - 1)
    # Older kernels take a shorter structure, and the network's rights and scopes only as they know them.
    rules = _Ruleset(rights, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call(CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    for paths, allowed in ((readable, READ), (writable, rights)):
        for path in dict.fromkeys(paths):
            _allow(call, ruleset, path, allowed & rights)
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    locked = call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0
    os.close(ruleset)
    return locked


def _allow(call: Any, ruleset: int, path: str, allowed: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no permission
    try:
        allowed = allowed if os.path.isdir(path) else allowed & OF_FILES
        rule = _Beneath(allowed, place)
        call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(place)


def _refuse_in_python(allowed: list[str] | None) -> None:
    """No sockets and no other processes from Python, whatever the system allows; cannot be taken back.

    Args:
        allowed: the only files and folders that Python opens from here on; None where the kernel sees to that.
    """

    def guard(event: str, arguments: tuple) -> None:
        if event in FORBIDDEN:
            raise PermissionError(f"{event} is not allowed while a repository is checked")
        if allowed is not None and event in OPENING and isinstance(arguments[0], str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            if not any(place == path or place.startswith(path + os.sep) for path in allowed):
                raise PermissionError(f"{place} may not be read while a repository is checked")

    sys.addaudithook(guard)

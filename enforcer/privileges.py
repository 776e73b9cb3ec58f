"""Gives up what root may do beyond the one thing that NVML asks for.

It knows no GPU, no pod and no setting.

In ctypes because the standard library has neither prctl(2) nor capset(2), and the packages that
have them are stale.
"""

import ctypes
import resource

# linux/prctl.h
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h, where a set has 64 bits
# nvmlDeviceSetPowerManagementLimit: the driver asks for CAP_SYS_ADMIN (open-gpu-kernel-modules,
# nv-linux.h, NV_IS_SUSER). Reading /proc/<pid>/cgroup and stat takes none (both are 0444), the
# ledger and the sockets are root's own files.
_CAP_SYS_ADMIN = 21
# Endless multipart messages fill memory without any bound of libzmq's; a death is safe, since
# limits hold in the hardware and the ledger is on disk.
_DATA_BYTES = 512 << 20
# Open files: not more than these, and not fewer. libzmq aborts the process where accept finds no
# descriptor. While a turn lasts (half a minute, where NVML is opened) it accepts until the events
# of one of its two sockets fill its monitor: 2000 connections each, beside the 128 that may stay.
# NVML's RPC client, which talks to nvidia-persistenced, allocates and touches 52 bytes for each
# descriptor that the hard limit allows, as libtirpc does (rpc_generic.c, __rpc_dtbsize, asks for
# rlim_max): 52 GiB under containerd with LimitNOFILE=infinity. So the hard limit is set as well.
DESCRIPTORS = 4608


class DropError(Exception):
    """Power could not be given up; the text names the call and the remedy."""


def drop() -> int:
    """Set no-new-privs, keep only CAP_SYS_ADMIN, bound memory and files; raises DropError.

    Returns how many files may be open: fewer than DESCRIPTORS where no more can be had.
    """
    try:
        return _drop()
    except (OSError, ValueError) as error:  # ValueError: setrlimit(2) above the hard limit
        remedy = "let the runtime's seccomp profile and limits allow it"
        raise DropError(f"privileges cannot be given up: {error}; {remedy}") from error


def _bound_descriptors() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # Above the hard limit this takes CAP_SYS_RESOURCE, which is given up only afterwards.
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return DESCRIPTORS


def _drop() -> int:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(result: int, name: str) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), name)

    call(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    descriptors = _bound_descriptors()
    resource.setrlimit(resource.RLIMIT_DATA, (_DATA_BYTES, _DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for capability in range(64):
        # The kernel refuses this without CAP_SETPCAP (then the set was narrowed before the start),
        # and for numbers that are no capability.
        if capability != _CAP_SYS_ADMIN:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low 32 bits, then high
    call(libc.capget(header, held), "capget")
    # What is not inheritable leaves the ambient set too (capabilities(7)).
    kept = [word & (1 << _CAP_SYS_ADMIN) for word in held[:2]]
    call(libc.capset(header, (ctypes.c_uint32 * 6)(*kept)), "capset")
    return descriptors

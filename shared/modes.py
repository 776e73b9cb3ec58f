"""Whom a file's mode lets in: the rule of inode(7), for what access(2) cannot tell apart."""

import os
from collections.abc import Collection

WRITE = 0o2
READ_AND_WRITE = 0o6


def lets_in(found: os.stat_result, uid: int, groups: Collection[int], needed: int) -> bool:
    """Tell whether its mode alone gives that caller what is `needed`; root is no exception here."""
    if found.st_uid == uid:
        given = found.st_mode >> 6
    elif found.st_gid in groups:
        given = found.st_mode >> 3
    else:
        given = found.st_mode
    return given & needed == needed

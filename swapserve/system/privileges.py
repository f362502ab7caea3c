"""Give privileges up for good."""

import os
import pwd
from pathlib import Path

from swapserve.system import linux


def drop_privileges(user: str | None, home: Path) -> None:
    """Become an ordinary process: that account, or (None) root without any capability.

    Call it before the first thread starts: capabilities belong to threads. Nothing happens in a
    process that is not root's.

    Args:
        user: account to become.
        home: directory that the account must own with all that is in it.

    Raises:
        OSError: it could not be done; do not serve then.
    """
    if os.geteuid() != 0:
        return
    if user is not None:
        account = pwd.getpwnam(user)
        for path in (home, *home.iterdir()):
            os.lchown(path, account.pw_uid, account.pw_gid)  # a link could lead anywhere
        os.initgroups(account.pw_name, account.pw_gid)
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
    linux.set_no_new_privs()
    if user is None:
        linux.drop_all_capabilities()

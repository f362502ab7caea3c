from pathlib import Path

from swapserve.system.mounts import mounts_below

TABLE = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
51 27 0:40 /libcuda.so /usr/lib/x86_64-linux-gnu/libcuda.so.1 ro,nosuid - ext4 /dev/vdb ro
52 27 0:40 / /usr/local/nvidia ro - ext4 /dev/vdb ro
53 27 0:40 / /usr/local/nvidia/lib\\04064 ro - ext4 /dev/vdb ro
54 27 0:41 / /usrlocal rw - tmpfs tmpfs rw
"""


def test_mounts_below_a_directory_are_found_outer_ones_first() -> None:
    assert mounts_below({Path("/usr")}, TABLE) == [
        Path("/usr/local/nvidia"),
        Path("/usr/lib/x86_64-linux-gnu/libcuda.so.1"),
        Path("/usr/local/nvidia/lib 64"),
    ]


def test_a_directory_is_not_below_itself_and_names_alike_do_not_count() -> None:
    assert mounts_below({Path("/usr/local/nvidia")}, TABLE) == [Path("/usr/local/nvidia/lib 64")]
    assert mounts_below({Path("/opt")}, TABLE) == []


def test_this_machine_has_mounts() -> None:
    assert Path("/proc") in mounts_below({Path("/")})

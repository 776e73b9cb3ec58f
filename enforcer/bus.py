"""Which NVIDIA devices are on the node's PCI bus, from sysfs: the hint that NVML has more to show.

It knows no NVML: a device on the bus need not be a GPU that works.
"""

import os
from pathlib import Path

# include/linux/pci_ids.h. Not only display controllers: some boards come up as other classes.
_NVIDIA = "0x10de"
_DEVICES = "bus/pci/devices"


class Bus:
    """Lists the devices below a sysfs root; asks each new address once for its vendor."""

    def __init__(self, sysfs_root: Path) -> None:
        """Prepare; nothing is read before `devices`."""
        self._root = str(sysfs_root / _DEVICES)
        self._vendors: dict[str, str] = {}

    def devices(self) -> frozenset[str] | None:
        """Return NVIDIA's devices, each with its driver: one that is bound later or anew is news.

        None where the list cannot be read.
        """
        try:
            addresses = os.listdir(self._root)  # noqa: PTH208 - names are all it takes
        except OSError:
            return None
        vendors = {address: self._vendor(address) for address in addresses}
        self._vendors = {address: vendor for address, vendor in vendors.items() if vendor}
        nvidia = [address for address, vendor in self._vendors.items() if vendor == _NVIDIA]
        return frozenset(f"{address} {self._driver(address)}" for address in nvidia)

    def _vendor(self, address: str) -> str:
        known = self._vendors.get(address)
        if known:
            return known
        try:
            with open(f"{self._root}/{address}/vendor") as file:  # noqa: PTH123 - called often
                return file.read(16).strip()
        except (OSError, UnicodeDecodeError):  # it has just gone
            return ""

    def _driver(self, address: str) -> str:
        """Return the driver and the number of this binding, or of the device where there is none.

        What went and came back between two looks has another number: sysfs numbers its entries one
        after the other and gives no number again soon (fs/kernfs/dir.c, idr_alloc_cyclic).
        """
        device = f"{self._root}/{address}"
        link = f"{device}/driver"
        try:
            name = os.readlink(link).rpartition("/")[2]  # noqa: PTH115
            return f"{name} {os.lstat(link).st_ino}"
        except OSError:  # none is bound
            pass
        try:
            return f"- {os.stat(device).st_ino}"  # noqa: PTH116
        except OSError:  # it has just gone
            return "-"

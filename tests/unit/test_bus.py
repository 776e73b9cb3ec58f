"""What the enforcer sees of the PCI bus, on folders laid out as sysfs has them."""

from __future__ import annotations

import shutil
from pathlib import Path

from enforcer.bus import Bus

NVIDIA, OTHER = "0x10de", "0x8086"


def plug(root: Path, address: str, vendor: str = NVIDIA, driver: str | None = "nvidia") -> Path:
    """Put a device on the bus."""
    device = root / "bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    if driver is not None:
        bind(device, driver)
    return device


def bind(device: Path, driver: str) -> None:
    (device / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")


def test_only_nvidias_devices_count(tmp_path: Path) -> None:
    plug(tmp_path, "0000:0f:00.0")
    bus = Bus(tmp_path)
    one = bus.devices()
    plug(tmp_path, "0000:00:1f.0", OTHER, "ahci")
    assert bus.devices() == one
    assert one is not None
    assert len(one) == 1


def test_what_does_not_change_is_no_news(tmp_path: Path) -> None:
    plug(tmp_path, "0000:0f:00.0")
    plug(tmp_path, "0000:17:00.0", driver=None)
    bus = Bus(tmp_path)
    assert bus.devices() == bus.devices()


def test_a_bus_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    assert Bus(tmp_path).devices() is None


def test_a_driver_that_is_bound_later_is_news(tmp_path: Path) -> None:
    device = plug(tmp_path, "0000:0f:00.0", driver=None)
    bus = Bus(tmp_path)
    before = bus.devices()
    bind(device, "nvidia")
    after = bus.devices()
    assert before is not None
    assert after is not None
    assert after - before


def test_a_device_that_went_and_came_between_two_looks_is_news(tmp_path: Path) -> None:
    """As after `echo 1 > remove` and `echo 1 > rescan`."""
    for driver in ("nvidia", None):
        device = plug(tmp_path, f"0000:0f:00.{'0' if driver else '1'}", driver=driver)
        bus = Bus(tmp_path)
        before = bus.devices()
        # Another one beside it first: this file system may give a free number again.
        other = device.with_name("new")
        shutil.copytree(device, other, symlinks=True)
        shutil.rmtree(device)
        other.rename(device)
        after = bus.devices()
        assert before is not None
        assert after is not None
        assert after - before


def test_a_driver_that_was_bound_anew_between_two_looks_is_news(tmp_path: Path) -> None:
    device = plug(tmp_path, "0000:0f:00.0")
    bus = Bus(tmp_path)
    before = bus.devices()
    (device / "driver").rename(tmp_path / "the old link")
    bind(device, "nvidia")
    assert bus.devices() != before

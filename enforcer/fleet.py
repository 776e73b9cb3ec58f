"""The GPUs of this node and the session in which they are reached: all reading happens here.

It holds the value of each GPU and replaces it by the next one. gpu.py says what a GPU becomes,
driver.py says when a session is opened, and the loop (agent.py) does all writing.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from enforcer import driver as sessions
from enforcer import gpu as one
from enforcer.clock import Clock
from enforcer.device import Board, Device, DeviceError, Listing
from enforcer.driver import Devices, Driver, Open, Shut, Step, View
from enforcer.gpu import Gpu, Happening, Lost, Present
from enforcer.policy import Desired
from enforcer.sources import Source


class Bus(Protocol):
    """What `bus.Bus` offers."""

    def devices(self) -> Devices:
        """List the devices on the bus."""


class Fleet:
    """Every GPU that was ever seen or is owned, by UUID."""

    def __init__(
        self,
        owned: Iterable[Gpu],
        device: Device,
        source: Source,
        bus: Bus,
        clock: Clock,
    ) -> None:
        """Prepare; nothing is opened before `keep_session`. `owned` are known from the ledger."""
        self._device = device
        self._source = source
        self._bus = bus
        self._clock = clock
        self._gpus: dict[str, Gpu] = {gpu.uuid: gpu for gpu in owned}
        self._sessions = 0
        self._told: list[Happening] = []
        self.driver: Driver = Shut()

    def __iter__(self) -> Iterator[Gpu]:
        """Iterate over the GPUs as they are now."""
        return iter(list(self._gpus.values()))

    def __getitem__(self, uuid: str) -> Gpu:
        """Return one GPU as it is now."""
        return self._gpus[uuid]

    def become(self, gpu: Gpu, told: Iterable[Happening] = ()) -> Gpu:
        """Hold what became of a GPU; what is to be told of it waits for `take_told`."""
        before = self._gpus.get(gpu.uuid)
        self._gpus[gpu.uuid] = gpu
        self._told += told
        if before is not None and isinstance(gpu.where, Lost):
            self._expect(before)
        return gpu

    def take_told(self) -> list[Happening]:
        """Return what happened since this was last asked."""
        told, self._told = self._told, []
        return told

    def homeless(self, desired: Desired) -> frozenset[str]:
        """Return the annotated pods that were not seen on any GPU, and are assigned none."""
        seen = frozenset[str]()
        for gpu in self:
            seen |= desired.pods_among((one.owners(gpu) or frozenset()) | one.assigned(gpu))
        return frozenset(desired.pods.keys() - seen)

    # ---- the session ----

    def keep_session(self, view: View) -> None:
        """Open the session, anew or for the first time, or list its boards, where that is due."""
        step = sessions.next_step(self.driver, view, self._clock.now_s())
        if step is Step.OPEN:
            self.open()
        elif step is Step.LIST:
            self._list_again()

    def view(self, desired: Desired, owned: Iterable[str], *, needed: bool) -> View:
        """Return what the decision about the session depends on."""
        entries = set(owned)
        return View(
            needed=needed,
            missing=self._missing(),
            used=any(one.is_used(gpu, desired, gpu.uuid in entries) for gpu in self),
        )

    def look_at_the_bus(self) -> None:
        """See whether a device has come to the bus."""
        if isinstance(self.driver, Open):
            devices = self._bus.devices()
            self.driver = sessions.on_the_bus(self.driver, devices, self._clock.now_s())

    def open(self) -> None:
        """Begin a session, in place of the one there is; takes seconds."""
        self._device.close()
        # Before the session, not after it: what comes while it is opened may not be in it.
        devices = self._bus.devices()
        try:
            self._device.open()
            listing = self._device.boards()
        except DeviceError as error:
            self._device.close()
            self._refused(error)
            return
        self._sessions += 1
        now_s = self._clock.now_s()
        driver = sessions.opened(self.driver, self._sessions, devices, now_s)
        self.driver = driver
        there = {board.uuid for board in listing.boards}
        why = "; ".join(["not listed by NVML", *listing.faults])
        for gpu in self:
            if gpu.uuid not in there:
                self._lose(gpu, why)
        self._take(driver.number, listing)

    def _refused(self, error: DeviceError) -> None:
        why, now_s = str(error), self._clock.now_s()
        self.driver = sessions.refused(
            self.driver,
            why,
            absent=error.absent,
            now_s=now_s,
            cut_off=error.cut_off and self._sessions > 0,
        )
        for gpu in self:
            self._lose(gpu, why, self.driver.again.due_s)

    def _list_again(self) -> None:
        """Look in the open session for what was missing from it."""
        if not isinstance(self.driver, Open):
            return
        try:
            listing = self._device.boards()
        except DeviceError as error:
            listing = Listing(faults=(str(error),))
        self._take(self.driver.number, listing)

    def _take(self, session: int, listing: Listing) -> None:
        """Take in what a session lists."""
        now_s = self._clock.now_s()
        for board in listing.boards:
            gpu = self._gpus.get(board.uuid) or Gpu(board.uuid)
            if one.may_be_back(gpu, session, now_s) and self._is_back(gpu, board):
                self.become(*one.found(gpu, board, session, now_s))
        if isinstance(self.driver, Open):
            self.driver = sessions.listed(
                self.driver, listing.faults, missing=self._missing(), now_s=now_s
            )

    def _is_back(self, gpu: Gpu, board: Board) -> bool:
        """Tell whether a GPU that was lost answers again, and is not only listed."""
        if not isinstance(gpu.where, Lost):
            return True
        try:
            self._device.limit_mw(board)
        except DeviceError as error:
            if error.stale or error.cut_off:
                self._lose(gpu, str(error))
                return False
        try:
            self._device.pids(board)
        except DeviceError as error:
            return not error.stale
        return True

    def _missing(self) -> bool:
        return any(not isinstance(gpu.where, Present) for gpu in self)

    @property
    def count(self) -> int | None:
        """How many GPUs answer; None while no session is open."""
        if not isinstance(self.driver, Open):
            return None
        return sum(isinstance(gpu.where, Present) for gpu in self)

    def _lose(self, gpu: Gpu, why: str, next_try_s: float | None = None) -> Gpu:
        return self.become(*one.lost(gpu, why, self._clock.now_s(), next_try_s))

    def _expect(self, before: Gpu) -> None:
        """Search in a new session for a GPU that was just lost."""
        if isinstance(before.where, Present) and isinstance(self.driver, Open):
            due_s = one.search_s(before, self._clock.now_s())
            self.driver = sessions.lost_one(self.driver, due_s)

    def shut(self) -> None:
        """Let go of the driver; what was read holds no longer."""
        if not isinstance(self.driver, Shut):
            self._device.close()
        self.driver = Shut()
        for gpu in self:
            self.become(one.shut(gpu))

    # ---- reading ----

    def read_all(self) -> None:
        """Read the limit and the power of every GPU."""
        for gpu in self:
            self.read(gpu)

    def read(self, gpu: Gpu) -> Gpu:
        """Read one GPU; what cannot be read is None afterwards."""
        if not isinstance(gpu.where, Present):
            return gpu
        try:
            reading = self._device.read(gpu.where.board)
        except DeviceError as error:
            return self._was_not_read(gpu, error)
        return self.become(one.was_read(gpu, reading))

    def _was_not_read(self, gpu: Gpu, error: DeviceError) -> Gpu:
        now_s = self._clock.now_s()
        gpu = self.become(one.was_not_read(gpu, now_s, cut_off=error.cut_off))
        if error.stale or one.is_cut_off(gpu, now_s):
            return self._lose(gpu, str(error))
        return gpu

    def look_at(self, uuids: Iterable[str]) -> None:
        """See who holds these GPUs, and those of which it is not known."""
        chosen = set(uuids)
        for gpu in self:
            if isinstance(gpu.where, Present) and (gpu.uuid in chosen or one.owners(gpu) is None):
                self._look(gpu, gpu.where.board)

    def look_at_all(self) -> None:
        """See who holds each GPU."""
        self.look_at(self._gpus)

    def _look(self, gpu: Gpu, board: Board) -> None:
        try:
            sighting = self._source.look(board)
        except DeviceError as error:
            self._lose(gpu, str(error))
        else:
            self.become(one.was_seen(gpu, sighting))

"""The devices of the virtual PC, and the bus that they sit on."""

from __future__ import annotations

import threading

from pyhv._native import check, ffi, lib, new_error, to_exception
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

UART_PORT, UART_IRQ = 0x3F8, 4
DEBUG_EXIT_PORT = 0xF4
ACPI_PM_PORT, ACPI_PM_IRQ = 0x600, 9
PVPANIC_PORT = 0x505
GENERATION_ID = 0xE0100  # where it lies in guest memory, among the ACPI tables
GENERATION_EVENT = 0  # the general-purpose event that tells of a new VM generation ID

KEPT = 16 << 20
"""So many bytes of the console's output are kept, the last ones, where it goes nowhere else."""

_STATE_MAX = 8192  # PYHV_DEVICE_STATE_MAX


def is_pc(names: Iterable[str]) -> bool:
    """Whether devices of these names are those of a pc."""
    return "acpi_pm" in names


class Devices:
    """The bus with UART, debug-exit port, i8042 and CMOS attached; of a `pc` also ACPI's registers, what kernels ask of
    a chipset, firmware configuration, pvpanic and the VM generation ID.

    low_ram, high_ram: bytes of RAM below and above 4 GiB, which the CMOS tells. console_in, console_out: descriptors
    for the serial port's bytes, -1 for none; they stay the caller's. Raises HostError.
    """

    def __init__(
        self, low_ram: int, high_ram: int, console_in: int = -1, console_out: int = -1, pc: bool = False
    ) -> None:
        error = new_error()
        self.bus: Any = check(lib.pyhv_bus_create(error), error)
        self._has_input = console_in >= 0
        self._keeps = False
        self._pump: threading.Thread | None = None
        self._pump_told = False  # to end
        self._uart: Any = None
        self._devices: dict[str, Any] = {}
        try:
            self._uart = self._attach(
                lib.pyhv_uart16550_create(UART_PORT, UART_IRQ, console_in, console_out, error), error
            )
            self._attach(lib.pyhv_debug_exit_create(DEBUG_EXIT_PORT, error), error)
            self._attach(lib.pyhv_i8042_create(error), error)
            self._attach(lib.pyhv_cmos_create(low_ram, high_ram, error), error)
            if pc:
                self._attach(lib.pyhv_acpi_pm_create(ACPI_PM_PORT, ACPI_PM_IRQ, error), error)
                self._attach(lib.pyhv_chipset_create(error), error)
                self._attach(lib.pyhv_pvpanic_create(PVPANIC_PORT, error), error)
                self._attach(lib.pyhv_fw_cfg_create(error), error)
                self._attach(lib.pyhv_vmgenid_create(GENERATION_ID, error), error)
        except BaseException:
            self.close()
            raise

    def _attach(self, device: Any, error: Any) -> Any:
        check(device, error)
        if lib.pyhv_bus_attach(self.bus, device, error) < 0:
            lib.pyhv_device_destroy(device)
            check(-1, error)
        self._devices[ffi.string(lib.pyhv_device_name(device)).decode()] = device
        return device

    def save(self) -> dict[str, bytes]:
        """Each device's state by its name, in the format that its C file documents. Raises HostError."""
        error, buffer = new_error(), ffi.new("uint8_t[]", _STATE_MAX)
        states: dict[str, bytes] = {}
        for name, device in self._devices.items():
            size = check(lib.pyhv_device_save(device, buffer, _STATE_MAX, error), error)
            states[name] = bytes(ffi.buffer(buffer, size))
        return states

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._devices)

    def check(self, names: Iterable[str]) -> None:
        """Raises BadInput unless these are the names of the devices."""
        if set(names) != self._devices.keys():
            raise BadInput("devices", f"the state has {', '.join(sorted(names))}; this VM has {', '.join(self.names)}")

    def load(self, states: dict[str, bytes], elapsed: int = 0) -> None:
        """Puts the states back; they need not be trusted. elapsed: nanoseconds that have passed for the guest since
        they were saved. Raises BadInput for a device that is missing, unknown or refuses its state."""
        self.check(states)
        error = new_error()
        for name, device in self._devices.items():
            if lib.pyhv_device_load(device, states[name], len(states[name]), error) < 0:
                raise BadInput(f"device {name}", str(to_exception(error)))
        if self.is_pc:
            lib.pyhv_acpi_pm_advance(self._devices["acpi_pm"], elapsed)

    @property
    def is_pc(self) -> bool:
        return is_pc(self._devices)

    def configure(self, key: int, data: bytes) -> None:
        """Gives a pc's firmware configuration an item. Raises HostError where it does not fit."""
        error = new_error()
        check(lib.pyhv_fw_cfg_add(self._devices["fw_cfg"], key, data, len(data), error), error)

    @property
    def generation_id(self) -> int:
        """Where in a pc's memory its VM generation ID is."""
        return int(lib.pyhv_vmgenid_address(self._devices["vmgenid"]))

    def tell_generation(self) -> None:
        """Tells the guest of a pc that its VM generation ID is a new one."""
        lib.pyhv_acpi_pm_event(self._devices["acpi_pm"], GENERATION_EVENT)

    def keep_output(self) -> None:
        """Keeps the last KEPT bytes of the console's output in memory, for output(). Before the VM runs. Raises
        HostError."""
        error = new_error()
        check(lib.pyhv_uart16550_keep(self._uart, KEPT, error), error)
        self._keeps = True

    def output(self, since: int = 0) -> tuple[bytes, int]:
        """What is kept of the console's output from byte number `since` on, and the number of the first of these bytes,
        which is a later one where there was more output than is kept. Any thread."""
        if not self._keeps:
            return b"", since
        first, end = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.pyhv_uart16550_kept(self._uart, since, ffi.NULL, 0, first, end)
        # What comes between the two calls is for the next one.
        size = end[0] - max(since, first[0]) if end[0] > since else 0
        if not size:
            return b"", max(since, first[0])
        buffer = ffi.new("uint8_t[]", size)
        count = lib.pyhv_uart16550_kept(self._uart, since, buffer, size, first, end)
        return bytes(ffi.buffer(buffer, count)), max(since, first[0])

    def set_input(self, descriptor: int) -> None:
        """Console input comes from there, once start_input() is called. While there is no other. Raises HostError."""
        error = new_error()
        check(lib.pyhv_uart16550_set_input(self._uart, descriptor, error), error)
        self._has_input = True

    def start_input(self) -> None:
        """Starts moving console input to the UART; a VM without input needs no thread for it."""
        if self._has_input and (self._pump is None or self._pump.ident is None):
            self._pump_told = False
            self._pump = threading.Thread(
                target=lambda: lib.pyhv_uart16550_pump_input(self._uart, ffi.NULL), name="console-input", daemon=True
            )
            self._pump.start()

    def stop_input(self) -> None:
        """Stops it: what has not been read by then stays where it comes from, for whoever lets the VM run on."""
        if self._pump is not None and self._pump.ident is not None:  # which a limit of threads may have prevented
            if not self._pump_told:  # once: a second word would end the next one
                self._pump_told = True
                lib.pyhv_uart16550_stop_input(self._uart)
            self._pump.join()
            self._pump = None

    def lost_output(self) -> tuple[int, int]:
        """Where writing the guest's output has failed: the errno, and how many bytes are lost since; else zeros."""
        count = ffi.new("uint64_t *")
        return int(lib.pyhv_uart16550_lost_output(self._uart, count)), int(count[0])

    def close(self) -> None:
        """Stops the input and destroys bus and devices. No vCPU may run any more."""
        self.stop_input()
        bus, self.bus = self.bus, ffi.NULL  # first: Ctrl-C may come after any call
        lib.pyhv_bus_destroy(bus)

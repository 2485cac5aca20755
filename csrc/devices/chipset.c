/* SPDX-License-Identifier: MIT
 *
 * What kernels ask of a PC's chipset: is there a PCI bus, and how is the machine reset?
 *
 * Ports: 0x92 (system control port A) and 0xcf8 to 0xcff (PCI configuration; 0xcf9 is the reset control register).
 * Sources: PCI Local Bus Specification 3.0, section 3.2.2.3.2; Intel ICH9 datasheet, "PORT92" and "RST_CNT".
 *
 *  - There is no PCI bus. The address register at 0xcf8 does not keep what is written, by which a kernel sees that there
 *    is no configuration mechanism; one that does not look finds no device: the data register reads all-ones.
 *  - 0xcf9, by one byte: a write with bit 2 resets the machine. Reads 0.
 *  - 0x92: A20 is on and stays on (bit 1); a write with bit 0 resets the machine.
 *
 * Two more ports that kernels use need no device: 0x61 belongs to the in-kernel PIT, and what is written to 0x80 (progress
 * codes; a short wait) vanishes as on any port without a listener.
 *
 * Saved state, version 1: nothing beyond the version byte.
 */
#include "devices/device.h"

#define CONTROL_A 0x92
#define PCI_FIRST 0xcf8
#define RESET     0xcf9
#define PCI_PORTS 8

#define CONTROL_A_RESET 0x01
#define CONTROL_A_A20   0x02
#define RESET_CPU       0x04

static uint32_t chipset_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    (void)device;
    if (offset == 0)
        return CONTROL_A_A20;
    return size == 1 && offset == RESET - CONTROL_A ? 0 : UINT32_MAX;
}

static enum pyhv_action chipset_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    (void)device;
    bool resets = offset == 0 ? value & CONTROL_A_RESET : size == 1 && offset == RESET - CONTROL_A && value & RESET_CPU;
    return resets ? PYHV_ACTION_RESET : PYHV_ACTION_NONE;
}

static const struct pyhv_device_ops chipset_ops = {
    .name = "chipset",
    .size = sizeof(struct pyhv_device),
    .state_version = 1,
    .max_access = 4,
    .read = chipset_read,
    .write = chipset_write,
};

struct pyhv_device *pyhv_chipset_create(struct pyhv_error *error)
{
    struct pyhv_device *device = pyhv_device_create(&chipset_ops, CONTROL_A, 1, error);
    if (device && pyhv_device_add_ports(device, PCI_FIRST, PCI_PORTS, error) < 0) {
        pyhv_device_destroy(device);
        return NULL;
    }
    return device;
}

/* SPDX-License-Identifier: MIT
 *
 * What kernels ask of a PC's chipset: is there a PCI bus, and how is the machine reset?
 *
 * Ports: 0x92 (system control port A) and 0xcf8 to 0xcff (PCI configuration; 0xcf9 is the reset control register).
 * Sources: PCI Local Bus Specification 3.0, section 3.2.2.3.2; Intel ICH9 datasheet, "PORT92" and "RST_CNT".
 *
 *  - Configuration mechanism #1, with no device on any bus: the address register, a double word at 0xcf8, keeps what is
 *    written but for its reserved bits; the data register at 0xcfc reads all-ones, and writes to it go nowhere.
 *  - 0xcf9, by one byte: a write with bit 2 resets the machine. Reads 0.
 *  - 0x92: A20 is on and stays on (bit 1); a write with bit 0 resets the machine.
 *
 * Two more ports that kernels use need no device: 0x61 belongs to the in-kernel PIT, and what is written to 0x80 (progress
 * codes; a short wait) vanishes as on any port without a listener.
 *
 * Saved state, version 2: u32 address register.
 */
#include "devices/device.h"

#define CONTROL_A 0x92
#define PCI_FIRST 0xcf8 /* the address register */
#define RESET     0xcf9
#define PCI_PORTS 8

#define CONTROL_A_RESET 0x01
#define CONTROL_A_A20   0x02
#define RESET_CPU       0x04

#define ADDRESS_BITS 0x80fffffc /* enable; bus, device, function and register */

struct chipset {
    struct pyhv_device device;
    uint32_t address;
};

static struct chipset *chipset_of(struct pyhv_device *device)
{
    return (struct chipset *)device;
}

static uint32_t chipset_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    if (offset == 0)
        return CONTROL_A_A20;
    if (size == 4 && offset == PCI_FIRST - CONTROL_A)
        return chipset_of(device)->address;
    return size == 1 && offset == RESET - CONTROL_A ? 0 : UINT32_MAX;
}

static enum pyhv_action chipset_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    if (size == 4 && offset == PCI_FIRST - CONTROL_A)
        chipset_of(device)->address = value & ADDRESS_BITS;
    bool resets = offset == 0 ? value & CONTROL_A_RESET : size == 1 && offset == RESET - CONTROL_A && value & RESET_CPU;
    return resets ? PYHV_ACTION_RESET : PYHV_ACTION_NONE;
}

static void chipset_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    pyhv_put_int(out, chipset_of(device)->address, 4);
}

static int chipset_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    uint32_t address = (uint32_t)pyhv_get_int(in, 4);
    if (in->truncated)
        return pyhv_device_refuse_state(device, error, "the state is cut short");
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);
    if (address & ~ADDRESS_BITS)
        return pyhv_device_refuse_state(device, error, "reserved bits are set in address 0x%08x", address);
    chipset_of(device)->address = address;
    return 0;
}

static const struct pyhv_device_ops chipset_ops = {
    .name = "chipset",
    .size = sizeof(struct chipset),
    .state_version = 2,
    .max_access = 4,
    .read = chipset_read,
    .write = chipset_write,
    .save = chipset_save,
    .load = chipset_load,
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

/* SPDX-License-Identifier: MIT
 *
 * The port by which a panicking kernel tells its host: the run ends at once, with a cause of its own.
 *
 * Port: one, given at creation (0x505 by convention; ACPI device QEMU0001). Source: QEMU, docs/specs/pvpanic.rst.
 *
 *  - Reads tell which events the host takes: bit 0, panicked.
 *  - A write with bit 0 ends the run. Other events ("a crash kernel takes over") are not the end, and are ignored.
 *
 * Saved state, version 1: nothing beyond the version byte.
 */
#include "devices/device.h"

#define PANICKED 0x01

static uint32_t pvpanic_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    (void)device, (void)offset, (void)size;
    return PANICKED;
}

static enum pyhv_action pvpanic_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    (void)device, (void)offset, (void)size;
    return value & PANICKED ? PYHV_ACTION_PANIC : PYHV_ACTION_NONE;
}

static const struct pyhv_device_ops pvpanic_ops = {
    .name = "pvpanic",
    .size = sizeof(struct pyhv_device),
    .state_version = 1,
    .max_access = 1,
    .read = pvpanic_read,
    .write = pvpanic_write,
};

struct pyhv_device *pyhv_pvpanic_create(uint16_t port, struct pyhv_error *error)
{
    return pyhv_device_create(&pvpanic_ops, port, 1, error);
}

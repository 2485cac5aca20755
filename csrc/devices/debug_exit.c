/* SPDX-License-Identifier: MIT
 *
 * The debug-exit port: a guest's way to end its run with a status.
 *
 * Ports: one, given at creation (0xf4 by convention). A write asks for the end of the run; the byte written is
 * the status as it stands. A wider access counts with the byte that falls on this port, for the bus splits it.
 * Reads are all-ones, as from an empty port. No datasheet: test systems invented it.
 *
 * The status itself lives in the bus: the first one written wins there, whichever vCPU it comes from.
 *
 * Saved state, version 1: nothing beyond the version byte.
 */
#include "devices/device.h"

static uint32_t debug_exit_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    (void)device, (void)offset, (void)size;
    return 0xff;
}

static enum pyhv_action debug_exit_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    (void)device, (void)offset, (void)size, (void)value;
    return PYHV_ACTION_GUEST_EXIT;
}

static const struct pyhv_device_ops debug_exit_ops = {
    .name = "debug_exit",
    .size = sizeof(struct pyhv_device),
    .state_version = 1,
    .max_access = 1,
    .read = debug_exit_read,
    .write = debug_exit_write,
};

struct pyhv_device *pyhv_debug_exit_create(uint16_t port, struct pyhv_error *error)
{
    return pyhv_device_create(&debug_exit_ops, port, 1, error);
}

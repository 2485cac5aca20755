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
#include <errno.h>
#include <stdlib.h>

#include "devices/device.h"
#include "error.h"

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

static void debug_exit_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    (void)device, (void)out;
}

static int debug_exit_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);
    return 0;
}

static void debug_exit_destroy(struct pyhv_device *device)
{
    pyhv_device_fini(device);
    free(device);
}

static const struct pyhv_device_ops debug_exit_ops = {
    .name = "debug_exit",
    .state_version = 1,
    .max_access = 1,
    .read = debug_exit_read,
    .write = debug_exit_write,
    .save = debug_exit_save,
    .load = debug_exit_load,
    .destroy = debug_exit_destroy,
};

struct pyhv_device *pyhv_debug_exit_create(uint16_t port, struct pyhv_error *error)
{
    struct pyhv_device *device = calloc(1, sizeof *device);
    if (!device) {
        pyhv_fail(error, ENOMEM, "pyhv_debug_exit_create", NULL);
        return NULL;
    }
    if (pyhv_device_init(device, &debug_exit_ops, error) < 0) {
        free(device);
        return NULL;
    }
    if (pyhv_device_add_ports(device, port, 1, error) < 0) {
        debug_exit_destroy(device);
        return NULL;
    }
    return device;
}

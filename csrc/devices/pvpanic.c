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
#include <errno.h>
#include <stdlib.h>

#include "devices/device.h"
#include "error.h"

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

static void pvpanic_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    (void)device, (void)out;
}

static int pvpanic_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);
    return 0;
}

static void pvpanic_destroy(struct pyhv_device *device)
{
    pyhv_device_fini(device);
    free(device);
}

static const struct pyhv_device_ops pvpanic_ops = {
    .name = "pvpanic",
    .state_version = 1,
    .max_access = 1,
    .read = pvpanic_read,
    .write = pvpanic_write,
    .save = pvpanic_save,
    .load = pvpanic_load,
    .destroy = pvpanic_destroy,
};

struct pyhv_device *pyhv_pvpanic_create(uint16_t port, struct pyhv_error *error)
{
    struct pyhv_device *device = calloc(1, sizeof *device);
    if (!device) {
        pyhv_fail(error, ENOMEM, "pyhv_pvpanic_create", NULL);
        return NULL;
    }
    if (pyhv_device_init(device, &pvpanic_ops, error) < 0) {
        free(device);
        return NULL;
    }
    if (pyhv_device_add_ports(device, port, 1, error) < 0) {
        pvpanic_destroy(device);
        return NULL;
    }
    return device;
}

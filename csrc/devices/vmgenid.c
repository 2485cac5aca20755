/* SPDX-License-Identifier: MIT
 *
 * The VM generation ID: 16 random bytes in guest memory that change when the VM is a copy of another one, so that a
 * guest can throw away what must be unique. Source: Microsoft, "Virtual Machine Generation ID" (2012).
 *
 * No ports: the guest reads the memory, whose address the ACPI tables tell (pyhv/boot/acpi.py). What is kept here is
 * that address, so that whoever restores a saved VM knows where its new ID belongs.
 *
 * Saved state, version 1 (9 bytes with the version): u64 guest-physical address
 */
#include "devices/device.h"

#define ALIGNMENT 8 /* what the specification asks for */

struct vmgenid {
    struct pyhv_device device;
    uint64_t gpa;
};

static struct vmgenid *vmgenid_of(struct pyhv_device *device)
{
    return (struct vmgenid *)device;
}

static void vmgenid_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    pyhv_put_int(out, vmgenid_of(device)->gpa, 8);
}

static int vmgenid_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    uint64_t gpa = pyhv_get_int(in, 8);
    if (in->truncated)
        return pyhv_device_refuse_state(device, error, "the state is cut short");
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);
    if (gpa % ALIGNMENT)
        return pyhv_device_refuse_state(device, error, "address 0x%llx is not a multiple of %d",
                                        (unsigned long long)gpa, ALIGNMENT);
    vmgenid_of(device)->gpa = gpa;
    return 0;
}

/* Without ports nobody reads or writes. */
static const struct pyhv_device_ops vmgenid_ops = {
    .name = "vmgenid",
    .size = sizeof(struct vmgenid),
    .state_version = 1,
    .max_access = 1,
    .save = vmgenid_save,
    .load = vmgenid_load,
};

struct pyhv_device *pyhv_vmgenid_create(uint64_t gpa, struct pyhv_error *error)
{
    struct pyhv_device *device = pyhv_device_create(&vmgenid_ops, 0, 0, error);
    if (device)
        vmgenid_of(device)->gpa = gpa;
    return device;
}

uint64_t pyhv_vmgenid_address(struct pyhv_device *device)
{
    pthread_mutex_lock(&device->lock);
    uint64_t gpa = vmgenid_of(device)->gpa;
    pthread_mutex_unlock(&device->lock);
    return gpa;
}

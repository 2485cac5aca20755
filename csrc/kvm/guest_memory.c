/* SPDX-License-Identifier: MIT
 *
 * Reading guest memory, by guest-physical address and as a vCPU sees it.
 */
#include <sys/ioctl.h>

#include "kvm/kvm.h"

bool kvm_read(const struct pyhv_vm *vm, uint64_t gpa, void *buffer, size_t size)
{
    for (uint32_t i = 0; i < vm->slot_count; i++) {
        const struct pyhv_slot *slot = &vm->slots[i];
        if (gpa >= slot->gpa && gpa - slot->gpa < slot->size && size <= slot->size - (gpa - slot->gpa)) {
            return pyhv_memory_read(slot->host + (gpa - slot->gpa), buffer, size, NULL) == 0;
        }
    }
    return false;
}

size_t kvm_read_linear(struct pyhv_kvm_vcpu *vcpu, uint64_t linear, void *buffer, size_t size)
{
    size_t done = 0;
    while (done < size) {
        struct kvm_translation page = {.linear_address = linear + done};
        size_t room = 4096 - ((linear + done) & 4095);
        size_t part = size - done < room ? size - done : room;
        if (ioctl(vcpu->fd, KVM_TRANSLATE, &page) < 0 || !page.valid ||
            !kvm_read(vcpu->base.vm, page.physical_address, (char *)buffer + done, part))
            break;
        done += part;
    }
    return done;
}

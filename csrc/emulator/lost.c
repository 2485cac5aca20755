/* SPDX-License-Identifier: MIT
 *
 * Guest memory that is gone: a snapshot that is mapped and that somebody cut short. For this process an access to it is a
 * SIGBUS, at any of the library's instructions. It ends the run, as KVM would, and not the process.
 */
#include "emulator/emulator.h"
#include "fault.h"

static _Thread_local struct pyhv_emulator_vcpu *current;

static bool is_guest_memory(const struct pyhv_emulator_vm *vm, const uint8_t *address)
{
    for (uint32_t i = 0; i < vm->base.slot_count; i++)
        if (address >= vm->base.slots[i].host && address < vm->base.slots[i].host + vm->base.slots[i].size)
            return true;
    return false;
}

static bool end_run(const siginfo_t *info)
{
    struct pyhv_emulator_vcpu *vcpu = current;
    if (vcpu && info->si_code == BUS_ADRERR && is_guest_memory(emulator_vm(vcpu), info->si_addr)) {
        vcpu->happened = HAPPENED_LOST_MEMORY;
        if (vcpu->executing) /* as the library itself leaves an instruction that faults */
            pyhv_library_leave(vcpu->engine);
        siglongjmp(vcpu->lost_memory, 1);
    }
    return false;
}

PYHV_FAULT(bus_error, SIGBUS, end_run);

void emulator_watch_memory(struct pyhv_emulator_vcpu *vcpu)
{
    current = vcpu;
    if (vcpu)
        pyhv_fault_install(&bus_error);
}

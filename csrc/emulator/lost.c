/* SPDX-License-Identifier: MIT
 *
 * Guest memory that is gone: a snapshot that is mapped and that somebody cut short. For this process an access to it is a
 * SIGBUS, at any of the library's instructions. It ends the run, as KVM would, and not the process.
 */
#include <pthread.h>
#include <signal.h>

#include "emulator/emulator.h"

static _Thread_local struct pyhv_emulator_vcpu *current;
static struct sigaction before;

static bool is_guest_memory(const struct pyhv_emulator_vm *vm, const uint8_t *address)
{
    for (uint32_t i = 0; i < vm->slot_count; i++)
        if (address >= vm->slots[i].host && address < vm->slots[i].host + vm->slots[i].size)
            return true;
    return false;
}

static void on_bus_error(int signal, siginfo_t *info, void *context)
{
    struct pyhv_emulator_vcpu *vcpu = current;
    if (vcpu && info->si_code == BUS_ADRERR && is_guest_memory(vcpu->vm, info->si_addr)) {
        vcpu->happened = HAPPENED_LOST_MEMORY;
        if (vcpu->executing) /* as the library itself leaves an instruction that faults */
            pyhv_library_leave(vcpu->engine);
        siglongjmp(vcpu->lost_memory, 1);
    }
    if (before.sa_flags & SA_SIGINFO && before.sa_sigaction)
        before.sa_sigaction(signal, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN && before.sa_handler)
        before.sa_handler(signal);
    else /* let it happen again, and have its usual end */
        sigaction(SIGBUS, &before, NULL);
}

static void install(void)
{
    /* SA_NODEFER: it is left by a jump that does not bring the signals' mask back. */
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
}

void emulator_watch_memory(struct pyhv_emulator_vcpu *vcpu)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install);
    current = vcpu;
}

/* SPDX-License-Identifier: MIT
 *
 * Whether anything can wake a vCPU that is halted, and how to look without stopping it.
 *
 * KVM tells a vCPU's state only while its thread is outside of KVM_RUN. A vCPU that is running is therefore asked to look
 * at itself: its thread leaves KVM_RUN for some microseconds, inside the run. No other vCPU notices, and to the guest it
 * is what any signal or interrupt of the host's is; one that is halted does not even leave its HLT.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include "kvm/kvm.h"

#define RFLAGS_IF (UINT64_C(1) << 9)

/* SDM Vol. 3, "Local Vector Table", and Intel's data sheet of the 82093AA: the delivery mode is in bits 10:8. */
enum { MODE_SMI = 2, MODE_NMI = 4, MODE_INIT = 5, LAPIC_LVT_LINT0 = 0x350 };
#define MODE(entry) ((entry) >> 8 & 7)
#define MASKED      (UINT64_C(1) << 16)

/* How long a running vCPU is waited for, in ms. One that needs longer is busy. */
enum { LOOK_PATIENCE = 100 };

/* Whether a line of the I/O APIC may bring what HLT does not sleep through. Every device has a line there. */
static int ioapic_may_wake(struct pyhv_kvm_vcpu *vcpu, const struct pyhv_events *events, struct pyhv_error *error)
{
    struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_IOAPIC};
    if (ioctl(kvm_vm(vcpu)->fd, KVM_GET_IRQCHIP, &chip) < 0)
        return pyhv_fail(error, errno, "KVM_GET_IRQCHIP", "the I/O APIC");
    for (int pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++) {
        uint64_t entry = chip.chip.ioapic.redirtbl[pin].bits;
        unsigned mode = MODE(entry);
        if (!(entry & MASKED) && ((mode == MODE_NMI && !events->nmi_masked) || mode == MODE_SMI || mode == MODE_INIT))
            return 1;
    }
    return 0;
}

/* Whether the PIT ticks into an LINT0 that makes NMIs of it: so Linux's NMI watchdog did. */
static int pit_may_wake(struct pyhv_kvm_vcpu *vcpu, const struct pyhv_events *events, struct pyhv_error *error)
{
    uint8_t lapic[PYHV_LAPIC_SIZE];
    uint32_t lint0;
    struct kvm_pit_state2 pit;
    if (!vcpu->base.vm->pit || events->nmi_masked)
        return 0;
    if (kvm_get_lapic(&vcpu->base, lapic, error) < 0)
        return -1;
    memcpy(&lint0, lapic + LAPIC_LVT_LINT0, sizeof lint0);
    if (lint0 & MASKED || MODE(lint0) != MODE_NMI)
        return 0;
    if (ioctl(kvm_vm(vcpu)->fd, KVM_GET_PIT2, &pit) < 0)
        return pyhv_fail_errno(error, "KVM_GET_PIT2");
    return pit.channels[0].mode <= 4; /* else it never ticks. A single shot that is over counts as one to come */
}

/* For a vCPU that stands. What can end a HLT with interrupts off: NMI, SMI and INIT, from another vCPU (which is the
 * caller's to ask), the I/O APIC or the PIT. Nothing in this VM drives LINT1, and no timer of the LAPIC makes an NMI. */
static int look(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error)
{
    struct pyhv_regs regs;
    struct pyhv_events events;
    int state = kvm_get_mp_state(&vcpu->base, error);
    if (state < 0)
        return -1;
    if (state == KVM_MP_STATE_UNINITIALIZED || state == KVM_MP_STATE_INIT_RECEIVED)
        return 1; /* only another vCPU can start it */
    if (state != KVM_MP_STATE_HALTED)
        return 0;
    if (kvm_get_regs(&vcpu->base, &regs, error) < 0)
        return -1;
    if (regs.rflags & RFLAGS_IF)
        return 0;
    if (kvm_get_events(&vcpu->base, &events, error) < 0)
        return -1;
    if ((events.nmi_pending && !events.nmi_masked) || events.nmi_injected || events.interrupt_injected ||
        events.smi_pending || events.latched_init || events.exception_pending || events.exception_injected)
        return 0; /* it is about to wake */
    int may_wake = ioapic_may_wake(vcpu, &events, error);
    if (may_wake == 0)
        may_wake = pit_may_wake(vcpu, &events, error);
    return may_wake < 0 ? -1 : !may_wake;
}

int kvm_waits_for_ever(struct pyhv_vcpu *base, struct pyhv_error *error)
{
    struct pyhv_kvm_vcpu *vcpu = kvm_of(base);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += LOOK_PATIENCE * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;

    pthread_mutex_lock(&vcpu->kick.lock);
    int result = 0;
    if (!vcpu->kick.running) { /* and no run begins meanwhile: KVM would let the look wait for its end */
        result = look(vcpu, error);
        pthread_mutex_unlock(&vcpu->kick.lock);
        return result;
    }
    vcpu->look = LOOK_WANTED;
    vcpu->run->immediate_exit = 1;
    int errnum = pyhv_kick_send(&vcpu->kick);
    while (!errnum && vcpu->look == LOOK_WANTED && vcpu->kick.running)
        if (pthread_cond_timedwait(&vcpu->looked, &vcpu->kick.lock, &until) == ETIMEDOUT)
            break;
    if (vcpu->look == LOOK_DONE) {
        result = vcpu->look_result;
        if (result < 0 && error)
            *error = vcpu->look_error;
    }
    vcpu->look = LOOK_NONE;
    pthread_mutex_unlock(&vcpu->kick.lock);
    return errnum ? pyhv_fail(error, errnum, "pthread_kill", "SIGURG to the thread of vCPU %u", vcpu->base.index)
                  : result;
}

void kvm_look(struct pyhv_kvm_vcpu *vcpu)
{
    struct pyhv_error error = {0};
    int result = look(vcpu, &error);
    pthread_mutex_lock(&vcpu->kick.lock);
    if (vcpu->look == LOOK_WANTED) { /* else nobody waits for it any more */
        vcpu->look = LOOK_DONE;
        vcpu->look_result = result;
        vcpu->look_error = error;
        pthread_cond_broadcast(&vcpu->looked);
    }
    pthread_mutex_unlock(&vcpu->kick.lock);
}

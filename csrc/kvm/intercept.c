/* SPDX-License-Identifier: MIT
 *
 * CPUID without the kernel: KVM has no exit for it, but its guest debug stops a vCPU in front of an
 * instruction. Then the engine answers from its own table and moves RIP past the instruction, which never
 * executes.
 *
 * What this covers. With breakpoints on declared addresses: every CPUID at these addresses, at full speed in
 * between. With stepping: every instruction whose step is reported. A step is asked for through RFLAGS.TF,
 * which the processor clears when it delivers an exception or interrupt or executes INT n or SYSCALL; until
 * the handler returns nothing is reported. Interrupts are held back where the kernel can
 * (KVM_GUESTDBG_BLOCKIRQ); software ones are counted as gaps; exceptions cannot be seen from here. And the
 * guest can see TF by PUSHF.
 *
 * A guest that would take an interrupt is refused when the first one waits: held back it would never come. To deliver it
 * and stop in front of the handler takes a breakpoint there, on a vector that is certain only when it is too late: one of a
 * higher priority may come in between, and its handler would run unseen.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm/kvm.h"

#define MSR_IA32_XSS 0xda0

/* DR7 (SDM Vol. 3, "Debug Control Register"): global enable of breakpoint n is bit 2n+1; length and type zero
 * mean "execution"; bit 10 reads as one. */
#define DR7_FIXED         0x400u
#define DR7_GLOBAL_BIT(n) (2u << (2 * (n)))

int kvm_trap(struct pyhv_vcpu *base, const struct pyhv_trap_config *config, struct pyhv_error *error)
{
    struct pyhv_kvm_vcpu *vcpu = kvm_of(base);
    (void)error;
    vcpu->trap = (struct pyhv_trap){.table = config->table, .site_count = config->site_count};
    memcpy(vcpu->trap.sites, config->sites, sizeof vcpu->trap.sites);
#ifdef KVM_GUESTDBG_BLOCKIRQ
    /* The capability's value is the set of flags that KVM_SET_GUEST_DEBUG takes. */
    int flags = ioctl(kvm_vm(vcpu)->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_SET_GUEST_DEBUG2);
    vcpu->trap.block_irq = flags > 0 && (flags & KVM_GUESTDBG_BLOCKIRQ);
#endif
    return 0;
}

static int set_guest_debug(struct pyhv_kvm_vcpu *vcpu, const struct kvm_guest_debug *debug, struct pyhv_error *error)
{
    if (ioctl(vcpu->fd, KVM_SET_GUEST_DEBUG, debug) < 0)
        return pyhv_fail_errno(error, "KVM_SET_GUEST_DEBUG");
    vcpu->debugged = debug->control != 0;
    return 0;
}

int kvm_trap_arm(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error)
{
    const struct pyhv_trap *trap = &vcpu->trap;
    if (!trap->table) {
        const struct kvm_guest_debug nothing = {0};
        return vcpu->debugged ? set_guest_debug(vcpu, &nothing, error) : 0;
    }
    struct kvm_guest_debug debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP};
    debug.arch.debugreg[7] = DR7_FIXED;
    for (uint32_t i = 0; i < trap->site_count; i++) {
        debug.arch.debugreg[i] = trap->sites[i];
        debug.arch.debugreg[7] |= DR7_GLOBAL_BIT(i);
    }
    return set_guest_debug(vcpu, &debug, error);
}

/* Registers of the local APIC, bytes from its page (SDM Vol. 3, "Local APIC Register Address Map"). */
enum { LAPIC_PPR = 0xa0, LAPIC_SVR = 0xf0, LAPIC_IRR = 0x200, LAPIC_LVT_LINT0 = 0x350 };
enum { SVR_ENABLED = 1 << 8, LVT_MASKED = 1 << 16, MODE_EXTINT = 7 };
#define RFLAGS_IF (UINT64_C(1) << 9)

static uint32_t lapic_register(const uint8_t *lapic, unsigned at)
{
    uint32_t value;
    memcpy(&value, lapic + at, sizeof value);
    return value;
}

/* The priority class of the highest interrupt that waits in the LAPIC, 0 if none does. */
static unsigned highest_class(const uint8_t *lapic)
{
    for (unsigned word = 8; word-- > 0;) { /* 32 vectors to a register, which are 16 bytes apart */
        uint32_t waiting = lapic_register(lapic, LAPIC_IRR + word * 16);
        if (waiting)
            return (word * 32 + 31 - (unsigned)__builtin_clz(waiting)) >> 4;
    }
    return 0;
}

/* Whether one of the 8259As has an interrupt for the processor: KVM keeps that to itself, so by their registers. */
static int pic_waits(const struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error)
{
    struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_PIC_MASTER};
    if (ioctl(kvm_vm(vcpu)->fd, KVM_GET_IRQCHIP, &chip) < 0)
        return pyhv_fail(error, errno, "KVM_GET_IRQCHIP", "the 8259A");
    const struct kvm_pic_state *pic = &chip.chip.pic;
    return pic->init_state == 0 && pic->irr & ~pic->imr && !pic->isr;
}

int kvm_trap_event_waits(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error)
{
    uint8_t lapic[PYHV_LAPIC_SIZE];
    struct pyhv_regs regs;
    struct pyhv_events events;
    if (!vcpu->base.vm->irqchip)
        return 0;
    if (kvm_get_events(&vcpu->base, &events, error) < 0)
        return -1;
    if (events.nmi_pending && !events.nmi_masked)
        return 1;
    if (events.interrupt_shadow)
        return 0;
    if (kvm_get_regs(&vcpu->base, &regs, error) < 0)
        return -1;
    if (!(regs.rflags & RFLAGS_IF))
        return 0;
    if (kvm_get_lapic(&vcpu->base, lapic, error) < 0)
        return -1;
    if (lapic_register(lapic, LAPIC_SVR) & SVR_ENABLED &&
        highest_class(lapic) > (lapic_register(lapic, LAPIC_PPR) >> 4 & 0xf))
        return 1;
    uint32_t lint0 = lapic_register(lapic, LAPIC_LVT_LINT0);
    return lint0 & LVT_MASKED || (lint0 >> 8 & 7) != MODE_EXTINT ? 0 : pic_waits(vcpu, error);
}

int kvm_trap_arm_step(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error)
{
    struct kvm_guest_debug debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP};
#ifdef KVM_GUESTDBG_BLOCKIRQ
    if (vcpu->trap.block_irq)
        debug.control |= KVM_GUESTDBG_BLOCKIRQ;
#endif
    /* Before every step: the call itself sets TF anew, which the instruction before may have cleared (POPF).
     */
    return set_guest_debug(vcpu, &debug, error);
}

/* The length of the CPUID instruction that `bytes` start with, 0 if they are something else. Prefixes are
 * legal and without effect, except LOCK, which makes the processor raise #UD: that is left to it. */
static unsigned cpuid_length(const uint8_t *bytes, size_t count, bool long_mode)
{
    /* Segment overrides, operand and address size, REPNE, REP. */
    static const uint8_t prefixes[] = {0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3};
    size_t i = 0;
    while (i < count && memchr(prefixes, bytes[i], sizeof prefixes))
        i++;
    if (long_mode && i < count && (bytes[i] & 0xf0) == 0x40) /* REX, which must come last */
        i++;
    return i + 1 < count && bytes[i] == 0x0f && bytes[i + 1] == 0xa2 ? (unsigned)i + 2 : 0;
}

/* Whether the instruction makes the processor clear TF and run code that no step reports. */
static bool is_software_event(const uint8_t *bytes, size_t count)
{
    if (count == 0)
        return false;
    switch (bytes[0]) {
    case 0xcc: /* INT3 */
    case 0xcd: /* INT n */
    case 0xce: /* INTO */
    case 0xf1: /* INT1 */
        return true;
    case 0x0f:
        return count > 1 &&
               (bytes[1] == 0x05 /* SYSCALL */ || bytes[1] == 0x34 /* SYSENTER */ || bytes[1] == 0x0b /* UD2 */);
    default:
        return false;
    }
}

enum kvm_trap_result kvm_trap_answer(struct pyhv_kvm_vcpu *vcpu, uint64_t linear, struct pyhv_error *error)
{
    const struct pyhv_trap *trap = &vcpu->trap;
    struct pyhv_cpuid_log *log = &vcpu->base.log;
    uint8_t bytes[15]; /* no instruction is longer */
    size_t count = kvm_read_linear(vcpu, linear, bytes, sizeof bytes);
    struct pyhv_sregs sregs;
    struct pyhv_regs regs;
    if (kvm_get_sregs(&vcpu->base, &sregs, error) < 0)
        return TRAP_FAILED;
    unsigned length = cpuid_length(bytes, count, sregs.cs.attributes >> 13 & 1);
    if (length == 0) {
        if (is_software_event(bytes, count))
            vcpu->base.counters.step_gaps++;
        return TRAP_NOT_CPUID;
    }
    if (log->records && log->count == log->capacity)
        return TRAP_LOG_FULL;
    if (kvm_get_regs(&vcpu->base, &regs, error) < 0)
        return TRAP_FAILED;

    struct pyhv_cpuid_record record = {
        .rip = linear,
        .leaf = (uint32_t)regs.rax,
        .subleaf = (uint32_t)regs.rcx,
        .cpl = sregs.ss.attributes >> 5 & 3, /* SS's DPL is the CPL (SDM Vol. 3, "Guest Register State") */
        .vcpu = vcpu->base.index,
    };
    struct pyhv_cpuid_dynamic dynamic = {.cr4 = sregs.cr4, .apic_base = sregs.apic_base, .xcr0 = 1};
    if (record.leaf == 0xd || record.leaf > trap->table->max_basic) { /* the highest leaf, repeated, may be 0xD */
        const uint32_t xss = MSR_IA32_XSS;
        if (kvm_get_xcr0(&vcpu->base, &dynamic.xcr0, error) < 0)
            return TRAP_FAILED;
        (void)kvm_get_msrs(&vcpu->base, &xss, &dynamic.xss, 1, NULL); /* stays 0 where the processor has none */
    }
    pyhv_cpuid_answer(trap->table, &dynamic, record.leaf, record.subleaf, record.guest);
    if (log->records) {
        pyhv_cpuid_host(record.leaf, record.subleaf, record.hardware);
        log->records[log->count++] = record;
    }

    regs.rax = record.guest[0]; /* 32-bit results clear the upper halves */
    regs.rbx = record.guest[1];
    regs.rcx = record.guest[2];
    regs.rdx = record.guest[3];
    regs.rip += length;
    if (kvm_set_regs(&vcpu->base, &regs, error) < 0)
        return TRAP_FAILED;
    vcpu->base.counters.cpuid_answered++;
    return log->records && log->count == log->capacity ? TRAP_LOG_FULL : TRAP_ANSWERED;
}

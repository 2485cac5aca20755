/* SPDX-License-Identifier: MIT
 *
 * What the files of csrc/kvm share: the VM and vCPU objects.
 */
#ifndef PYHV_KVM_KVM_H
#define PYHV_KVM_KVM_H

#include <linux/kvm.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "accel.h"
#include "kick.h"

struct pyhv_kvm_vm {
    struct pyhv_vm base;
    int kvm_fd;
    int fd;
    bool complete;           /* the irqchip that is wanted is there */
    bool triple_fault_event; /* a pending triple fault is part of a vCPU's events */
    bool logs_dirty;         /* the slots' flags */
    uint64_t *dirty;         /* for one slot's dirty bitmap; NULL until logging began */
};

/* CPUID traps of one vCPU; see intercept.c. */
struct pyhv_trap {
    const struct pyhv_cpuid_table *table; /* NULL: the kernel answers */
    uint32_t site_count;                  /* 0: every instruction is stepped */
    uint64_t sites[PYHV_TRAP_MAX_SITES];
    uint32_t steps;
    bool block_irq; /* KVM_GUESTDBG_BLOCKIRQ exists: no interrupt is delivered between two steps */
};

struct pyhv_kvm_vcpu {
    struct pyhv_vcpu base;
    int fd;
    struct kvm_run *run;
    size_t run_size;
    struct pyhv_trap trap;
    bool debugged;   /* KVM_SET_GUEST_DEBUG is in force */
    bool io_pending; /* the last exit's port or memory access is finished by the next KVM_RUN only */

    struct pyhv_kick kick; /* its lock covers what follows, and run->immediate_exit */
    atomic_int kicked;

    /* A look at the vCPU while it runs: see wake.c. */
    enum { LOOK_NONE, LOOK_WANTED, LOOK_DONE } look;
    int look_result;
    struct pyhv_error look_error;
    pthread_cond_t looked; /* CLOCK_MONOTONIC; also when a run ends */
};

static inline struct pyhv_kvm_vm *kvm_vm_of(struct pyhv_vm *vm)
{
    return (struct pyhv_kvm_vm *)vm;
}

static inline struct pyhv_kvm_vcpu *kvm_of(struct pyhv_vcpu *vcpu)
{
    return (struct pyhv_kvm_vcpu *)vcpu;
}

static inline struct pyhv_kvm_vm *kvm_vm(const struct pyhv_kvm_vcpu *vcpu)
{
    return kvm_vm_of(vcpu->base.vm);
}

/* ------------------------------------------------------------------------------------------ guest_memory.c -- */

/* Reads guest memory by guest-physical address; false where it is not RAM. */
bool kvm_read(const struct pyhv_vm *vm, uint64_t gpa, void *buffer, size_t size);

/* Reads guest memory as the vCPU sees it; returns how many bytes could be read from the start on. */
size_t kvm_read_linear(struct pyhv_kvm_vcpu *vcpu, uint64_t linear, void *buffer, size_t size);

/* -------------------------------------------------------------------------------------------------- vcpu.c -- */

/* After the irqchip, if one is wanted. */
struct pyhv_vcpu *kvm_vcpu_create(struct pyhv_vm *vm, uint32_t index, struct pyhv_error *error);

/* ------------------------------------------------------------------------------- registers.c and state.c -- */

int kvm_set_cpuid(struct pyhv_vcpu *vcpu, const struct pyhv_cpuid_entry *entries, size_t count,
                  struct pyhv_error *error);
int kvm_get_cpuid(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_entry *entries, size_t capacity, struct pyhv_error *error);
int kvm_get_regs(struct pyhv_vcpu *vcpu, struct pyhv_regs *regs, struct pyhv_error *error);
int kvm_set_regs(struct pyhv_vcpu *vcpu, const struct pyhv_regs *regs, struct pyhv_error *error);
int kvm_get_sregs(struct pyhv_vcpu *vcpu, struct pyhv_sregs *sregs, struct pyhv_error *error);
/* Fails with ERANGE, naming the field, for a number that a vCPU cannot have; so do kvm_set_events() and
 * kvm_set_irqchip(). */
int kvm_set_sregs(struct pyhv_vcpu *vcpu, const struct pyhv_sregs *sregs, struct pyhv_error *error);
int kvm_get_events(struct pyhv_vcpu *vcpu, struct pyhv_events *events, struct pyhv_error *error);
int kvm_set_events(struct pyhv_vcpu *vcpu, const struct pyhv_events *events, struct pyhv_error *error);
int kvm_get_debugregs(struct pyhv_vcpu *vcpu, struct pyhv_debugregs *regs, struct pyhv_error *error);
int kvm_set_debugregs(struct pyhv_vcpu *vcpu, const struct pyhv_debugregs *regs, struct pyhv_error *error);
/* KVM_MP_STATE_* or -1. */
int kvm_get_mp_state(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
int kvm_set_mp_state(struct pyhv_vcpu *vcpu, uint32_t state, struct pyhv_error *error);

/* XCR0. On a host without XSAVE it reads as 1 (x87), and only 1 can be written. */
int kvm_get_xcr0(struct pyhv_vcpu *vcpu, uint64_t *value, struct pyhv_error *error);
int kvm_set_xcr0(struct pyhv_vcpu *vcpu, uint64_t value, struct pyhv_error *error);

/* The XSAVE area in its standard format: legacy region, header, components. There is room for as many bytes as the VM's
 * has (KVM_CAP_XSAVE2), at most PYHV_XSAVE_MAX. Returns how many there are before all that is zero, at least those of
 * region and header. To write, the area may be shorter: what is missing is zero. */
int64_t kvm_get_xsave(struct pyhv_vcpu *vcpu, uint8_t *area, size_t capacity, struct pyhv_error *error);
int kvm_set_xsave(struct pyhv_vcpu *vcpu, const uint8_t *area, size_t size, struct pyhv_error *error);

int kvm_get_lapic(struct pyhv_vcpu *vcpu, uint8_t *page, struct pyhv_error *error);
int kvm_set_lapic(struct pyhv_vcpu *vcpu, const uint8_t *page, struct pyhv_error *error);
int kvm_get_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, uint64_t *values, size_t count,
                 struct pyhv_error *error);
int kvm_set_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, const uint64_t *values, size_t count,
                 struct pyhv_error *error);

/* PYHV_MSR_SSP (KVM_REG_GUEST_SSP, since Linux 6.18). Returns 0 and sets it, or 1 where this KVM or the vCPU's CPUID table
 * has none. */
int kvm_get_ssp(struct pyhv_vcpu *vcpu, uint64_t *value, struct pyhv_error *error);
int kvm_set_ssp(struct pyhv_vcpu *vcpu, uint64_t value, struct pyhv_error *error);

/* What is added to the host's (scaled) counter to give the guest's (KVM_VCPU_TSC_OFFSET, since Linux 5.16). Returns 0
 * and sets it, or 1 where this kernel cannot. */
int kvm_get_tsc_offset(struct pyhv_vcpu *vcpu, uint64_t *offset, struct pyhv_error *error);
int kvm_set_tsc_offset(struct pyhv_vcpu *vcpu, uint64_t offset, struct pyhv_error *error);

int kvm_get_tsc_khz(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
/* Another rate than the host's needs hardware that scales. Returns 1, with nothing changed, on a host that does not. */
int kvm_set_tsc_khz(struct pyhv_vcpu *vcpu, uint32_t khz, struct pyhv_error *error);

/* KVM_KVMCLOCK_CTRL: tells a guest with kvmclock that it was stopped, so that its watchdogs forgive. */
int kvm_clock_paused(struct pyhv_vcpu *vcpu, struct pyhv_error *error);

int kvm_get_irqchip(struct pyhv_vm *vm, struct pyhv_irqchip *irqchip, struct pyhv_error *error);
int kvm_set_irqchip(struct pyhv_vm *vm, const struct pyhv_irqchip *irqchip, struct pyhv_error *error);
/* kvmclock: what the guest reads, in ns. */
int kvm_get_clock(struct pyhv_vm *vm, uint64_t *ns, struct pyhv_error *error);
int kvm_set_clock(struct pyhv_vm *vm, uint64_t ns, struct pyhv_error *error);

int kvm_save_state(struct pyhv_vm *vm, struct pyhv_state *state, struct pyhv_error *error);
int kvm_load_state(struct pyhv_vm *vm, const struct pyhv_state *state, uint64_t elapsed_ns, struct pyhv_error *error);

/* -------------------------------------------------------------------------------------------------- wake.c -- */

int kvm_waits_for_ever(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
/* Answers it. On the vCPU's thread, outside of KVM_RUN, with no I/O pending. */
void kvm_look(struct pyhv_kvm_vcpu *vcpu);

/* --------------------------------------------------------------------------------------------- intercept.c -- */

int kvm_trap(struct pyhv_vcpu *vcpu, const struct pyhv_trap_config *config, struct pyhv_error *error);

/* KVM_SET_GUEST_DEBUG for what the vCPU's trap needs: breakpoints at its sites, or nothing, also after steps. */
int kvm_trap_arm(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error);

/* Whether the guest would now enter a handler, but for its being stepped: 1, 0, or -1 with an error. */
int kvm_trap_event_waits(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error);

/* KVM_SET_GUEST_DEBUG for one step of one instruction. */
int kvm_trap_arm_step(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error);

enum kvm_trap_result {
    TRAP_FAILED = -1,
    TRAP_NOT_CPUID = 0, /* nothing was done */
    TRAP_ANSWERED = 1,  /* the answer is in the registers, RIP stands after the instruction */
    TRAP_LOG_FULL = 2,  /* the log must be drained before the vCPU goes on, be this CPUID answered or not */
};

/* If the instruction at `linear`, where the vCPU stands, is CPUID: answers it from the table. No I/O may be
 * pending. */
enum kvm_trap_result kvm_trap_answer(struct pyhv_kvm_vcpu *vcpu, uint64_t linear, struct pyhv_error *error);

#endif

/* SPDX-License-Identifier: MIT
 *
 * What the files of csrc/kvm share: the VM and vCPU objects.
 */
#ifndef PYHV_KVM_KVM_H
#define PYHV_KVM_KVM_H

#include <linux/kvm.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "error.h"
#include "kick.h"
#include "pyhv.h"

struct pyhv_slot {
    uint64_t gpa;
    uint64_t size;
    uint8_t *host;
};

struct pyhv_vm {
    int kvm_fd;
    int fd;
    bool irqchip;            /* wanted */
    bool pit;                /* wanted with it */
    bool complete;           /* see pyhv_vm_complete() */
    bool triple_fault_event; /* a pending triple fault is part of a vCPU's events */
    struct pyhv_bus *bus;
    struct pyhv_vcpu *vcpus; /* the newest first, linked by `next` */
    uint32_t slot_count;
    struct pyhv_slot slots[PYHV_VM_MAX_SLOTS];
    bool logs_dirty; /* the slots' flags */
    uint64_t *dirty; /* for one slot's dirty bitmap; NULL until logging began */
};

/* CPUID traps of one vCPU; see intercept.c. */
struct pyhv_trap {
    const struct pyhv_cpuid_table *table; /* NULL: the kernel answers */
    uint32_t site_count;                  /* 0: every instruction is stepped */
    uint64_t sites[PYHV_TRAP_MAX_SITES];
    uint32_t steps;
    bool block_irq; /* KVM_GUESTDBG_BLOCKIRQ exists: no interrupt is delivered between two steps */
    struct pyhv_cpuid_record *log;
    uint32_t log_capacity;
    uint32_t log_count;
};

struct pyhv_vcpu {
    struct pyhv_vm *vm;
    struct pyhv_vcpu *next;
    int fd;
    uint32_t index;
    struct kvm_run *run;
    size_t run_size;
    struct pyhv_trap trap;
    struct pyhv_counters counters;
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

/* Creates the irqchip, if one is wanted: before the first vCPU, which gets its LAPIC from it. */
int pyhv_vm_complete(struct pyhv_vm *vm, struct pyhv_error *error);

/* Reads guest memory by guest-physical address; false where it is not RAM. */
bool pyhv_vm_read(const struct pyhv_vm *vm, uint64_t gpa, void *buffer, size_t size);

/* Reads guest memory as the vCPU sees it; returns how many bytes could be read from the start on. */
size_t pyhv_vcpu_read_linear(struct pyhv_vcpu *vcpu, uint64_t linear, void *buffer, size_t size);

/* Where the vCPU stands: CS base + RIP. */
int pyhv_vcpu_linear_rip(struct pyhv_vcpu *vcpu, uint64_t *linear, struct pyhv_error *error);

/* Answers pyhv_vcpu_waits_for_ever(). On the vCPU's thread, outside of KVM_RUN, with no I/O pending. */
void pyhv_vcpu_look(struct pyhv_vcpu *vcpu);

/* KVM_SET_GUEST_DEBUG for what the vCPU's trap needs: breakpoints at its sites, or nothing, also after steps. */
int pyhv_trap_arm(struct pyhv_vcpu *vcpu, struct pyhv_error *error);

/* Whether the guest would now enter a handler, but for its being stepped: 1, 0, or -1 with an error. */
int pyhv_trap_event_waits(struct pyhv_vcpu *vcpu, struct pyhv_error *error);

/* KVM_SET_GUEST_DEBUG for one step of one instruction. */
int pyhv_trap_arm_step(struct pyhv_vcpu *vcpu, struct pyhv_error *error);

enum pyhv_trap_result {
    PYHV_TRAP_FAILED = -1,
    PYHV_TRAP_NOT_CPUID = 0, /* nothing was done */
    PYHV_TRAP_ANSWERED = 1,  /* the answer is in the registers, RIP stands after the instruction */
    PYHV_TRAP_LOG_FULL = 2,  /* the log must be drained before the vCPU goes on, be this CPUID answered or not */
};

/* If the instruction at `linear`, where the vCPU stands, is CPUID: answers it from the table. No I/O may be
 * pending. */
enum pyhv_trap_result pyhv_trap_answer(struct pyhv_vcpu *vcpu, uint64_t linear, struct pyhv_error *error);

#endif

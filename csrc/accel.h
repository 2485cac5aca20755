/* SPDX-License-Identifier: MIT
 *
 * The one contract between the engine and what executes a guest's instructions: an accelerator, a folder of its own
 * (kvm/, emulator/). It makes VMs and vCPUs that begin with the structures below, and gives each its table of operations;
 * accel.c calls them. pyhv.h says what each operation does: it is the call of the same name there.
 */
#ifndef PYHV_ACCEL_H
#define PYHV_ACCEL_H

#include <stdbool.h>

#include "error.h"
#include "pyhv.h"

struct pyhv_slot {
    uint64_t gpa;
    uint64_t size;
    uint8_t *host;
};

struct pyhv_vm_ops {
    void (*destroy)(struct pyhv_vm *vm);
    int (*map)(struct pyhv_vm *vm, const struct pyhv_slot *slot, struct pyhv_error *error);
    int (*log_dirty)(struct pyhv_vm *vm, bool on, struct pyhv_error *error);
    int (*take_dirty)(struct pyhv_vm *vm, uint64_t *bitmap, struct pyhv_error *error);
    int (*resume)(struct pyhv_vm *vm, struct pyhv_error *error);
    int (*save_state)(struct pyhv_vm *vm, struct pyhv_state *state, struct pyhv_error *error);
    int (*load_state)(struct pyhv_vm *vm, const struct pyhv_state *state, uint64_t elapsed_ns,
                      struct pyhv_error *error);
    /* A vCPU that pyhv_vcpu_init() has been called for. */
    struct pyhv_vcpu *(*create_vcpu)(struct pyhv_vm *vm, uint32_t index, struct pyhv_error *error);
};

struct pyhv_vcpu_ops {
    void (*destroy)(struct pyhv_vcpu *vcpu);
    int (*set_cpuid)(struct pyhv_vcpu *vcpu, const struct pyhv_cpuid_entry *entries, size_t count,
                     struct pyhv_error *error);
    int (*get_cpuid)(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_entry *entries, size_t capacity,
                     struct pyhv_error *error);
    int (*get_regs)(struct pyhv_vcpu *vcpu, struct pyhv_regs *regs, struct pyhv_error *error);
    int (*set_regs)(struct pyhv_vcpu *vcpu, const struct pyhv_regs *regs, struct pyhv_error *error);
    int (*get_sregs)(struct pyhv_vcpu *vcpu, struct pyhv_sregs *sregs, struct pyhv_error *error);
    int (*set_sregs)(struct pyhv_vcpu *vcpu, const struct pyhv_sregs *sregs, struct pyhv_error *error);
    int (*get_msrs)(struct pyhv_vcpu *vcpu, const uint32_t *indices, uint64_t *values, size_t count,
                    struct pyhv_error *error);
    int (*set_msrs)(struct pyhv_vcpu *vcpu, const uint32_t *indices, const uint64_t *values, size_t count,
                    struct pyhv_error *error);
    int (*get_tsc_khz)(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
    int (*trap)(struct pyhv_vcpu *vcpu, const struct pyhv_trap_config *config, struct pyhv_error *error);
    void (*run)(struct pyhv_vcpu *vcpu, struct pyhv_exit *exit);
    void (*step)(struct pyhv_vcpu *vcpu, struct pyhv_exit *exit);
    int (*kick)(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
    int (*waits_for_ever)(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
};

struct pyhv_vm {
    const struct pyhv_vm_ops *ops;
    struct pyhv_bus *bus;
    bool irqchip; /* wanted */
    bool pit;     /* wanted with it */
    uint32_t slot_count;
    struct pyhv_slot slots[PYHV_VM_MAX_SLOTS];
    uint32_t vcpu_count;
    struct pyhv_vcpu *vcpus; /* in the order in which they were created, linked by `next` */
};

/* Answers to CPUID that were recorded and that nobody has taken yet. There is room for some more than `capacity`: an
 * accelerator may need so many CPUIDs until it stops. */
#define PYHV_CPUID_LOG_SPARE 512
struct pyhv_cpuid_log {
    struct pyhv_cpuid_record *records; /* NULL: nothing is recorded */
    uint32_t capacity, count;
};

struct pyhv_vcpu {
    const struct pyhv_vcpu_ops *ops;
    struct pyhv_vm *vm;
    struct pyhv_vcpu *next;
    uint32_t index;
    struct pyhv_counters counters;
    struct pyhv_cpuid_log log;
    struct pyhv_msr_rule *msrs; /* that it may have, by its CPUID table; ascending */
    size_t msr_count;
    uint64_t components; /* of the XSAVE area, likewise */
};

void pyhv_vcpu_init(struct pyhv_vcpu *vcpu, const struct pyhv_vcpu_ops *ops, struct pyhv_vm *vm, uint32_t index);

/* The rule for an MSR, NULL if the vCPU may not have it. */
const struct pyhv_msr_rule *pyhv_vcpu_msr_rule(const struct pyhv_vcpu *vcpu, uint32_t index);

/* The value of an MSR in a state, or NULL where it is not in there. */
const uint64_t *pyhv_state_msr(const struct pyhv_vcpu_state *state, uint32_t index);

/* The vCPU of that index. */
struct pyhv_vcpu *pyhv_vm_vcpu(const struct pyhv_vm *vm, uint32_t index);

/* CLOCK_MONOTONIC in nanoseconds. */
int64_t pyhv_now(void);

#endif

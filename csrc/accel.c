/* SPDX-License-Identifier: MIT
 *
 * The operations of pyhv.h on VMs and vCPUs: what is the same under every accelerator is done here, the rest by its table.
 */
#include "accel.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int64_t pyhv_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* --------------------------------------------------------------------------------------------------- VMs -- */

void pyhv_vm_destroy(struct pyhv_vm *vm)
{
    if (!vm)
        return;
    if (vm->bus) /* console input may still come, on its own thread, and must not raise an interrupt in here any more */
        pyhv_bus_set_irq_sink(vm->bus, (struct pyhv_irq_sink){0});
    vm->ops->destroy(vm);
}

int pyhv_vm_map(struct pyhv_vm *vm, uint64_t gpa, uint64_t size, void *host, struct pyhv_error *error)
{
    const struct pyhv_slot slot = {.gpa = gpa, .size = size, .host = host};
    if (vm->slot_count == PYHV_VM_MAX_SLOTS)
        return pyhv_fail(error, ENOSPC, "pyhv_vm_map", "more than %d pieces of memory", PYHV_VM_MAX_SLOTS);
    if (vm->ops->map(vm, &slot, error) < 0)
        return -1;
    vm->slots[vm->slot_count++] = slot;
    return 0;
}

int pyhv_vm_log_dirty(struct pyhv_vm *vm, int on, struct pyhv_error *error)
{
    return vm->ops->log_dirty(vm, on != 0, error);
}

int pyhv_vm_take_dirty(struct pyhv_vm *vm, uint64_t *bitmap, struct pyhv_error *error)
{
    return vm->ops->take_dirty(vm, bitmap, error);
}

int pyhv_vm_resume(struct pyhv_vm *vm, struct pyhv_error *error)
{
    return vm->ops->resume(vm, error);
}

struct pyhv_vcpu *pyhv_vm_vcpu(const struct pyhv_vm *vm, uint32_t index)
{
    struct pyhv_vcpu *vcpu = vm->vcpus;
    while (vcpu && vcpu->index != index)
        vcpu = vcpu->next;
    return vcpu;
}

/* ------------------------------------------------------------------------------------------------- vCPUs -- */

struct pyhv_vcpu *pyhv_vcpu_create(struct pyhv_vm *vm, uint32_t index, struct pyhv_error *error)
{
    struct pyhv_vcpu *vcpu = vm->ops->create_vcpu(vm, index, error);
    if (!vcpu)
        return NULL;
    struct pyhv_vcpu **end = &vm->vcpus;
    while (*end)
        end = &(*end)->next;
    *end = vcpu;
    vm->vcpu_count++;
    return vcpu;
}

void pyhv_vcpu_init(struct pyhv_vcpu *vcpu, const struct pyhv_vcpu_ops *ops, struct pyhv_vm *vm, uint32_t index)
{
    *vcpu = (struct pyhv_vcpu){.ops = ops, .vm = vm, .index = index};
}

void pyhv_vcpu_destroy(struct pyhv_vcpu *vcpu)
{
    if (!vcpu)
        return;
    struct pyhv_vcpu **place = &vcpu->vm->vcpus;
    while (*place != vcpu)
        place = &(*place)->next;
    *place = vcpu->next;
    vcpu->vm->vcpu_count--;
    free(vcpu->log.records);
    free(vcpu->msrs);
    vcpu->ops->destroy(vcpu);
}

int pyhv_vcpu_set_cpuid(struct pyhv_vcpu *vcpu, const struct pyhv_cpuid_entry *entries, size_t count,
                        struct pyhv_error *error)
{
    return vcpu->ops->set_cpuid(vcpu, entries, count, error);
}

int pyhv_vcpu_get_cpuid(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_entry *entries, size_t capacity,
                        struct pyhv_error *error)
{
    return vcpu->ops->get_cpuid(vcpu, entries, capacity, error);
}

int pyhv_vcpu_get_regs(struct pyhv_vcpu *vcpu, struct pyhv_regs *regs, struct pyhv_error *error)
{
    return vcpu->ops->get_regs(vcpu, regs, error);
}

int pyhv_vcpu_set_regs(struct pyhv_vcpu *vcpu, const struct pyhv_regs *regs, struct pyhv_error *error)
{
    return vcpu->ops->set_regs(vcpu, regs, error);
}

int pyhv_vcpu_get_sregs(struct pyhv_vcpu *vcpu, struct pyhv_sregs *sregs, struct pyhv_error *error)
{
    return vcpu->ops->get_sregs(vcpu, sregs, error);
}

int pyhv_vcpu_set_sregs(struct pyhv_vcpu *vcpu, const struct pyhv_sregs *sregs, struct pyhv_error *error)
{
    return vcpu->ops->set_sregs(vcpu, sregs, error);
}

int pyhv_vcpu_get_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, uint64_t *values, size_t count,
                       struct pyhv_error *error)
{
    return vcpu->ops->get_msrs(vcpu, indices, values, count, error);
}

int pyhv_vcpu_set_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, const uint64_t *values, size_t count,
                       struct pyhv_error *error)
{
    return vcpu->ops->set_msrs(vcpu, indices, values, count, error);
}

int pyhv_vcpu_get_tsc_khz(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    return vcpu->ops->get_tsc_khz(vcpu, error);
}

const struct pyhv_counters *pyhv_vcpu_counters(const struct pyhv_vcpu *vcpu)
{
    return &vcpu->counters;
}

void pyhv_vcpu_run(struct pyhv_vcpu *vcpu, struct pyhv_exit *exit)
{
    *exit = (struct pyhv_exit){0};
    vcpu->ops->run(vcpu, exit);
}

void pyhv_vcpu_step(struct pyhv_vcpu *vcpu, struct pyhv_exit *exit)
{
    *exit = (struct pyhv_exit){0};
    vcpu->ops->step(vcpu, exit);
}

int pyhv_vcpu_kick(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    return vcpu->ops->kick(vcpu, error);
}

int pyhv_vcpu_waits_for_ever(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    return vcpu->ops->waits_for_ever(vcpu, error);
}

/* ------------------------------------------------------------------------------------- answers to CPUID -- */

int pyhv_vcpu_trap(struct pyhv_vcpu *vcpu, const struct pyhv_trap_config *config, struct pyhv_error *error)
{
    if (config->site_count > PYHV_TRAP_MAX_SITES)
        return pyhv_fail(error, EINVAL, "pyhv_vcpu_trap", "%u addresses, the processor has %d breakpoints",
                         config->site_count, PYHV_TRAP_MAX_SITES);
    struct pyhv_cpuid_log log = {.capacity = config->log_capacity};
    if (log.capacity > 0) {
        log.records = calloc((size_t)log.capacity + PYHV_CPUID_LOG_SPARE, sizeof *log.records);
        if (!log.records)
            return pyhv_fail(error, ENOMEM, "pyhv_vcpu_trap", "a log of %u records", log.capacity);
    }
    free(vcpu->log.records);
    vcpu->log = log;
    return vcpu->ops->trap(vcpu, config, error);
}

size_t pyhv_vcpu_trap_log(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_record *records, size_t capacity)
{
    struct pyhv_cpuid_log *log = &vcpu->log;
    size_t count = log->count < capacity ? log->count : capacity;
    if (count == 0)
        return 0;
    memcpy(records, log->records, count * sizeof *records);
    memmove(log->records, log->records + count, (log->count - count) * sizeof *records);
    log->count -= (uint32_t)count;
    return count;
}

/* ------------------------------------------------------------------------------------------------- state -- */

int pyhv_vcpu_grant(struct pyhv_vcpu *vcpu, const struct pyhv_msr_rule *rules, size_t count, uint64_t components,
                    struct pyhv_error *error)
{
    if (count > PYHV_STATE_MSRS_MAX)
        return pyhv_fail(error, E2BIG, "pyhv_vcpu_grant", "%zu MSRs, at most %d are possible", count,
                         PYHV_STATE_MSRS_MAX);
    struct pyhv_msr_rule *msrs = calloc(count ? count : 1, sizeof *msrs);
    if (!msrs)
        return pyhv_fail(error, ENOMEM, "pyhv_vcpu_grant", NULL);
    if (count)
        memcpy(msrs, rules, count * sizeof *msrs);
    free(vcpu->msrs);
    vcpu->msrs = msrs;
    vcpu->msr_count = count;
    vcpu->components = components;
    return 0;
}

static int compare_rules(const void *index, const void *rule)
{
    uint32_t wanted = *(const uint32_t *)index, found = ((const struct pyhv_msr_rule *)rule)->index;
    return (wanted > found) - (wanted < found);
}

const struct pyhv_msr_rule *pyhv_vcpu_msr_rule(const struct pyhv_vcpu *vcpu, uint32_t index)
{
    return bsearch(&index, vcpu->msrs, vcpu->msr_count, sizeof *vcpu->msrs, compare_rules);
}

const uint64_t *pyhv_state_msr(const struct pyhv_vcpu_state *state, uint32_t index)
{
    for (uint32_t i = 0; i < state->msr_count; i++)
        if (state->msr_indices[i] == index)
            return &state->msr_values[i];
    return NULL;
}

static int check_count(const struct pyhv_vm *vm, const struct pyhv_state *state, struct pyhv_error *error)
{
    if (state->vcpu_count == vm->vcpu_count)
        return 0;
    return pyhv_fail(error, ERANGE, "state", "of %u vCPUs, the VM has %u", state->vcpu_count, vm->vcpu_count);
}

static int check_vcpu(const struct pyhv_vcpu *vcpu, const struct pyhv_vcpu_state *state, struct pyhv_error *error)
{
    if (state->msr_count > PYHV_STATE_MSRS_MAX || state->xsave_size > PYHV_XSAVE_MAX)
        return pyhv_fail(error, ERANGE, "state", "vCPU %u: %u MSRs, an XSAVE area of %u bytes", vcpu->index,
                         state->msr_count, state->xsave_size);
    if (state->lapic_size && state->lapic_size != PYHV_LAPIC_SIZE)
        return pyhv_fail(error, ERANGE, "state", "vCPU %u: a LAPIC of %u bytes, not %d", vcpu->index, state->lapic_size,
                         PYHV_LAPIC_SIZE);
    for (uint32_t i = 0; i < state->msr_count; i++)
        if (!pyhv_vcpu_msr_rule(vcpu, state->msr_indices[i]))
            return pyhv_fail(error, EPERM, "state", "vCPU %u has no such MSR by its CPUID table: 0x%x", vcpu->index,
                             state->msr_indices[i]);
    return 0;
}

int pyhv_vm_save_state(struct pyhv_vm *vm, struct pyhv_state *state, struct pyhv_error *error)
{
    if (check_count(vm, state, error) < 0)
        return -1;
    state->has_irqchip = vm->irqchip;
    state->has_pit = vm->pit;
    return vm->ops->save_state(vm, state, error);
}

int pyhv_vm_load_state(struct pyhv_vm *vm, const struct pyhv_state *state, uint64_t elapsed_ns,
                       struct pyhv_error *error)
{
    if (check_count(vm, state, error) < 0)
        return -1;
    for (const struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next)
        if (vcpu->index >= state->vcpu_count || check_vcpu(vcpu, &state->vcpus[vcpu->index], error) < 0)
            return -1;
    return vm->ops->load_state(vm, state, elapsed_ns, error);
}

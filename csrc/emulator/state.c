/* SPDX-License-Identifier: MIT
 *
 * The whole state of the emulator's processor, and putting one in, be it the emulator's own or KVM's. What the emulator does
 * not have is refused by name, before anything is changed.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "emulator/emulator.h"

enum { IA32_TSC = 0x10 };
enum { XSTATE_BV = 512, XSTATE_BV_END = 520 }; /* of the XSAVE area (SDM Vol. 1) */
#define LEGACY_COMPONENTS UINT64_C(3)          /* x87 and SSE */

int emulator_save_state(struct pyhv_vm *base, struct pyhv_state *whole, struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    struct pyhv_vcpu *vcpu = &vm->vcpu->base;
    struct pyhv_vcpu_state *state = &whole->vcpus[0];
    whole->clock = (uint64_t)(pyhv_now() - vm->clock_zero);
    whole->tsc_khz = vm->vcpu->tsc_khz;
    state->msr_count = 0;
    for (size_t i = 0; i < vcpu->msr_count; i++)
        if (emulator_has_msr(vcpu->msrs[i].index))
            state->msr_indices[state->msr_count++] = vcpu->msrs[i].index;
    if (emulator_get_msrs(vcpu, state->msr_indices, state->msr_values, state->msr_count, error) < 0)
        return -1;
    int64_t size = emulator_get_xsave(vcpu, state->xsave, sizeof state->xsave, error);
    if (size < 0)
        return -1;
    state->xsave_size = (uint32_t)size;
    state->lapic_size = base->irqchip ? PYHV_LAPIC_SIZE : 0;
    if (base->irqchip) {
        emulator_get_lapic(base, state->lapic);
        emulator_get_irqchip(base, &whole->irqchip);
    }
    state->xcr0 = 1;
    state->mp_state = (uint32_t)emulator_get_mp_state(vcpu);
    return emulator_get_regs(vcpu, &state->regs, error) < 0 || emulator_get_sregs(vcpu, &state->sregs, error) < 0 ||
                   emulator_get_debugregs(vcpu, &state->debugregs, error) < 0 ||
                   emulator_get_events(vcpu, &state->events, error) < 0
               ? -1
               : 0;
}

static uint64_t components(const struct pyhv_vcpu_state *state)
{
    uint64_t present = 0;
    if (state->xsave_size >= XSTATE_BV_END)
        memcpy(&present, state->xsave + XSTATE_BV, sizeof present);
    return present;
}

/* Adds to a list in words. */
static void add(char *list, size_t size, const char *name, uint64_t value, bool with_value)
{
    size_t length = strlen(list);
    if (with_value)
        snprintf(list + length, size - length, "%s%s 0x%llx", length ? ", " : "", name, (unsigned long long)value);
    else
        snprintf(list + length, size - length, "%s%s", length ? ", " : "", name);
}

/* An MSR that is without effect here: the emulator's LFENCE waits anyway. */
static bool is_needless(const struct pyhv_vcpu *vcpu, uint32_t index)
{
    return pyhv_vcpu_msr_rule(vcpu, index)->flags & PYHV_MSR_NEEDLESS;
}

/* Names all that the emulator cannot take over. */
static int check(const struct pyhv_vcpu *vcpu, const struct pyhv_vcpu_state *state, struct pyhv_error *error)
{
    char wrong[160] = "";
    for (uint32_t i = 0; i < state->msr_count; i++)
        if (state->msr_values[i] && !emulator_has_msr(state->msr_indices[i]) &&
            !is_needless(vcpu, state->msr_indices[i]))
            add(wrong, sizeof wrong, pyhv_vcpu_msr_rule(vcpu, state->msr_indices[i])->name, 0, false);
    if (state->xcr0 != 1)
        add(wrong, sizeof wrong, "XCR0", state->xcr0, true);
    if (components(state) & ~LEGACY_COMPONENTS)
        add(wrong, sizeof wrong, "XSAVE components", components(state) & ~LEGACY_COMPONENTS, true);
    return *wrong ? pyhv_fail(error, ENOTSUP, "state", "%s", wrong) : 0;
}

static int load_msrs(struct pyhv_vcpu *vcpu, const struct pyhv_vcpu_state *state, uint64_t elapsed_ns, uint32_t khz,
                     struct pyhv_error *error)
{
    for (uint32_t i = 0; i < state->msr_count; i++) {
        const uint32_t index = state->msr_indices[i];
        uint64_t value = state->msr_values[i];
        if (!emulator_has_msr(index))
            continue;
        if (index == IA32_TSC)
            value += (uint64_t)((unsigned __int128)elapsed_ns * khz / 1000000);
        int taken = emulator_set_msrs(vcpu, &index, &value, 1, error);
        if (taken < 0)
            return -1;
        if (taken == 0)
            return pyhv_fail(error, 0, "the emulator", "%s (0x%x) refuses 0x%llx",
                             pyhv_vcpu_msr_rule(vcpu, index)->name, index, (unsigned long long)value);
    }
    return 0;
}

static int load_irqchip(struct pyhv_vm *vm, const struct pyhv_state *whole, struct pyhv_error *error)
{
    const struct pyhv_vcpu_state *state = &whole->vcpus[0];
    if (state->lapic_size == 0)
        return pyhv_fail(error, 0, "local APIC", "0 bytes, not %d", PYHV_LAPIC_SIZE);
    emulator_set_lapic(vm, state->lapic);
    return emulator_set_irqchip(vm, &whole->irqchip, error);
}

int emulator_load_state(struct pyhv_vm *base, const struct pyhv_state *whole, uint64_t elapsed_ns,
                        struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    struct pyhv_vcpu *vcpu = &vm->vcpu->base;
    const struct pyhv_vcpu_state *state = &whole->vcpus[0];
    uint8_t area[PYHV_XSAVE_MAX];
    if (check(vcpu, state, error) < 0 || emulator_set_sregs(vcpu, &state->sregs, error) < 0)
        return -1;
    memset(area, 0, XSTATE_BV_END);
    memcpy(area, state->xsave, state->xsave_size);
    if (emulator_set_xsave(vcpu, area, state->xsave_size > XSTATE_BV_END ? state->xsave_size : XSTATE_BV_END, error) < 0)
        return -1;
    /* The rate before the counter, which goes on from the moment it is set. */
    emulator_set_tsc_khz(vcpu, whole->tsc_khz);
    if (load_msrs(vcpu, state, elapsed_ns, whole->tsc_khz, error) < 0)
        return -1;
    if (whole->has_irqchip && load_irqchip(base, whole, error) < 0)
        return -1;
    if (emulator_set_regs(vcpu, &state->regs, error) < 0 || emulator_set_debugregs(vcpu, &state->debugregs, error) < 0 ||
        emulator_set_mp_state(vcpu, state->mp_state, error) < 0)
        return -1;
    /* Last: an exception or interrupt that was on its way is delivered here, to the stack and the tables that are set. */
    if (emulator_set_events(vcpu, &state->events, error) < 0)
        return -1;
    vm->clock_zero = (int64_t)((uint64_t)pyhv_now() - (whole->clock + elapsed_ns));
    return 0;
}

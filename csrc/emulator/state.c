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
enum { PIT_FLAGS_SPEAKER = 2 };                /* KVM_PIT_FLAGS_SPEAKER_DATA_ON, which old headers lack */
#define LEGACY_COMPONENTS UINT64_C(3)          /* x87 and SSE */

/* -------------------------------------------------------------------------------- the irqchip, and what waits -- */

void emulator_get_irqchip(struct pyhv_vm *base, struct pyhv_irqchip *irqchip)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    pthread_mutex_lock(&vm->lock);
    (void)irqchip_update(&vm->chips, pyhv_now());
    *irqchip = (struct pyhv_irqchip){.ioapic = vm->chips.ioapic};
    memcpy(irqchip->pic, vm->chips.pic, sizeof irqchip->pic);
    if (vm->base.pit) {
        memcpy(irqchip->pit, vm->chips.pit, sizeof irqchip->pit);
        irqchip->pit_flags = vm->chips.speaker ? PIT_FLAGS_SPEAKER : 0;
        for (int i = 0; i < 3; i++)
            irqchip->pit[i].count_load_time = 0; /* of this process's clock: see struct pyhv_pit_channel */
    }
    pthread_mutex_unlock(&vm->lock);
}

int emulator_set_irqchip(struct pyhv_vm *base, const struct pyhv_irqchip *irqchip, struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    if (irqchip->ioapic.base_address != IOAPIC_BASE)
        return pyhv_fail(error, EINVAL, "I/O APIC", "at 0x%llx; the emulator has it at 0x%llx",
                         (unsigned long long)irqchip->ioapic.base_address, (unsigned long long)IOAPIC_BASE);
    for (int i = 0; i < 3; i++)
        if (irqchip->pit[i].initial_count > 0x10000 || irqchip->pit[i].mode > 5)
            return pyhv_fail(error, EINVAL, "PIT", "channel %d: count %u, mode %u", i, irqchip->pit[i].initial_count,
                             irqchip->pit[i].mode);
    int64_t now = pyhv_now();
    pthread_mutex_lock(&vm->lock);
    memcpy(vm->chips.pic, irqchip->pic, sizeof vm->chips.pic);
    vm->chips.ioapic = irqchip->ioapic;
    if (vm->base.pit) {
        memcpy(vm->chips.pit, irqchip->pit, sizeof vm->chips.pit);
        vm->chips.speaker = irqchip->pit_flags & PIT_FLAGS_SPEAKER;
        for (int i = 0; i < 3; i++)
            vm->chips.pit[i].count_load_time = now;
        vm->chips.pit_counted = now;
    }
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

void emulator_get_lapic(struct pyhv_vm *base, uint8_t *page)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    pthread_mutex_lock(&vm->lock);
    irqchip_save_lapic(&vm->chips, page, pyhv_now());
    pthread_mutex_unlock(&vm->lock);
}

void emulator_set_lapic(struct pyhv_vm *base, const uint8_t *page)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    pthread_mutex_lock(&vm->lock);
    irqchip_load_lapic(&vm->chips, page, pyhv_now());
    pthread_mutex_unlock(&vm->lock);
}

int emulator_get_events(struct pyhv_vcpu *base, struct pyhv_events *events, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    *events = (struct pyhv_events){0};
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    /* Between two instructions nothing is half delivered here; what waits is in the controllers. */
    events->interrupt_shadow = vcpu->context->state.hflags & HF_INHIBIT_IRQ ? 1 : 0;
    events->nmi_masked = vcpu->context->state.hflags2 & HF2_NMI ? 1 : 0;
    pthread_mutex_lock(&emulator_vm(vcpu)->lock);
    events->nmi_pending = emulator_vm(vcpu)->chips.nmi_pending;
    pthread_mutex_unlock(&emulator_vm(vcpu)->lock);
    return 0;
}

/* What KVM had begun to deliver is delivered here and now: then there is nothing to keep. */
static int finish_delivery(struct pyhv_emulator_vcpu *vcpu, const struct pyhv_events *events, struct cpu_state *state,
                           struct pyhv_error *error)
{
    enum emulator_delivery done = DELIVERED;
    vcpu->cannot = NULL;
    if (events->exception_injected || events->exception_pending) {
        if (events->exception_has_payload && events->exception_vector == 14)
            state->cr[2] = events->exception_payload;
        if (events->exception_has_payload && events->exception_vector == 1)
            state->dr[6] |= events->exception_payload;
        done = emulator_deliver(vcpu, state, EVENT_FAULT, events->exception_vector, events->exception_error);
    } else if (events->nmi_injected) {
        done = emulator_deliver(vcpu, state, EVENT_INTERRUPT, 2, 0);
    } else if (events->interrupt_injected) {
        enum emulator_event event = events->interrupt_soft ? EVENT_SOFTWARE : EVENT_INTERRUPT;
        done = emulator_deliver(vcpu, state, event, events->interrupt_vector, 0);
    }
    if (done == DELIVERED)
        return 0;
    return pyhv_fail(error, EINVAL, "events", "an exception or interrupt on its way: %s",
                     vcpu->cannot ? vcpu->cannot : "it ends in a triple fault");
}

int emulator_set_events(struct pyhv_vcpu *base, const struct pyhv_events *events, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (events->smm || events->smi_pending || events->latched_init || events->triple_fault_pending)
        return pyhv_fail(error, EINVAL, "events", "%s", "SMM, INIT or a shutdown on its way, which the emulator lacks");
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    struct cpu_state *state = &vcpu->context->state;
    state->hflags = (state->hflags & ~(uint32_t)HF_INHIBIT_IRQ) | (events->interrupt_shadow ? HF_INHIBIT_IRQ : 0);
    state->hflags2 = (state->hflags2 & ~(uint32_t)HF2_NMI) | (events->nmi_masked ? HF2_NMI : 0);
    if (finish_delivery(vcpu, events, state, error) < 0)
        return -1;
    pthread_mutex_lock(&emulator_vm(vcpu)->lock);
    emulator_vm(vcpu)->chips.nmi_pending = events->nmi_pending != 0;
    pthread_mutex_unlock(&emulator_vm(vcpu)->lock);
    return emulator_load(vcpu, vcpu->context, false, error);
}

/* -------------------------------------------------------------------------------------------------- saving -- */

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

/* ------------------------------------------------------------------------------------------------- loading -- */

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
    if (emulator_set_xsave(vcpu, area, state->xsave_size > XSTATE_BV_END ? state->xsave_size : XSTATE_BV_END, error) <
        0)
        return -1;
    /* The rate before the counter, which goes on from the moment it is set. */
    emulator_set_tsc_khz(vcpu, whole->tsc_khz);
    if (load_msrs(vcpu, state, elapsed_ns, whole->tsc_khz, error) < 0)
        return -1;
    if (whole->has_irqchip && load_irqchip(base, whole, error) < 0)
        return -1;
    if (emulator_set_regs(vcpu, &state->regs, error) < 0 ||
        emulator_set_debugregs(vcpu, &state->debugregs, error) < 0 ||
        emulator_set_mp_state(vcpu, state->mp_state, error) < 0)
        return -1;
    /* Last: an exception or interrupt that was on its way is delivered here, to the stack and the tables that are set. */
    if (emulator_set_events(vcpu, &state->events, error) < 0)
        return -1;
    vm->clock_zero = (int64_t)((uint64_t)pyhv_now() - (whole->clock + elapsed_ns));
    return 0;
}

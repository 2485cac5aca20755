/* SPDX-License-Identifier: MIT
 *
 * The whole state of a VM's processors, out of KVM and into it, in an order that KVM's own side effects dictate: the reason
 * for each place stands above the line. Sources: Documentation/virt/kvm/api.rst and arch/x86/kvm/x86.c.
 */
#include <errno.h>
#include <string.h>

#include "kvm/kvm.h"

enum { IA32_TSC = 0x10, IA32_ARCH_CAPABILITIES = 0x10a, IA32_TSC_DEADLINE = 0x6e0 };

/* The XSAVE area (SDM Vol. 1): which components are present, XSTATE_BV, is behind the legacy region. */
enum { XSTATE_BV = 512, XSTATE_BV_END = 520 };

/* Components that the guest's table does not show are not present: KVM before Linux 6.7 hands out what the host has, and a
 * lesser host would refuse it. */
static void hide_components(uint8_t *area, uint64_t components)
{
    uint64_t present;
    memcpy(&present, area + XSTATE_BV, sizeof present);
    present &= components;
    memcpy(area + XSTATE_BV, &present, sizeof present);
}

/* -------------------------------------------------------------------------------------------------- MSRs -- */

/* Those that are read with all others. */
static bool is_read(const struct pyhv_msr_rule *rule)
{
    return !(rule->flags & PYHV_MSR_ABSENT) && rule->index != PYHV_MSR_SSP;
}

/* Reads the vCPU's MSRs from rule number `from` on; the values of those that KVM refuses to read are zeros, and it is noted
 * that this host does not have them. */
static int read_msrs(struct pyhv_vcpu *vcpu, uint64_t *values, struct pyhv_error *error)
{
    uint32_t indices[PYHV_STATE_MSRS_MAX];
    uint64_t found[PYHV_STATE_MSRS_MAX];
    uint16_t places[PYHV_STATE_MSRS_MAX];
    size_t count = 0;
    for (size_t i = 0; i < vcpu->msr_count; i++) {
        if (!is_read(&vcpu->msrs[i]))
            continue;
        places[count] = (uint16_t)i;
        indices[count++] = vcpu->msrs[i].index;
    }
    for (size_t done = 0; done < count;) {
        int taken = kvm_get_msrs(vcpu, indices + done, found + done, count - done, error);
        if (taken < 0)
            return -1;
        done += (size_t)taken;
        if (done == count)
            break;
        struct pyhv_msr_rule *refused = &vcpu->msrs[places[done]];
        if (!(refused->flags & PYHV_MSR_UNSURE))
            return pyhv_fail(error, 0, "KVM_GET_MSRS", "vCPU %u: KVM lists %s (0x%x) and does not let it be read",
                             vcpu->index, refused->name, refused->index);
        refused->flags |= PYHV_MSR_ABSENT;
        done++;
    }
    for (size_t i = 0; i < count; i++)
        values[places[i]] = found[i];
    return 0;
}

static void add_msr(struct pyhv_vcpu_state *state, uint32_t index, uint64_t value)
{
    state->msr_indices[state->msr_count] = index;
    state->msr_values[state->msr_count++] = value;
}

/* tsc: what IA32_TSC holds, or NULL: what was read. */
static int save_msrs(struct pyhv_vcpu *vcpu, struct pyhv_vcpu_state *state, const uint64_t *tsc,
                     struct pyhv_error *error)
{
    uint64_t values[PYHV_STATE_MSRS_MAX];
    if (read_msrs(vcpu, values, error) < 0)
        return -1;
    state->msr_count = 0;
    for (size_t i = 0; i < vcpu->msr_count; i++) {
        const struct pyhv_msr_rule *rule = &vcpu->msrs[i];
        if (rule->index == PYHV_MSR_SSP) {
            uint64_t ssp = 0;
            if (kvm_get_ssp(vcpu, &ssp, error) < 0)
                return -1;
            values[i] = ssp;
        } else if (!is_read(rule)) {
            continue;
        }
        if (tsc && rule->index == IA32_TSC)
            values[i] = *tsc;
        if (!(rule->flags & PYHV_MSR_UNUSUAL) || values[i] != rule->usual)
            add_msr(state, rule->index, values[i]);
    }
    return 0;
}

static int write_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, const uint64_t *values, size_t count,
                      struct pyhv_error *error)
{
    int taken = kvm_set_msrs(vcpu, indices, values, count, error);
    if (taken < 0 || (size_t)taken == count)
        return taken < 0 ? -1 : 0;
    const struct pyhv_msr_rule *rule = pyhv_vcpu_msr_rule(vcpu, indices[taken]);
    return pyhv_fail(error, 0, "KVM_SET_MSRS", "vCPU %u: %s (0x%x) refuses 0x%llx", vcpu->index,
                     rule ? rule->name : "?", indices[taken], (unsigned long long)values[taken]);
}

/* All but the time-stamp counter and its deadline, whose turn is later. */
static int load_msrs(struct pyhv_vcpu *vcpu, const struct pyhv_vcpu_state *state, struct pyhv_error *error)
{
    uint32_t indices[PYHV_STATE_MSRS_MAX];
    uint64_t values[PYHV_STATE_MSRS_MAX];
    size_t count = 0;
    /* First: it decides whether there is IA32_TSX_CTRL. And not where it is so: not every KVM lets it be set. */
    const uint64_t *told = pyhv_state_msr(state, IA32_ARCH_CAPABILITIES);
    if (told) {
        const uint32_t index = IA32_ARCH_CAPABILITIES;
        uint64_t now = 0;
        if (kvm_get_msrs(vcpu, &index, &now, 1, error) < 0)
            return -1;
        if (now != *told && write_msrs(vcpu, &index, told, 1, error) < 0)
            return -1;
    }
    for (uint32_t i = 0; i < state->msr_count; i++) {
        const uint32_t index = state->msr_indices[i];
        if (index == IA32_TSC || index == IA32_TSC_DEADLINE || index == IA32_ARCH_CAPABILITIES)
            continue;
        if (index == PYHV_MSR_SSP) {
            if (kvm_set_ssp(vcpu, state->msr_values[i], error) < 0)
                return -1;
        } else if (pyhv_vcpu_msr_rule(vcpu, index)->flags & PYHV_MSR_NEEDLESS) {
            if (kvm_set_msrs(vcpu, &index, &state->msr_values[i], 1, error) < 0)
                return -1;
        } else {
            indices[count] = index;
            values[count++] = state->msr_values[i];
        }
    }
    return write_msrs(vcpu, indices, values, count, error);
}

/* --------------------------------------------------------------------------------- time-stamp counters -- */

/* What the vCPUs' counters show at one moment: read one after the other, they would jump for a guest that compares them. So
 * the first one's is read, and the others' are made of the difference of their offsets. */
struct moment {
    bool known; /* this KVM tells */
    uint64_t tsc, offset;
};

static int read_moment(struct pyhv_vcpu *first, struct moment *moment, struct pyhv_error *error)
{
    const uint32_t index = IA32_TSC;
    int offset = kvm_get_tsc_offset(first, &moment->offset, error);
    /* Last: whoever compares it with another clock reads that next. */
    int read = offset < 0 ? -1 : kvm_get_msrs(first, &index, &moment->tsc, 1, error);
    if (read < 0)
        return -1;
    moment->known = read == 1 && offset == 0;
    return 0;
}

/* Lets the counters go on from what they showed at one moment: `since`, in ns of CLOCK_MONOTONIC. */
static int load_tsc(struct pyhv_vm *vm, const struct pyhv_state *state, int64_t since, struct pyhv_error *error)
{
    /* Not by writing the MSR: KVM takes a value less than a second from what the counter shows for an attempt to synchronize
     * it with other vCPUs, and leaves it as it is. A guest saved in its first second would lose that time. */
    struct moment now = {0};
    if (read_moment(pyhv_vm_vcpu(vm, 0), &now, error) < 0)
        return -1;
    const uint64_t shift = (uint64_t)((unsigned __int128)(uint64_t)(pyhv_now() - since) * state->tsc_khz / 1000000);
    for (struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next) {
        const uint64_t *saved = pyhv_state_msr(&state->vcpus[vcpu->index], IA32_TSC);
        const uint32_t index = IA32_TSC;
        if (!saved)
            continue;
        const uint64_t counter = *saved + shift;
        if (now.known ? kvm_set_tsc_offset(vcpu, counter + now.offset - now.tsc, error) < 0
                      : write_msrs(vcpu, &index, &counter, 1, error) < 0) /* before Linux 5.16 */
            return -1;
    }
    return 0;
}

/* -------------------------------------------------------------------------------------------------- saving -- */

static int save_vcpu(struct pyhv_vcpu *vcpu, struct pyhv_vcpu_state *state, const uint64_t *tsc,
                     struct pyhv_error *error)
{
    /* First: the call itself settles INIT and SIPI that are pending, which changes registers and events. */
    int mp_state = kvm_get_mp_state(vcpu, error);
    if (mp_state < 0)
        return -1;
    state->mp_state = (uint32_t)mp_state;
    if (kvm_get_regs(vcpu, &state->regs, error) < 0 || kvm_get_sregs(vcpu, &state->sregs, error) < 0 ||
        kvm_get_xcr0(vcpu, &state->xcr0, error) < 0)
        return -1;
    int64_t size = kvm_get_xsave(vcpu, state->xsave, sizeof state->xsave, error);
    if (size < 0)
        return -1;
    state->xsave_size = (uint32_t)size;
    hide_components(state->xsave, vcpu->components);
    state->lapic_size = vcpu->vm->irqchip ? PYHV_LAPIC_SIZE : 0;
    if (state->lapic_size && kvm_get_lapic(vcpu, state->lapic, error) < 0)
        return -1;
    if (kvm_get_debugregs(vcpu, &state->debugregs, error) < 0 || save_msrs(vcpu, state, tsc, error) < 0)
        return -1;
    /* Last: what the calls before have settled or injected is in there. */
    return kvm_get_events(vcpu, &state->events, error);
}

int kvm_save_state(struct pyhv_vm *vm, struct pyhv_state *state, struct pyhv_error *error)
{
    struct pyhv_vcpu *first = pyhv_vm_vcpu(vm, 0);
    struct moment moment = {0};
    /* One after the other: they go on while the rest is read. */
    if (read_moment(first, &moment, error) < 0 || kvm_get_clock(vm, &state->clock, error) < 0)
        return -1;
    for (struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next) {
        uint64_t tsc = moment.tsc, offset = moment.offset;
        if (moment.known && vcpu != first && kvm_get_tsc_offset(vcpu, &offset, error) < 0)
            return -1;
        tsc += offset - moment.offset;
        if (save_vcpu(vcpu, &state->vcpus[vcpu->index], moment.known ? &tsc : NULL, error) < 0)
            return -1;
    }
    int khz = kvm_get_tsc_khz(first, error);
    if (khz < 0)
        return -1;
    state->tsc_khz = (uint32_t)khz;
    return vm->irqchip ? kvm_get_irqchip(vm, &state->irqchip, error) : 0;
}

/* ------------------------------------------------------------------------------------------------- loading -- */

/* Segments and control registers, x87 to AVX-512, and the counter's rate. */
static int load_processor(struct pyhv_vcpu *vcpu, const struct pyhv_state *whole, struct pyhv_error *error)
{
    const struct pyhv_vcpu_state *state = &whole->vcpus[vcpu->index];
    uint8_t area[PYHV_XSAVE_MAX];
    if (kvm_set_sregs(vcpu, &state->sregs, error) < 0)
        return -1;
    /* CR4.OSXSAVE, which SREGS brings, decides whether XCR0 may be set; XCR0 which components XSAVE may set. */
    if (kvm_set_xcr0(vcpu, state->xcr0, error) < 0)
        return -1;
    /* Never KVM_SET_FPU: it loses MXCSR. */
    memset(area, 0, XSTATE_BV_END);
    memcpy(area, state->xsave, state->xsave_size);
    hide_components(area, vcpu->components);
    if (kvm_set_xsave(vcpu, area, state->xsave_size > XSTATE_BV_END ? state->xsave_size : XSTATE_BV_END, error) < 0)
        return -1;
    /* The rate before the counter: a new rate rescales what the counter holds. It is not set where the host cannot scale:
     * that this guest can live with the host's rate has been decided before (cpu/compare.py). Where it can, that was the
     * reason to take the guest, so it must. */
    int khz = kvm_get_tsc_khz(vcpu, error);
    if (khz < 0 || ((uint32_t)khz != whole->tsc_khz && kvm_set_tsc_khz(vcpu, whole->tsc_khz, error) < 0))
        return -1;
    return 0;
}

/* General registers and what is on its way. */
static int load_progress(struct pyhv_vcpu *vcpu, const struct pyhv_vcpu_state *state, struct pyhv_error *error)
{
    /* After TSC and LAPIC: set before either the deadline is lost, and the timer never fires. */
    const uint64_t *deadline = pyhv_state_msr(state, IA32_TSC_DEADLINE);
    const uint32_t index = IA32_TSC_DEADLINE;
    if (deadline && *deadline && write_msrs(vcpu, &index, deadline, 1, error) < 0)
        return -1;
    /* Clears pending exceptions: so before the events. */
    if (kvm_set_regs(vcpu, &state->regs, error) < 0 || kvm_set_events(vcpu, &state->events, error) < 0 ||
        kvm_set_debugregs(vcpu, &state->debugregs, error) < 0)
        return -1;
    /* Last of the vCPU: from here on it may be woken. */
    return kvm_set_mp_state(vcpu, state->mp_state, error);
}

static int load_irqchip(struct pyhv_vm *vm, const struct pyhv_state *state, struct pyhv_error *error)
{
    /* Every LAPIC before the I/O APIC, which routes to them, and delivers at once what is pending. */
    for (struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next) {
        const struct pyhv_vcpu_state *own = &state->vcpus[vcpu->index];
        if (own->lapic_size == 0)
            return pyhv_fail(error, 0, "KVM_SET_LAPIC", "vCPU %u: 0 bytes, not %d", vcpu->index, PYHV_LAPIC_SIZE);
        if (kvm_set_lapic(vcpu, own->lapic, error) < 0)
            return -1;
    }
    return kvm_set_irqchip(vm, &state->irqchip, error);
}

int kvm_load_state(struct pyhv_vm *vm, const struct pyhv_state *state, uint64_t elapsed_ns, struct pyhv_error *error)
{
    const int64_t taken = pyhv_now() - (int64_t)elapsed_ns;
    for (struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next)
        if (load_processor(vcpu, state, error) < 0)
            return -1;
    for (struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next)
        if (load_msrs(vcpu, &state->vcpus[vcpu->index], error) < 0)
            return -1;
    if (load_tsc(vm, state, taken, error) < 0 || (state->has_irqchip && load_irqchip(vm, state, error) < 0))
        return -1;
    for (struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next)
        if (load_progress(vcpu, &state->vcpus[vcpu->index], error) < 0)
            return -1;
    if (kvm_set_clock(vm, state->clock + (uint64_t)(pyhv_now() - taken), error) < 0)
        return -1;
    /* After the clock: its guest was stopped. */
    for (struct pyhv_vcpu *vcpu = vm->vcpus; vcpu; vcpu = vcpu->next)
        if (kvm_clock_paused(vcpu, error) < 0)
            return -1;
    return 0;
}

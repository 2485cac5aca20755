/* SPDX-License-Identifier: MIT
 *
 * Entering the guest's handlers: exceptions, interrupts, SYSCALL, SYSENTER. The library reports that they happen and does
 * none of it.
 *
 * Sources: SDM Vol. 3, "Interrupt and Exception Handling"; Vol. 2, "INT n", "SYSCALL", "SYSENTER".
 */
#include <string.h>

#include "emulator/emulator.h"

#define CR0_PE    UINT64_C(1)
#define EFER_SCE  UINT64_C(1)
#define EFER_LMA  (UINT64_C(1) << 10)
#define RFLAGS_TF (UINT64_C(1) << 8)
#define RFLAGS_IF (UINT64_C(1) << 9)
#define RFLAGS_NT (UINT64_C(1) << 14)
#define RFLAGS_RF (UINT64_C(1) << 16)
#define RFLAGS_VM (UINT64_C(1) << 17)
#define RFLAGS_AC (UINT64_C(1) << 18)

enum { DEBUG = 1, DOUBLE_FAULT = 8, INVALID_TSS = 10, NOT_PRESENT = 11, STACK = 12, PROTECTION = 13, PAGE_FAULT = 14 };

/* Of a segment's flags (a descriptor's second word). */
#define SEG_ACCESSED   (1u << 8)
#define SEG_CONFORMING (1u << 10)
#define SEG_WRITABLE   (1u << 9)
#define SEG_CODE       (1u << 11)
#define SEG_S          (1u << 12)
#define SEG_DPL(flags) ((flags) >> 13 & 3)
#define SEG_P          (1u << 15)
#define SEG_L          (1u << 21)
#define SEG_B          (1u << 22)
#define SEG_G          (1u << 23)

/* The flat segments of SYSCALL and SYSENTER. */
#define FLAT_CODE(dpl) (SEG_G | SEG_P | (dpl) << 13 | SEG_S | SEG_CODE | 0x300u)
#define FLAT_DATA(dpl) (SEG_G | SEG_B | SEG_P | (dpl) << 13 | SEG_S | 0x300u)

/* #DF #TS #NP #SS #GP #PF #AC #CP push an error code. */
static bool has_error_code(uint32_t vector)
{
    return vector < 32 && (UINT32_C(0x60227d00) >> vector & 1);
}

static bool in_long_mode(const struct cpu_state *state)
{
    return (state->efer & EFER_LMA) != 0;
}

static int fault_with(struct emulator_fault *fault, uint32_t vector, uint32_t error_code)
{
    *fault = (struct emulator_fault){.vector = vector, .error_code = error_code};
    return -1;
}

static void set_segment(struct cpu_state *state, int which, uint32_t selector, uint64_t base, uint32_t limit,
                        uint32_t flags)
{
    state->segs[which] = (struct cpu_segment){.selector = selector, .base = base, .limit = limit, .flags = flags};
    if (which == SS)
        state->hflags = (state->hflags & ~(uint32_t)HF_CPL) | SEG_DPL(flags);
}

/* ---------------------------------------------------------------------------------------------- descriptors -- */

struct descriptor {
    uint32_t low, high;
    uint64_t linear;
};

static uint64_t descriptor_base(const struct descriptor *d)
{
    return d->low >> 16 | (d->high & 0xff) << 16 | (d->high & 0xff000000);
}

static uint32_t descriptor_limit(const struct descriptor *d)
{
    uint32_t limit = (d->low & 0xffff) | (d->high & 0xf0000);
    return d->high & SEG_G ? limit << 12 | 0xfff : limit;
}

/* Reads the descriptor of `selector`; outside its table: -1, and no fault set. */
static int read_descriptor(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, uint32_t selector,
                           struct descriptor *descriptor, struct emulator_fault *fault)
{
    const struct cpu_segment *table = selector & 4 ? &state->ldt : &state->gdt;
    uint32_t words[2];
    fault->vector = 0;
    if ((selector & ~7u) + 7 > table->limit)
        return -1;
    descriptor->linear = table->base + (selector & ~7u);
    if (emulator_copy(vcpu, state, descriptor->linear, words, sizeof words, ACCESS_READ, fault) < 0)
        return -1;
    descriptor->low = words[0];
    descriptor->high = words[1];
    return 0;
}

static int mark_accessed(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, struct descriptor *descriptor,
                         struct emulator_fault *fault)
{
    if (descriptor->high & SEG_ACCESSED)
        return 0;
    descriptor->high |= SEG_ACCESSED;
    return emulator_copy(vcpu, state, descriptor->linear + 4, &descriptor->high, sizeof descriptor->high, ACCESS_WRITE,
                         fault);
}

/* ----------------------------------------------------------------------------------------------- the stack -- */

/* A stack that is being pushed on; nothing is final before the caller takes over `sp`. */
struct stack {
    uint64_t base, sp, mask;
    unsigned width; /* bytes of a push */
    unsigned access;
};

static int push(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, struct stack *stack, uint64_t value,
                struct emulator_fault *fault)
{
    uint64_t sp = (stack->sp & ~stack->mask) | ((stack->sp - stack->width) & stack->mask);
    uint64_t linear = stack->base + (sp & stack->mask);
    if (!in_long_mode(state))
        linear &= UINT32_MAX;
    if (emulator_copy(vcpu, state, linear, &value, stack->width, ACCESS_WRITE | stack->access, fault) < 0)
        return -1;
    stack->sp = sp;
    return 0;
}

/* ------------------------------------------------------------------------------------------------ real mode -- */

static int enter_real(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state, uint32_t vector,
                      struct emulator_fault *fault)
{
    uint16_t entry[2];
    if (vector * 4 + 3 > state->idt.limit)
        return fault_with(fault, PROTECTION, 0);
    if (emulator_copy(vcpu, state, state->idt.base + vector * 4, entry, sizeof entry, ACCESS_READ, fault) < 0)
        return -1;
    struct stack stack = {.base = state->segs[SS].base, .sp = state->regs[RSP], .mask = 0xffff, .width = 2};
    if (push(vcpu, state, &stack, state->rflags, fault) < 0 ||
        push(vcpu, state, &stack, state->segs[CS].selector, fault) < 0 ||
        push(vcpu, state, &stack, state->rip, fault) < 0)
        return -1;
    state->regs[RSP] = stack.sp;
    state->rip = entry[0];
    state->segs[CS].selector = entry[1];
    state->segs[CS].base = (uint32_t)entry[1] << 4;
    state->rflags &= ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF);
    return 0;
}

/* ------------------------------------------------------------------------------------------- protected modes -- */

struct gate {
    uint32_t selector;
    uint64_t offset;
    unsigned type, dpl, stack_table; /* the last: IST */
    bool present;
};

enum { GATE_TASK = 5, GATE_INTERRUPT16 = 6, GATE_TRAP16 = 7, GATE_INTERRUPT = 14, GATE_TRAP = 15 };

static int read_gate(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, uint32_t vector, struct gate *gate,
                     struct emulator_fault *fault)
{
    uint32_t words[4] = {0};
    uint32_t size = in_long_mode(state) ? 16 : 8;
    if (vector * size + size - 1 > state->idt.limit)
        return fault_with(fault, PROTECTION, vector * 8 + 2);
    if (emulator_copy(vcpu, state, state->idt.base + vector * size, words, size, ACCESS_READ, fault) < 0)
        return -1;
    *gate = (struct gate){
        .selector = words[0] >> 16,
        .offset = (words[0] & 0xffff) | (words[1] & 0xffff0000) | (uint64_t)words[2] << 32,
        .type = words[1] >> 8 & 0x1f,
        .dpl = words[1] >> 13 & 3,
        .stack_table = words[1] & 7,
        .present = words[1] & SEG_P,
    };
    if (gate->type == GATE_INTERRUPT16 || gate->type == GATE_TRAP16)
        gate->offset &= 0xffff;
    return 0;
}

/* The stack for `cpl` out of a 64-bit TSS: table 1 to 7 is an IST, 0 the level's own. */
static int stack_from_tss64(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, unsigned table,
                            unsigned cpl, uint64_t *sp, struct emulator_fault *fault)
{
    uint32_t offset = table ? 0x24 + (table - 1) * 8 : 4 + cpl * 8;
    if (offset + 7 > state->tr.limit)
        return fault_with(fault, INVALID_TSS, state->tr.selector & 0xfffc);
    if (emulator_copy(vcpu, state, state->tr.base + offset, sp, 8, ACCESS_READ, fault) < 0)
        return -1;
    if ((uint64_t)((int64_t)(*sp << 16) >> 16) != *sp)
        return fault_with(fault, STACK, 0);
    return 0;
}

/* SS:ESP for `cpl` out of a 32-bit or 16-bit TSS, with the descriptor checked. */
static int stack_from_tss32(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, unsigned cpl, uint32_t *sp,
                            uint32_t *selector, struct descriptor *ss, struct emulator_fault *fault)
{
    bool is_32 = state->tr.flags & (1u << 11);
    uint32_t offset = is_32 ? 4 + cpl * 8 : 2 + cpl * 4, size = is_32 ? 8 : 4;
    uint16_t words[4] = {0};
    if (offset + size - 1 > state->tr.limit)
        return fault_with(fault, INVALID_TSS, state->tr.selector & 0xfffc);
    if (emulator_copy(vcpu, state, state->tr.base + offset, words, size, ACCESS_READ, fault) < 0)
        return -1;
    *sp = is_32 ? words[0] | (uint32_t)words[1] << 16 : words[0];
    *selector = is_32 ? words[2] : words[1];
    uint32_t error_code = *selector & 0xfffc;
    if (!error_code || (*selector & 3) != cpl)
        return fault_with(fault, INVALID_TSS, error_code);
    if (read_descriptor(vcpu, state, *selector, ss, fault) < 0)
        return fault->vector ? -1 : fault_with(fault, INVALID_TSS, error_code);
    if (SEG_DPL(ss->high) != cpl || !(ss->high & SEG_S) || (ss->high & SEG_CODE) || !(ss->high & SEG_WRITABLE))
        return fault_with(fault, INVALID_TSS, error_code);
    return ss->high & SEG_P ? 0 : fault_with(fault, STACK, error_code);
}

/* Reads and checks the gate and the handler's code segment. */
static int find_handler(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, enum emulator_event event,
                        uint32_t vector, struct gate *gate, struct descriptor *cs, struct emulator_fault *fault)
{
    uint32_t external = event == EVENT_SOFTWARE ? 0 : 1, in_idt = vector * 8 + 2;
    if (read_gate(vcpu, state, vector, gate, fault) < 0) {
        fault->error_code |= fault->vector == PROTECTION ? external : 0;
        return -1;
    }
    bool known = gate->type == GATE_INTERRUPT || gate->type == GATE_TRAP ||
                 (!in_long_mode(state) &&
                  (gate->type == GATE_INTERRUPT16 || gate->type == GATE_TRAP16 || gate->type == GATE_TASK));
    if (!known || (event == EVENT_SOFTWARE && gate->dpl < emulator_cpl(state)))
        return fault_with(fault, PROTECTION, in_idt | external);
    if (!gate->present)
        return fault_with(fault, NOT_PRESENT, in_idt | external);
    if (gate->type == GATE_TASK) {
        vcpu->cannot = "a task gate in the IDT";
        return -1;
    }

    uint32_t error_code = (gate->selector & 0xfffc) | external;
    if (!(gate->selector & 0xfffc))
        return fault_with(fault, PROTECTION, external);
    if (read_descriptor(vcpu, state, gate->selector, cs, fault) < 0)
        return fault->vector ? -1 : fault_with(fault, PROTECTION, error_code);
    if (!(cs->high & SEG_S) || !(cs->high & SEG_CODE) || SEG_DPL(cs->high) > emulator_cpl(state) ||
        (in_long_mode(state) && (!(cs->high & SEG_L) || (cs->high & SEG_B))))
        return fault_with(fault, PROTECTION, error_code);
    return cs->high & SEG_P ? 0 : fault_with(fault, NOT_PRESENT, error_code);
}

static int enter_protected(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state, enum emulator_event event,
                           uint32_t vector, uint32_t error_code, struct emulator_fault *fault)
{
    struct gate gate;
    struct descriptor cs, ss = {0};
    if (state->rflags & RFLAGS_VM) {
        vcpu->cannot = "an exception or interrupt in virtual-8086 mode";
        return -1;
    }
    if (find_handler(vcpu, state, event, vector, &gate, &cs, fault) < 0)
        return -1;

    const bool is_long = in_long_mode(state);
    const bool is_wide = gate.type == GATE_INTERRUPT || gate.type == GATE_TRAP;
    const unsigned cpl = emulator_cpl(state);
    const unsigned new_cpl = cs.high & SEG_CONFORMING ? cpl : SEG_DPL(cs.high);
    const bool changes = new_cpl != cpl;
    struct stack stack = {
        .base = is_long ? 0 : state->segs[SS].base,
        .sp = state->regs[RSP],
        .mask = is_long                         ? UINT64_MAX
                : state->segs[SS].flags & SEG_B ? UINT32_MAX
                                                : 0xffff,
        .width = is_long   ? 8
                 : is_wide ? 4
                           : 2,
        .access = new_cpl == 3 ? ACCESS_USER : ACCESS_STACK,
    };
    uint32_t ss_selector = state->segs[SS].selector, new_sp = 0;
    if (is_long) {
        if ((changes || gate.stack_table) &&
            stack_from_tss64(vcpu, state, gate.stack_table, new_cpl, &stack.sp, fault) < 0)
            return -1;
        stack.sp &= ~UINT64_C(15);
    } else if (changes) {
        if (stack_from_tss32(vcpu, state, new_cpl, &new_sp, &ss_selector, &ss, fault) < 0 ||
            mark_accessed(vcpu, state, &ss, fault) < 0)
            return -1;
        stack.base = descriptor_base(&ss);
        stack.mask = ss.high & SEG_B ? UINT32_MAX : 0xffff;
        stack.sp = new_sp;
    }

    /* For a fault the pushed image has RF set: the instruction is tried again, and a breakpoint on it is not. */
    uint64_t flags = state->rflags;
    if (event == EVENT_FAULT && vector != DEBUG && vector != DOUBLE_FAULT)
        flags |= RFLAGS_RF;
    if (is_long || changes)
        if (push(vcpu, state, &stack, state->segs[SS].selector, fault) < 0 ||
            push(vcpu, state, &stack, state->regs[RSP], fault) < 0)
            return -1;
    if (push(vcpu, state, &stack, flags, fault) < 0 || push(vcpu, state, &stack, state->segs[CS].selector, fault) < 0 ||
        push(vcpu, state, &stack, state->rip, fault) < 0)
        return -1;
    if (event == EVENT_FAULT && has_error_code(vector) && push(vcpu, state, &stack, error_code, fault) < 0)
        return -1;
    if (mark_accessed(vcpu, state, &cs, fault) < 0)
        return -1;

    /* Nothing can fail any more. */
    if (changes && is_long)
        set_segment(state, SS, new_cpl, 0, 0, new_cpl << 13); /* a null selector */
    else if (changes)
        set_segment(state, SS, ss_selector, descriptor_base(&ss), descriptor_limit(&ss), ss.high);
    state->regs[RSP] = stack.sp;
    set_segment(state, CS, (gate.selector & ~3u) | new_cpl, is_long ? 0 : descriptor_base(&cs), descriptor_limit(&cs),
                cs.high);
    state->rip = gate.offset;
    state->rflags &= ~(RFLAGS_TF | RFLAGS_VM | RFLAGS_RF | RFLAGS_NT);
    if (gate.type == GATE_INTERRUPT || gate.type == GATE_INTERRUPT16)
        state->rflags &= ~RFLAGS_IF;
    return 0;
}

/* -------------------------------------------------------------------------------------------------- all of it -- */

static bool is_contributory(uint32_t vector)
{
    return vector == 0 || (vector >= INVALID_TSS && vector <= PROTECTION);
}

enum emulator_delivery emulator_deliver(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state,
                                        enum emulator_event event, uint32_t vector, uint32_t error_code)
{
    for (;;) {
        struct cpu_state before = *state;
        struct emulator_fault fault;
        int entered = state->cr[0] & CR0_PE ? enter_protected(vcpu, state, event, vector, error_code, &fault)
                                            : enter_real(vcpu, state, vector, &fault);
        if (entered == 0) {
            state->hflags &= ~(uint32_t)HF_INHIBIT_IRQ;
            state->old_exception = -1;
            emulator_update_hflags(state);
            return DELIVERED;
        }
        *state = before;
        if (vcpu->cannot)
            return DELIVERY_UNSUPPORTED;
        if (event == EVENT_FAULT && vector == DOUBLE_FAULT)
            return DELIVERY_TRIPLE_FAULT;
        if (fault.vector == PAGE_FAULT)
            state->cr[2] = fault.address;
        /* SDM Vol. 3, table "Conditions for Generating a Double Fault". */
        bool doubled = event == EVENT_FAULT &&
                       ((is_contributory(vector) && is_contributory(fault.vector)) ||
                        (vector == PAGE_FAULT && (is_contributory(fault.vector) || fault.vector == PAGE_FAULT)));
        if (event == EVENT_SOFTWARE) { /* it is the instruction that faults */
            uint8_t byte = 0;
            uint64_t last = state->rip - 1 + state->segs[CS].base;
            bool is_short = emulator_peek(vcpu, state, last, &byte, 1) == 1 &&
                            ((vector == 3 && byte == 0xcc) || (vector == 4 && byte == 0xce));
            state->rip -= is_short ? 1 : 2;
        }
        event = EVENT_FAULT;
        vector = doubled ? DOUBLE_FAULT : fault.vector;
        error_code = doubled ? 0 : fault.error_code;
    }
}

enum emulator_delivery emulator_syscall(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state)
{
    if (!(state->efer & EFER_SCE)) {
        state->rip -= 2;
        return emulator_deliver(vcpu, state, EVENT_FAULT, 6, 0);
    }
    uint32_t selector = (uint32_t)(state->star >> 32) & 0xfffc;
    uint64_t next = state->rip;
    state->regs[RCX] = in_long_mode(state) ? next : (uint32_t)next;
    if (in_long_mode(state)) {
        bool from_64 = state->hflags & HF_CS64;
        state->regs[11] = state->rflags & ~RFLAGS_RF;
        state->rip = from_64 ? state->lstar : state->cstar;
        state->rflags &= ~(state->fmask | RFLAGS_RF);
        state->rflags |= 2;
        set_segment(state, CS, selector, 0, UINT32_MAX, FLAT_CODE(0u) | SEG_L);
    } else {
        state->rip = (uint32_t)state->star;
        state->rflags &= ~(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM);
        set_segment(state, CS, selector, 0, UINT32_MAX, FLAT_CODE(0u) | SEG_B);
    }
    set_segment(state, SS, selector + 8, 0, UINT32_MAX, FLAT_DATA(0u));
    emulator_update_hflags(state);
    return DELIVERED;
}

enum emulator_delivery emulator_sysenter(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state)
{
    uint32_t selector = state->sysenter_cs & 0xfffc;
    if (!(state->cr[0] & CR0_PE) || !selector) {
        state->rip -= 2;
        return emulator_deliver(vcpu, state, EVENT_FAULT, PROTECTION, 0);
    }
    bool is_long = in_long_mode(state);
    state->rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF);
    set_segment(state, CS, selector, 0, UINT32_MAX, FLAT_CODE(0u) | (is_long ? SEG_L : SEG_B));
    set_segment(state, SS, selector + 8, 0, UINT32_MAX, FLAT_DATA(0u));
    state->regs[RSP] = is_long ? state->sysenter_esp : (uint32_t)state->sysenter_esp;
    state->rip = is_long ? state->sysenter_eip : (uint32_t)state->sysenter_eip;
    emulator_update_hflags(state);
    return DELIVERED;
}

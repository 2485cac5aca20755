/* SPDX-License-Identifier: MIT
 *
 * A vCPU's registers between the library's structures and the engine's. In which order a whole state is read and written is
 * in state.c.
 */
#include <errno.h>
#include <string.h>

#include "emulator/emulator.h"
#include "gen/cpuid_bits.h"

#define CR0_PE          UINT64_C(1)
#define CR0_PG          (UINT64_C(1) << 31)
#define CR4_PAE         (UINT64_C(1) << 5)
#define CR4_OSFXSR      (UINT64_C(1) << 9)
#define CR4_SMAP        (UINT64_C(1) << 21)
#define EFER_LMA        (UINT64_C(1) << 10)
#define RFLAGS_DF       UINT64_C(0x400)
#define RFLAGS_ARITH    UINT64_C(0x8d5)
#define RFLAGS_VM       (UINT64_C(1) << 17)
#define SEG_P           (1u << 15)
#define SEG_L           (1u << 21)
#define SEG_B           (1u << 22)
#define ATTR_UNUSABLE   (1u << 16)
#define DR7_FIXED       0x400u
#define DR7_ENABLED     0xffu
#define APIC_BASE_RESET (LAPIC_BASE | 0x900) /* enabled, and the boot processor's */

enum { MP_RUNNABLE = 0, MP_HALTED = 3 };

int emulator_save(struct pyhv_emulator_vcpu *vcpu, struct cpu_context *context, struct pyhv_error *error)
{
    uint64_t rflags = 0;
    int code = uc.context_save(vcpu->engine, context);
    if (code == UC_ERR_OK)
        code = uc.reg_read(vcpu->engine, UC_X86_REG_RFLAGS, &rflags);
    if (code != UC_ERR_OK)
        return pyhv_library_fail(error, "uc_context_save", code);
    context->state.rflags = rflags;
    return 0;
}

int emulator_load(struct pyhv_emulator_vcpu *vcpu, struct cpu_context *context, bool flush, struct pyhv_error *error)
{
    struct cpu_state *state = &context->state;
    /* Both: where the flags are while it executes, for whoever reads them now, and where it takes them from when it
     * begins to. */
    state->cc_op = CC_OP_EFLAGS;
    state->cc_src = state->rflags & RFLAGS_ARITH;
    state->df = state->rflags & RFLAGS_DF ? -1 : 1;
    int code = uc.context_restore(vcpu->engine, context);
    if (code == UC_ERR_OK && flush)
        code = uc.ctl(vcpu->engine, UC_CTL_FLUSH_TLB);
    return code == UC_ERR_OK ? 0 : pyhv_library_fail(error, "uc_context_restore", code);
}

void emulator_update_hflags(struct cpu_state *state)
{
    uint32_t flags = state->hflags & ~(uint32_t)(HF_CS32 | HF_SS32 | HF_ADDSEG | HF_PE | 7 << HF_MP_SHIFT | HF_LMA |
                                                 HF_CS64 | HF_OSFXSR | HF_SMAP);
    const struct cpu_segment *segs = state->segs;
    bool protected = state->cr[0] & CR0_PE;
    if (protected)
        flags |= HF_PE;
    flags |= (uint32_t)(state->cr[0] >> 1 & 7) << HF_MP_SHIFT;
    if (state->efer & EFER_LMA)
        flags |= HF_LMA;
    if (state->cr[4] & CR4_OSFXSR)
        flags |= HF_OSFXSR;
    if (state->cr[4] & CR4_SMAP)
        flags |= HF_SMAP;
    if ((flags & HF_LMA) && (segs[CS].flags & SEG_L)) {
        flags |= HF_CS32 | HF_SS32 | HF_CS64;
    } else {
        flags |= segs[CS].flags & SEG_B ? HF_CS32 : 0;
        flags |= segs[SS].flags & SEG_B ? HF_SS32 : 0;
        if (!protected || (state->rflags & RFLAGS_VM) || !(flags & HF_CS32) ||
            (segs[DS].base | segs[ES].base | segs[SS].base))
            flags |= HF_ADDSEG;
    }
    state->hflags = flags;
}

void emulator_reset(struct cpu_state *state)
{
    memset(state->regs, 0, sizeof state->regs);
    state->rip = 0xfff0;
    state->rflags = 2;
    for (int i = 0; i < SEGMENTS; i++)
        state->segs[i] = (struct cpu_segment){.limit = 0xffff, .flags = 0x9300};
    state->segs[CS] = (struct cpu_segment){.selector = 0xf000, .base = 0xffff0000, .limit = 0xffff, .flags = 0x9b00};
    state->ldt = (struct cpu_segment){.limit = 0xffff, .flags = 0x8200};
    state->tr = (struct cpu_segment){.limit = 0xffff, .flags = 0x8b00};
    state->gdt = state->idt = (struct cpu_segment){.limit = 0xffff};
    memset(state->cr, 0, sizeof state->cr);
    state->cr[0] = 0x60000010; /* CD, NW, ET */
    state->efer = 0;
    state->pat = UINT64_C(0x0007040600070406);
    state->misc_enable = 1; /* fast strings */
    state->xcr0 = 1;
    state->dr[6] = 0xffff0ff0;
    state->dr[7] = DR7_FIXED;
    state->hflags &= ~(uint32_t)HF_CPL;
    state->hflags2 = (state->hflags2 & ~(uint32_t)HF2_NMI) | HF2_OWN_PRIORITY;
    state->old_exception = -1;
    state->task_priority = 0;
    emulator_update_hflags(state);
}

/* ------------------------------------------------------------------------------------------------- CPUID -- */

static uint32_t cpuid_word(const struct pyhv_emulator_vcpu *vcpu, uint32_t leaf, uint32_t subleaf, int reg)
{
    for (uint32_t i = 0; i < vcpu->cpuid_count; i++) {
        const struct pyhv_cpuid_entry *entry = &vcpu->cpuid[i];
        if (entry->leaf == leaf && entry->subleaf == subleaf)
            return (&entry->eax)[reg];
    }
    return 0;
}

enum { IN_EAX, IN_EBX, IN_ECX, IN_EDX };

/* Puts the CPUID table's features where the translator looks for them. */
static void set_features(const struct pyhv_emulator_vcpu *vcpu, struct cpu_identity *identity)
{
    identity->vendor[0] = cpuid_word(vcpu, 0, 0, IN_EBX);
    identity->vendor[1] = cpuid_word(vcpu, 0, 0, IN_EDX);
    identity->vendor[2] = cpuid_word(vcpu, 0, 0, IN_ECX);
    identity->version = cpuid_word(vcpu, 1, 0, IN_EAX);
    identity->features.leaf1_edx = cpuid_word(vcpu, 1, 0, IN_EDX);
    identity->features.leaf1_ecx = cpuid_word(vcpu, 1, 0, IN_ECX);
    identity->features.leaf7_ebx = cpuid_word(vcpu, 7, 0, IN_EBX);
    identity->features.leaf7_ecx = cpuid_word(vcpu, 7, 0, IN_ECX);
    identity->features.leaf7_edx = cpuid_word(vcpu, 7, 0, IN_EDX);
    identity->features.leaf7_1_eax = cpuid_word(vcpu, 7, 1, IN_EAX);
    identity->features.extended_edx = cpuid_word(vcpu, 0x80000001, 0, IN_EDX);
    identity->features.extended_ecx = cpuid_word(vcpu, 0x80000001, 0, IN_ECX);
}

/* SDM Vol. 3, "Control Registers". What the library does not have no table shows: VME, PVI, UMIP, LA57, VMXE, SMXE, PCIDE,
 * OSXSAVE, PKE, CET, LAM and what comes after them. */
#define CR4_ALWAYS   UINT64_C(0x7fc) /* TSD to OSXMMEXCPT */
#define CR4_FSGSBASE (UINT64_C(1) << 16)
#define CR4_SMEP     (UINT64_C(1) << 20)

void emulator_set_control_limits(struct pyhv_emulator_vcpu *vcpu)
{
    uint32_t features = cpuid_word(vcpu, 7, 0, IN_EBX), bits = cpuid_word(vcpu, 0x80000008, 0, IN_EAX) & 0xff;
    vcpu->cr4_allowed = CR4_ALWAYS | (features & PYHV_CPUID_7_EBX_FSGSBASE ? CR4_FSGSBASE : 0) |
                        (features & PYHV_CPUID_7_EBX_SMEP ? CR4_SMEP : 0) |
                        (features & PYHV_CPUID_7_EBX_SMAP ? CR4_SMAP : 0);
    vcpu->cr3_reserved = ~((UINT64_C(1) << (bits >= 32 && bits < 52 ? bits : 52)) - 1);
}

int emulator_set_cpuid(struct pyhv_vcpu *base, const struct pyhv_cpuid_entry *entries, size_t count,
                       struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (pyhv_cpuid_table_init(&vcpu->table, entries, count, error) < 0 || emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    memcpy(vcpu->cpuid, entries, count * sizeof *entries);
    vcpu->cpuid_count = (uint32_t)count;
    set_features(vcpu, &vcpu->context->identity);
    emulator_set_control_limits(vcpu);
    vcpu->context->state.regs[RDX] = cpuid_word(vcpu, 1, 0, IN_EAX); /* as after reset */
    return emulator_load(vcpu, vcpu->context, true, error);
}

int emulator_get_cpuid(struct pyhv_vcpu *base, struct pyhv_cpuid_entry *entries, size_t capacity,
                       struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (vcpu->cpuid_count > capacity)
        return pyhv_fail(error, E2BIG, "pyhv_vcpu_get_cpuid", "%u entries", vcpu->cpuid_count);
    memcpy(entries, vcpu->cpuid, vcpu->cpuid_count * sizeof *entries);
    return (int)vcpu->cpuid_count;
}

/* --------------------------------------------------------------------------------------------- registers -- */

int emulator_get_regs(struct pyhv_vcpu *base, struct pyhv_regs *regs, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    const struct cpu_state *state = &vcpu->context->state;
    *regs = (struct pyhv_regs){
        .rax = state->regs[RAX],
        .rbx = state->regs[RBX],
        .rcx = state->regs[RCX],
        .rdx = state->regs[RDX],
        .rsi = state->regs[RSI],
        .rdi = state->regs[RDI],
        .rsp = state->regs[RSP],
        .rbp = state->regs[RBP],
        .r8 = state->regs[8],
        .r9 = state->regs[9],
        .r10 = state->regs[10],
        .r11 = state->regs[11],
        .r12 = state->regs[12],
        .r13 = state->regs[13],
        .r14 = state->regs[14],
        .r15 = state->regs[15],
        .rip = state->rip,
        .rflags = state->rflags,
    };
    return 0;
}

int emulator_set_regs(struct pyhv_vcpu *base, const struct pyhv_regs *regs, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    struct cpu_state *state = &vcpu->context->state;
    const uint64_t values[16] = {
        [RAX] = regs->rax, [RCX] = regs->rcx, [RDX] = regs->rdx, [RBX] = regs->rbx,
        [RSP] = regs->rsp, [RBP] = regs->rbp, [RSI] = regs->rsi, [RDI] = regs->rdi,
        [8] = regs->r8,    [9] = regs->r9,    [10] = regs->r10,  [11] = regs->r11,
        [12] = regs->r12,  [13] = regs->r13,  [14] = regs->r14,  [15] = regs->r15,
    };
    memcpy(state->regs, values, sizeof values);
    state->rip = regs->rip;
    state->rflags = regs->rflags | 2;
    emulator_update_hflags(state); /* of the flags only VM counts */
    return emulator_load(vcpu, vcpu->context, false, error);
}

static struct pyhv_segment segment_out(const struct cpu_segment *from)
{
    uint32_t attributes = (from->flags >> 8 & 0xff) | (from->flags >> 20 & 0xf) << 12;
    return (struct pyhv_segment){
        .base = from->base,
        .limit = from->limit,
        .attributes = attributes | (from->flags & SEG_P ? 0 : ATTR_UNUSABLE),
        .selector = from->selector,
    };
}

static struct cpu_segment segment_in(const struct pyhv_segment *from)
{
    uint32_t flags = (from->attributes & 0xff) << 8 | (from->attributes >> 12 & 0xf) << 20;
    return (struct cpu_segment){
        .selector = from->selector & 0xffff,
        .base = from->base,
        .limit = from->limit,
        .flags = from->attributes & ATTR_UNUSABLE ? flags & ~SEG_P : flags,
    };
}

int emulator_get_sregs(struct pyhv_vcpu *base, struct pyhv_sregs *sregs, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    const struct cpu_state *state = &vcpu->context->state;
    *sregs = (struct pyhv_sregs){
        .cs = segment_out(&state->segs[CS]),
        .ds = segment_out(&state->segs[DS]),
        .es = segment_out(&state->segs[ES]),
        .fs = segment_out(&state->segs[FS]),
        .gs = segment_out(&state->segs[GS]),
        .ss = segment_out(&state->segs[SS]),
        .tr = segment_out(&state->tr),
        .ldt = segment_out(&state->ldt),
        .gdt_base = state->gdt.base,
        .gdt_limit = state->gdt.limit,
        .idt_base = state->idt.base,
        .idt_limit = state->idt.limit,
        .cr0 = state->cr[0],
        .cr2 = state->cr[2],
        .cr3 = state->cr[3],
        .cr4 = state->cr[4],
        .cr8 = state->task_priority & 0xf,
        .efer = state->efer,
        .apic_base = APIC_BASE_RESET,
    };
    if ((state->cr[0] & CR0_PG) && (state->cr[4] & CR4_PAE) && !(state->efer & EFER_LMA)) {
        const uint8_t *entries = emulator_host(emulator_vm(vcpu), state->cr[3] & 0xffffffe0, sizeof sregs->pdptrs);
        sregs->pdptrs_valid = entries && pyhv_memory_read(entries, sregs->pdptrs, sizeof sregs->pdptrs, NULL) == 0;
    }
    return 0;
}

int emulator_set_sregs(struct pyhv_vcpu *base, const struct pyhv_sregs *sregs, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (sregs->apic_base != APIC_BASE_RESET)
        return pyhv_fail(error, EINVAL, "IA32_APIC_BASE", "0x%llx; the emulator's local APIC is enabled, at 0x%llx",
                         (unsigned long long)sregs->apic_base, (unsigned long long)LAPIC_BASE);
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    struct cpu_state *state = &vcpu->context->state;
    state->segs[CS] = segment_in(&sregs->cs);
    state->segs[DS] = segment_in(&sregs->ds);
    state->segs[ES] = segment_in(&sregs->es);
    state->segs[FS] = segment_in(&sregs->fs);
    state->segs[GS] = segment_in(&sregs->gs);
    state->segs[SS] = segment_in(&sregs->ss);
    state->tr = segment_in(&sregs->tr);
    state->ldt = segment_in(&sregs->ldt);
    state->gdt = (struct cpu_segment){.base = sregs->gdt_base, .limit = sregs->gdt_limit};
    state->idt = (struct cpu_segment){.base = sregs->idt_base, .limit = sregs->idt_limit};
    state->cr[0] = sregs->cr0;
    state->cr[2] = sregs->cr2;
    state->cr[3] = sregs->cr3;
    state->cr[4] = sregs->cr4;
    state->task_priority = sregs->cr8 & 0xf;
    state->efer = sregs->efer;
    /* SS's DPL is the CPL (SDM Vol. 3, "Guest Register State"). */
    uint32_t cpl = sregs->cr0 & CR0_PE ? sregs->ss.attributes >> 5 & 3 : 0;
    state->hflags = (state->hflags & ~(uint32_t)HF_CPL) | cpl;
    emulator_update_hflags(state);
    return emulator_load(vcpu, vcpu->context, true, error);
}

/* ------------------------------------------------------------------------------------ x87, SSE and the rest -- */

/* The legacy region of an XSAVE area (SDM Vol. 1, "XSAVE Area"), and XSTATE_BV behind it. */
struct xsave {
    uint16_t fcw, fsw;
    uint8_t tags, reserved0; /* tags: a bit a register, 1: not empty */
    uint16_t opcode;
    uint64_t instruction, data;
    uint32_t mxcsr, mxcsr_mask;
    struct {
        uint64_t mantissa;
        uint16_t exponent;
        uint8_t reserved[6];
    } st[8];
    uint64_t xmm[16][2];
    uint8_t reserved1[96];
    uint64_t present;
};
_Static_assert(offsetof(struct xsave, present) == 512, "XSTATE_BV");

enum { XSAVE_X87 = 1, XSAVE_SSE = 2, XSAVE_LEGACY = 3 };

int64_t emulator_get_xsave(struct pyhv_vcpu *base, uint8_t *area, size_t capacity, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (capacity < sizeof(struct xsave))
        return pyhv_fail(error, E2BIG, "pyhv_emulator_vcpu_get_xsave", "%zu bytes", sizeof(struct xsave));
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    const struct cpu_state *state = &vcpu->context->state;
    struct xsave x = {
        .fcw = state->fpuc,
        .fsw = (uint16_t)((state->fpus & ~0x3800) | (state->fpstt & 7) << 11),
        .mxcsr = state->mxcsr,
        .mxcsr_mask = 0xffff,
        .present = XSAVE_LEGACY,
    };
    for (unsigned i = 0; i < 8; i++) {
        x.tags |= (uint8_t)(!state->fptags[i] << i);
        x.st[i].mantissa = state->fpregs[(state->fpstt + i) & 7].mantissa;
        x.st[i].exponent = state->fpregs[(state->fpstt + i) & 7].exponent;
    }
    for (unsigned i = 0; i < 16; i++) {
        x.xmm[i][0] = state->xmm[i].low;
        x.xmm[i][1] = state->xmm[i].high;
    }
    memcpy(area, &x, sizeof x);
    return (int64_t)sizeof x;
}

int emulator_set_xsave(struct pyhv_vcpu *base, const uint8_t *area, size_t size, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    struct xsave x = {0};
    memcpy(&x, area, size < sizeof x ? size : sizeof x);
    if (x.present & ~(uint64_t)XSAVE_LEGACY)
        return pyhv_fail(error, EINVAL, "XSAVE area", "components 0x%llx; the emulator has x87 and SSE",
                         (unsigned long long)x.present);
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    if (!(x.present & XSAVE_X87)) { /* the component's initial state */
        x.fcw = 0x37f;
        x.fsw = 0;
        x.tags = 0;
        memset(x.st, 0, sizeof x.st);
    }
    if (!(x.present & XSAVE_SSE))
        memset(x.xmm, 0, sizeof x.xmm);
    struct cpu_state *state = &vcpu->context->state;
    state->fpus = x.fsw & (uint16_t)~0x3800;
    state->fpstt = x.fsw >> 11 & 7;
    for (unsigned i = 0; i < 8; i++) {
        state->fptags[i] = !(x.tags >> i & 1);
        state->fpregs[(state->fpstt + i) & 7].mantissa = x.st[i].mantissa;
        state->fpregs[(state->fpstt + i) & 7].exponent = x.st[i].exponent;
    }
    for (unsigned i = 0; i < 16; i++) {
        state->xmm[i].low = x.xmm[i][0];
        state->xmm[i].high = x.xmm[i][1];
    }
    if (emulator_load(vcpu, vcpu->context, false, error) < 0)
        return -1;
    /* These two through the interface, which derives rounding and precision from them. */
    int code = uc.reg_write(vcpu->engine, UC_X86_REG_FPCW, &x.fcw);
    if (code == UC_ERR_OK)
        code = uc.reg_write(vcpu->engine, UC_X86_REG_MXCSR, &x.mxcsr);
    return code == UC_ERR_OK ? 0 : pyhv_library_fail(error, "uc_reg_write", code);
}

int emulator_get_debugregs(struct pyhv_vcpu *base, struct pyhv_debugregs *regs, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    const struct cpu_state *state = &vcpu->context->state;
    memcpy(regs->db, state->dr, sizeof regs->db);
    regs->dr6 = state->dr[6];
    regs->dr7 = state->dr[7];
    return 0;
}

int emulator_set_debugregs(struct pyhv_vcpu *base, const struct pyhv_debugregs *regs, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (regs->dr7 & DR7_ENABLED)
        return pyhv_fail(error, EINVAL, "DR7", "0x%llx: breakpoints that are set cannot be moved to the emulator",
                         (unsigned long long)regs->dr7);
    if (emulator_save(vcpu, vcpu->context, error) < 0)
        return -1;
    memcpy(vcpu->context->state.dr, regs->db, sizeof regs->db);
    vcpu->context->state.dr[6] = regs->dr6;
    vcpu->context->state.dr[7] = regs->dr7;
    return emulator_load(vcpu, vcpu->context, false, error);
}

/* Those that the library keeps. IA32_TSC is ours. */
#define MSR_TSC 0x10u

bool emulator_has_msr(uint32_t index)
{
    static const uint32_t single[] = {
        0x174, 0x175, 0x176,      0x17a,      0x1a0,      0x250,      0x258,      0x259,
        0x277, 0x2ff, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000102, 0xc0000103,
    };
    for (size_t i = 0; i < sizeof single / sizeof *single; i++)
        if (index == single[i])
            return true;
    return index == MSR_TSC || (index >= 0x200 && index < 0x210) || (index >= 0x268 && index < 0x270);
}

size_t pyhv_emulator_msr_list(uint32_t *indices, size_t capacity)
{
    size_t count = 0;
    for (uint32_t base = 0;; base = 0xc0000000) {
        for (uint32_t index = base; index < base + 0x1000 && count < capacity; index++)
            if (emulator_has_msr(index))
                indices[count++] = index;
        if (base)
            return count;
    }
}

int emulator_get_msrs(struct pyhv_vcpu *base, const uint32_t *indices, uint64_t *values, size_t count,
                      struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    for (size_t i = 0; i < count; i++) {
        struct uc_x86_msr msr = {.rid = indices[i]};
        if (!emulator_has_msr(indices[i]))
            return (int)i;
        if (indices[i] == MSR_TSC) {
            values[i] = emulator_tsc(vcpu);
            continue;
        }
        int code = uc.reg_read(vcpu->engine, UC_X86_REG_MSR, &msr);
        if (code != UC_ERR_OK)
            return pyhv_library_fail(error, "uc_reg_read", code);
        values[i] = msr.value;
    }
    return (int)count;
}

int emulator_set_msrs(struct pyhv_vcpu *base, const uint32_t *indices, const uint64_t *values, size_t count,
                      struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    for (size_t i = 0; i < count; i++) {
        struct uc_x86_msr msr = {.rid = indices[i], .value = values[i]};
        if (!emulator_has_msr(indices[i]))
            return (int)i;
        if (indices[i] == MSR_TSC) {
            vcpu->tsc_base = values[i];
            vcpu->tsc_since = pyhv_now();
            continue;
        }
        int code = uc.reg_write(vcpu->engine, UC_X86_REG_MSR, &msr);
        if (code != UC_ERR_OK)
            return pyhv_library_fail(error, "uc_reg_write", code);
        uint64_t now;
        if (emulator_get_msrs(base, &indices[i], &now, 1, error) < 0)
            return -1;
        if (now != values[i])
            return (int)i;
    }
    return (int)count;
}

uint64_t emulator_tsc(const struct pyhv_emulator_vcpu *vcpu)
{
    uint64_t ns = (uint64_t)(pyhv_now() - vcpu->tsc_since);
    return vcpu->tsc_base + (uint64_t)((unsigned __int128)ns * vcpu->tsc_khz / 1000000);
}

int emulator_get_tsc_khz(struct pyhv_vcpu *base, struct pyhv_error *error)
{
    (void)error;
    return (int)emulator_of(base)->tsc_khz;
}

void emulator_set_tsc_khz(struct pyhv_vcpu *base, uint32_t khz)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    vcpu->tsc_base = emulator_tsc(vcpu);
    vcpu->tsc_since = pyhv_now();
    vcpu->tsc_khz = khz;
}

int emulator_get_mp_state(struct pyhv_vcpu *base)
{
    return emulator_of(base)->halted ? MP_HALTED : MP_RUNNABLE;
}

int emulator_set_mp_state(struct pyhv_vcpu *base, uint32_t state, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    if (state != MP_RUNNABLE && state != MP_HALTED)
        return pyhv_fail(error, EINVAL, "MP state", "%u; the emulator's vCPU runs or is halted", state);
    vcpu->halted = state == MP_HALTED;
    return 0;
}

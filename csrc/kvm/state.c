/* SPDX-License-Identifier: MIT
 *
 * Reading and writing a vCPU's state, in the engine's own structures.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm/kvm.h"

static struct kvm_cpuid_entry2 to_kvm(const struct pyhv_cpuid_entry *from)
{
    return (struct kvm_cpuid_entry2){
        .function = from->leaf,
        .index = from->subleaf,
        .flags = from->indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
        .eax = from->eax,
        .ebx = from->ebx,
        .ecx = from->ecx,
        .edx = from->edx,
    };
}

static struct pyhv_cpuid_entry from_kvm(const struct kvm_cpuid_entry2 *from)
{
    return (struct pyhv_cpuid_entry){
        .leaf = from->function,
        .subleaf = from->index,
        .indexed = (from->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) != 0,
        .eax = from->eax,
        .ebx = from->ebx,
        .ecx = from->ecx,
        .edx = from->edx,
    };
}

/* struct kvm_cpuid2 with room for every entry that KVM takes. */
struct cpuid_buffer {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[PYHV_CPUID_MAX_ENTRIES];
};

static int copy_out(const struct cpuid_buffer *table, struct pyhv_cpuid_entry *entries, size_t capacity,
                    const char *what, struct pyhv_error *error)
{
    if (table->head.nent > capacity)
        return pyhv_fail(error, E2BIG, what, "%u entries", table->head.nent);
    for (uint32_t i = 0; i < table->head.nent; i++)
        entries[i] = from_kvm(&table->entries[i]);
    return (int)table->head.nent;
}

int pyhv_kvm_supported_cpuid(int kvm_fd, struct pyhv_cpuid_entry *entries, size_t capacity, struct pyhv_error *error)
{
    struct cpuid_buffer table = {.head.nent = PYHV_CPUID_MAX_ENTRIES};
    if (ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, &table) < 0)
        return pyhv_fail_errno(error, "KVM_GET_SUPPORTED_CPUID");
    return copy_out(&table, entries, capacity, "KVM_GET_SUPPORTED_CPUID", error);
}

int pyhv_vcpu_set_cpuid(struct pyhv_vcpu *vcpu, const struct pyhv_cpuid_entry *entries, size_t count,
                        struct pyhv_error *error)
{
    struct cpuid_buffer table = {.head.nent = (uint32_t)count};
    if (count > PYHV_CPUID_MAX_ENTRIES)
        return pyhv_fail(error, E2BIG, "KVM_SET_CPUID2", "%zu entries", count);
    for (size_t i = 0; i < count; i++)
        table.entries[i] = to_kvm(&entries[i]);
    return ioctl(vcpu->fd, KVM_SET_CPUID2, &table) < 0 ? pyhv_fail_errno(error, "KVM_SET_CPUID2") : 0;
}

int pyhv_vcpu_get_cpuid(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_entry *entries, size_t capacity,
                        struct pyhv_error *error)
{
    struct cpuid_buffer table = {.head.nent = PYHV_CPUID_MAX_ENTRIES};
    if (ioctl(vcpu->fd, KVM_GET_CPUID2, &table) < 0)
        return pyhv_fail_errno(error, "KVM_GET_CPUID2");
    return copy_out(&table, entries, capacity, "KVM_GET_CPUID2", error);
}

int pyhv_vcpu_get_regs(struct pyhv_vcpu *vcpu, struct pyhv_regs *regs, struct pyhv_error *error)
{
    struct kvm_regs from;
    if (ioctl(vcpu->fd, KVM_GET_REGS, &from) < 0)
        return pyhv_fail_errno(error, "KVM_GET_REGS");
    *regs = (struct pyhv_regs){
        .rax = from.rax,
        .rbx = from.rbx,
        .rcx = from.rcx,
        .rdx = from.rdx,
        .rsi = from.rsi,
        .rdi = from.rdi,
        .rsp = from.rsp,
        .rbp = from.rbp,
        .r8 = from.r8,
        .r9 = from.r9,
        .r10 = from.r10,
        .r11 = from.r11,
        .r12 = from.r12,
        .r13 = from.r13,
        .r14 = from.r14,
        .r15 = from.r15,
        .rip = from.rip,
        .rflags = from.rflags,
    };
    return 0;
}

int pyhv_vcpu_set_regs(struct pyhv_vcpu *vcpu, const struct pyhv_regs *from, struct pyhv_error *error)
{
    struct kvm_regs regs = {
        .rax = from->rax,
        .rbx = from->rbx,
        .rcx = from->rcx,
        .rdx = from->rdx,
        .rsi = from->rsi,
        .rdi = from->rdi,
        .rsp = from->rsp,
        .rbp = from->rbp,
        .r8 = from->r8,
        .r9 = from->r9,
        .r10 = from->r10,
        .r11 = from->r11,
        .r12 = from->r12,
        .r13 = from->r13,
        .r14 = from->r14,
        .r15 = from->r15,
        .rip = from->rip,
        .rflags = from->rflags,
    };
    return ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0 ? pyhv_fail_errno(error, "KVM_SET_REGS") : 0;
}

static struct pyhv_segment segment_from_kvm(const struct kvm_segment *from)
{
    return (struct pyhv_segment){
        .base = from->base,
        .limit = from->limit,
        .selector = from->selector,
        .attributes = (uint32_t)(from->type & 0xf) | (uint32_t)(from->s & 1) << 4 | (uint32_t)(from->dpl & 3) << 5 |
                      (uint32_t)(from->present & 1) << 7 | (uint32_t)(from->avl & 1) << 12 |
                      (uint32_t)(from->l & 1) << 13 | (uint32_t)(from->db & 1) << 14 | (uint32_t)(from->g & 1) << 15 |
                      (uint32_t)(from->unusable & 1) << 16,
    };
}

static struct kvm_segment segment_to_kvm(const struct pyhv_segment *from)
{
    uint32_t bits = from->attributes;
    return (struct kvm_segment){
        .base = from->base,
        .limit = from->limit,
        .selector = (uint16_t)from->selector,
        .type = bits & 0xf,
        .s = bits >> 4 & 1,
        .dpl = bits >> 5 & 3,
        .present = bits >> 7 & 1,
        .avl = bits >> 12 & 1,
        .l = bits >> 13 & 1,
        .db = bits >> 14 & 1,
        .g = bits >> 15 & 1,
        .unusable = bits >> 16 & 1,
    };
}

int pyhv_vcpu_get_sregs(struct pyhv_vcpu *vcpu, struct pyhv_sregs *sregs, struct pyhv_error *error)
{
    struct kvm_sregs from;
    if (ioctl(vcpu->fd, KVM_GET_SREGS, &from) < 0)
        return pyhv_fail_errno(error, "KVM_GET_SREGS");
    *sregs = (struct pyhv_sregs){
        .cs = segment_from_kvm(&from.cs),
        .ds = segment_from_kvm(&from.ds),
        .es = segment_from_kvm(&from.es),
        .fs = segment_from_kvm(&from.fs),
        .gs = segment_from_kvm(&from.gs),
        .ss = segment_from_kvm(&from.ss),
        .tr = segment_from_kvm(&from.tr),
        .ldt = segment_from_kvm(&from.ldt),
        .gdt_base = from.gdt.base,
        .gdt_limit = from.gdt.limit,
        .idt_base = from.idt.base,
        .idt_limit = from.idt.limit,
        .cr0 = from.cr0,
        .cr2 = from.cr2,
        .cr3 = from.cr3,
        .cr4 = from.cr4,
        .cr8 = from.cr8,
        .efer = from.efer,
        .apic_base = from.apic_base,
    };
    return 0;
}

int pyhv_vcpu_set_sregs(struct pyhv_vcpu *vcpu, const struct pyhv_sregs *from, struct pyhv_error *error)
{
    /* Read first: the structure also carries the interrupt that waits to be delivered, which must survive. */
    struct kvm_sregs sregs;
    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
        return pyhv_fail_errno(error, "KVM_GET_SREGS");
    sregs.cs = segment_to_kvm(&from->cs);
    sregs.ds = segment_to_kvm(&from->ds);
    sregs.es = segment_to_kvm(&from->es);
    sregs.fs = segment_to_kvm(&from->fs);
    sregs.gs = segment_to_kvm(&from->gs);
    sregs.ss = segment_to_kvm(&from->ss);
    sregs.tr = segment_to_kvm(&from->tr);
    sregs.ldt = segment_to_kvm(&from->ldt);
    sregs.gdt.base = from->gdt_base;
    sregs.gdt.limit = (uint16_t)from->gdt_limit;
    sregs.idt.base = from->idt_base;
    sregs.idt.limit = (uint16_t)from->idt_limit;
    sregs.cr0 = from->cr0;
    sregs.cr2 = from->cr2;
    sregs.cr3 = from->cr3;
    sregs.cr4 = from->cr4;
    sregs.cr8 = from->cr8;
    sregs.efer = from->efer;
    sregs.apic_base = from->apic_base;
    return ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 ? pyhv_fail_errno(error, "KVM_SET_SREGS") : 0;
}

int pyhv_vcpu_get_mp_state(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    struct kvm_mp_state state;
    if (ioctl(vcpu->fd, KVM_GET_MP_STATE, &state) < 0)
        return pyhv_fail_errno(error, "KVM_GET_MP_STATE");
    return (int)state.mp_state;
}

int pyhv_vcpu_get_tsc_khz(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    int khz = ioctl(vcpu->fd, KVM_GET_TSC_KHZ, 0);
    return khz < 0 ? pyhv_fail_errno(error, "KVM_GET_TSC_KHZ") : khz;
}

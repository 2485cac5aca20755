/* SPDX-License-Identifier: MIT
 *
 * A vCPU's registers, and those of the irqchip and the clock, between KVM's structures and the engine's. In which order a
 * whole state is read and written, and why, is in state.c.
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

int kvm_set_cpuid(struct pyhv_vcpu *vcpu, const struct pyhv_cpuid_entry *entries, size_t count,
                  struct pyhv_error *error)
{
    struct cpuid_buffer table = {.head.nent = (uint32_t)count};
    if (count > PYHV_CPUID_MAX_ENTRIES)
        return pyhv_fail(error, E2BIG, "KVM_SET_CPUID2", "%zu entries", count);
    for (size_t i = 0; i < count; i++)
        table.entries[i] = to_kvm(&entries[i]);
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_CPUID2, &table) < 0 ? pyhv_fail_errno(error, "KVM_SET_CPUID2") : 0;
}

int kvm_get_cpuid(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_entry *entries, size_t capacity, struct pyhv_error *error)
{
    struct cpuid_buffer table = {.head.nent = PYHV_CPUID_MAX_ENTRIES};
    for (size_t i = 0; i < PYHV_CPUID_MAX_ENTRIES; i++)
        table.entries[i].function = UINT32_MAX;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_CPUID2, &table) < 0)
        return pyhv_fail_errno(error, "KVM_GET_CPUID2");
    /* Linux 6.1 fills the entries and leaves the number as it was: what it did not touch is not part of the table. */
    while (table.head.nent > 0 && table.entries[table.head.nent - 1].function == UINT32_MAX)
        table.head.nent--;
    return copy_out(&table, entries, capacity, "KVM_GET_CPUID2", error);
}

int kvm_get_regs(struct pyhv_vcpu *vcpu, struct pyhv_regs *regs, struct pyhv_error *error)
{
    struct kvm_regs from;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_REGS, &from) < 0)
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

int kvm_set_regs(struct pyhv_vcpu *vcpu, const struct pyhv_regs *from, struct pyhv_error *error)
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
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_REGS, &regs) < 0 ? pyhv_fail_errno(error, "KVM_SET_REGS") : 0;
}

/* A field of a structure of ours that KVM's has in 8 or 16 bits: cut, the guest would go on with another value. */
#define CHECK_FITS(what, from, field, most)                                                                      \
    do {                                                                                                         \
        if ((from)->field > (most))                                                                              \
            return pyhv_fail(error, ERANGE, what, "%s is 0x%x, at most 0x%x is possible", #field, (from)->field, \
                             most);                                                                              \
    } while (0)

/* Those bits of struct pyhv_segment's attributes that have a meaning. */
#define SEGMENT_ATTRIBUTES 0x1f0ffu

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

int kvm_get_sregs(struct pyhv_vcpu *vcpu, struct pyhv_sregs *sregs, struct pyhv_error *error)
{
    struct kvm_sregs2 from;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_SREGS2, &from) < 0)
        return pyhv_fail_errno(error, "KVM_GET_SREGS2");
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
        .pdptrs_valid = (from.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0,
    };
    if (sregs->pdptrs_valid)
        memcpy(sregs->pdptrs, from.pdptrs, sizeof sregs->pdptrs);
    return 0;
}

static int check_segment(const struct pyhv_segment *segment, const char *name, struct pyhv_error *error)
{
    if (segment->selector > 0xffff)
        return pyhv_fail(error, ERANGE, "KVM_SET_SREGS2", "%s: selector 0x%x has more than 16 bits", name,
                         segment->selector);
    if (segment->attributes & ~SEGMENT_ATTRIBUTES)
        return pyhv_fail(error, ERANGE, "KVM_SET_SREGS2", "%s: attributes 0x%x have bits beyond 0x%x", name,
                         segment->attributes, SEGMENT_ATTRIBUTES);
    return 0;
}

static int check_sregs(const struct pyhv_sregs *from, struct pyhv_error *error)
{
    const struct {
        const char *name;
        const struct pyhv_segment *segment;
    } segments[] = {{"cs", &from->cs}, {"ds", &from->ds}, {"es", &from->es}, {"fs", &from->fs},
                    {"gs", &from->gs}, {"ss", &from->ss}, {"tr", &from->tr}, {"ldt", &from->ldt}};
    for (size_t i = 0; i < sizeof segments / sizeof *segments; i++)
        if (check_segment(segments[i].segment, segments[i].name, error) < 0)
            return -1;
    CHECK_FITS("KVM_SET_SREGS2", from, gdt_limit, 0xffffu);
    CHECK_FITS("KVM_SET_SREGS2", from, idt_limit, 0xffffu);
    CHECK_FITS("KVM_SET_SREGS2", from, pdptrs_valid, 1u);
    return 0;
}

int kvm_set_sregs(struct pyhv_vcpu *vcpu, const struct pyhv_sregs *from, struct pyhv_error *error)
{
    if (check_sregs(from, error) < 0)
        return -1;
    struct kvm_sregs2 sregs = {
        .cs = segment_to_kvm(&from->cs),
        .ds = segment_to_kvm(&from->ds),
        .es = segment_to_kvm(&from->es),
        .fs = segment_to_kvm(&from->fs),
        .gs = segment_to_kvm(&from->gs),
        .ss = segment_to_kvm(&from->ss),
        .tr = segment_to_kvm(&from->tr),
        .ldt = segment_to_kvm(&from->ldt),
        .gdt = {.base = from->gdt_base, .limit = (uint16_t)from->gdt_limit},
        .idt = {.base = from->idt_base, .limit = (uint16_t)from->idt_limit},
        .cr0 = from->cr0,
        .cr2 = from->cr2,
        .cr3 = from->cr3,
        .cr4 = from->cr4,
        .cr8 = from->cr8,
        .efer = from->efer,
        .apic_base = from->apic_base,
        .flags = from->pdptrs_valid ? KVM_SREGS2_FLAGS_PDPTRS_VALID : 0,
    };
    memcpy(sregs.pdptrs, from->pdptrs, sizeof sregs.pdptrs);
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_SREGS2, &sregs) < 0 ? pyhv_fail_errno(error, "KVM_SET_SREGS2") : 0;
}

int kvm_get_mp_state(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    struct kvm_mp_state state;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_MP_STATE, &state) < 0)
        return pyhv_fail_errno(error, "KVM_GET_MP_STATE");
    return (int)state.mp_state;
}

int kvm_get_tsc_khz(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    int khz = ioctl(kvm_of(vcpu)->fd, KVM_GET_TSC_KHZ, 0);
    return khz < 0 ? pyhv_fail_errno(error, "KVM_GET_TSC_KHZ") : khz;
}

int kvm_set_tsc_khz(struct pyhv_vcpu *vcpu, uint32_t khz, struct pyhv_error *error)
{
    /* Not tried where the host cannot: KVM would take a higher rate all the same, and let the counter jump ahead at each
     * entry, each vCPU's by itself (tsc_always_catchup, arch/x86/kvm/x86.c). And a lower one that it refuses is from then
     * on what it believes and says to be the vCPU's. */
    if (ioctl(kvm_vm_of(vcpu->vm)->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_CONTROL) <= 0)
        return 1;
    if (ioctl(kvm_of(vcpu)->fd, KVM_SET_TSC_KHZ, (unsigned long)khz) < 0)
        return pyhv_fail(error, errno, "KVM_SET_TSC_KHZ", "%u kHz, though this host scales TSC rates", khz);
    return 0;
}

int kvm_set_mp_state(struct pyhv_vcpu *vcpu, uint32_t state, struct pyhv_error *error)
{
    struct kvm_mp_state mp_state = {.mp_state = state};
    if (ioctl(kvm_of(vcpu)->fd, KVM_SET_MP_STATE, &mp_state) < 0)
        return pyhv_fail(error, errno, "KVM_SET_MP_STATE", "state %u", state);
    return 0;
}

int kvm_get_events(struct pyhv_vcpu *vcpu, struct pyhv_events *events, struct pyhv_error *error)
{
    struct kvm_vcpu_events from;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_VCPU_EVENTS, &from) < 0)
        return pyhv_fail_errno(error, "KVM_GET_VCPU_EVENTS");
    *events = (struct pyhv_events){
        .exception_injected = from.exception.injected,
        .exception_pending = (from.flags & KVM_VCPUEVENT_VALID_PAYLOAD) && from.exception.pending,
        .exception_vector = from.exception.nr,
        .exception_has_error = from.exception.has_error_code,
        .exception_error = from.exception.error_code,
        .interrupt_injected = from.interrupt.injected,
        .interrupt_vector = from.interrupt.nr,
        .interrupt_soft = from.interrupt.soft,
        .interrupt_shadow = from.interrupt.shadow,
        .nmi_injected = from.nmi.injected,
        .nmi_pending = from.nmi.pending,
        .nmi_masked = from.nmi.masked,
        .sipi_vector = from.sipi_vector,
        .smm = from.smi.smm,
        .smi_pending = from.smi.pending,
        .smm_inside_nmi = from.smi.smm_inside_nmi,
        .latched_init = from.smi.latched_init,
    };
    if (from.flags & KVM_VCPUEVENT_VALID_PAYLOAD) {
        events->exception_has_payload = from.exception_has_payload;
        events->exception_payload = from.exception_payload;
    }
    if (from.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
        events->triple_fault_pending = from.triple_fault.pending;
    return 0;
}

static int check_events(const struct pyhv_events *from, struct pyhv_error *error)
{
    const char *what = "KVM_SET_VCPU_EVENTS";
    CHECK_FITS(what, from, exception_injected, 1u);
    CHECK_FITS(what, from, exception_pending, 1u);
    CHECK_FITS(what, from, exception_vector, 0xffu);
    CHECK_FITS(what, from, exception_has_error, 1u);
    CHECK_FITS(what, from, exception_has_payload, 1u);
    CHECK_FITS(what, from, interrupt_injected, 1u);
    CHECK_FITS(what, from, interrupt_vector, 0xffu);
    CHECK_FITS(what, from, interrupt_soft, 1u);
    CHECK_FITS(what, from, interrupt_shadow, 0xffu);
    CHECK_FITS(what, from, nmi_injected, 1u);
    CHECK_FITS(what, from, nmi_pending, 0xffu);
    CHECK_FITS(what, from, nmi_masked, 1u);
    CHECK_FITS(what, from, smm, 1u);
    CHECK_FITS(what, from, smi_pending, 1u);
    CHECK_FITS(what, from, smm_inside_nmi, 1u);
    CHECK_FITS(what, from, latched_init, 1u);
    CHECK_FITS(what, from, triple_fault_pending, 1u);
    return 0;
}

int kvm_set_events(struct pyhv_vcpu *vcpu, const struct pyhv_events *from, struct pyhv_error *error)
{
    if (check_events(from, error) < 0)
        return -1;
    struct kvm_vcpu_events events = {
        .exception = {.injected = (uint8_t)from->exception_injected,
                      .nr = (uint8_t)from->exception_vector,
                      .has_error_code = (uint8_t)from->exception_has_error,
                      .pending = (uint8_t)from->exception_pending,
                      .error_code = from->exception_error},
        .interrupt = {.injected = (uint8_t)from->interrupt_injected,
                      .nr = (uint8_t)from->interrupt_vector,
                      .soft = (uint8_t)from->interrupt_soft,
                      .shadow = (uint8_t)from->interrupt_shadow},
        .nmi = {.injected = (uint8_t)from->nmi_injected,
                .pending = (uint8_t)from->nmi_pending,
                .masked = (uint8_t)from->nmi_masked},
        .sipi_vector = from->sipi_vector,
        .smi = {.smm = (uint8_t)from->smm,
                .pending = (uint8_t)from->smi_pending,
                .smm_inside_nmi = (uint8_t)from->smm_inside_nmi,
                .latched_init = (uint8_t)from->latched_init},
        .exception_has_payload = (uint8_t)from->exception_has_payload,
        .exception_payload = from->exception_payload,
        .flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW |
                 KVM_VCPUEVENT_VALID_SMM,
    };
    /* The flag is refused where the capability was not enabled, which every VM of ours does where it exists. */
    if (ioctl(kvm_vm_of(vcpu->vm)->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_EXCEPTION_PAYLOAD) > 0)
        events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    if (kvm_vm_of(vcpu->vm)->triple_fault_event) {
        events.triple_fault.pending = (uint8_t)from->triple_fault_pending;
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    } else if (from->triple_fault_pending) {
        return pyhv_fail(error, EINVAL, "KVM_SET_VCPU_EVENTS", "a triple fault is pending; this KVM cannot take that");
    }
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_VCPU_EVENTS, &events) < 0 ? pyhv_fail_errno(error, "KVM_SET_VCPU_EVENTS")
                                                                     : 0;
}

int kvm_get_debugregs(struct pyhv_vcpu *vcpu, struct pyhv_debugregs *regs, struct pyhv_error *error)
{
    struct kvm_debugregs from;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_DEBUGREGS, &from) < 0)
        return pyhv_fail_errno(error, "KVM_GET_DEBUGREGS");
    memcpy(regs->db, from.db, sizeof regs->db);
    regs->dr6 = from.dr6;
    regs->dr7 = from.dr7;
    return 0;
}

int kvm_set_debugregs(struct pyhv_vcpu *vcpu, const struct pyhv_debugregs *from, struct pyhv_error *error)
{
    struct kvm_debugregs regs = {.dr6 = from->dr6, .dr7 = from->dr7};
    memcpy(regs.db, from->db, sizeof regs.db);
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_DEBUGREGS, &regs) < 0 ? pyhv_fail_errno(error, "KVM_SET_DEBUGREGS") : 0;
}

int kvm_get_xcr0(struct pyhv_vcpu *vcpu, uint64_t *value, struct pyhv_error *error)
{
    struct kvm_xcrs xcrs = {0};
    *value = 1;
    if (ioctl(kvm_vm_of(vcpu->vm)->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_XCRS) <= 0)
        return 0;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_XCRS, &xcrs) < 0) {
        /* A host processor without XSAVE: the capability is there, the call is not. */
        return errno == EINVAL ? 0 : pyhv_fail_errno(error, "KVM_GET_XCRS");
    }
    for (uint32_t i = 0; i < xcrs.nr_xcrs && i < KVM_MAX_XCRS; i++)
        if (xcrs.xcrs[i].xcr == 0)
            *value = xcrs.xcrs[i].value;
    return 0;
}

int kvm_set_xcr0(struct pyhv_vcpu *vcpu, uint64_t value, struct pyhv_error *error)
{
    struct kvm_xcrs xcrs = {.nr_xcrs = 1, .xcrs[0] = {.xcr = 0, .value = value}};
    if (ioctl(kvm_of(vcpu)->fd, KVM_SET_XCRS, &xcrs) < 0) {
        int errnum = errno;
        uint64_t now;
        if (kvm_get_xcr0(vcpu, &now, NULL) == 0 && now == value)
            return 0; /* a host without XSAVE, and the value that it has anyway */
        return pyhv_fail(error, errnum, "KVM_SET_XCRS", "XCR0 0x%llx", (unsigned long long)value);
    }
    return 0;
}

#define XSAVE_HEADER_END 576 /* SDM Vol. 1, "XSAVE Area": the legacy region and the header are always there */

/* Bytes of the VM's XSAVE area: 4096, more where guests may use more (KVM_CAP_XSAVE2's value). */
static size_t xsave_size(struct pyhv_vcpu *vcpu)
{
    int size = ioctl(kvm_vm_of(vcpu->vm)->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    return size > (int)sizeof(struct kvm_xsave) ? (size_t)size : sizeof(struct kvm_xsave);
}

int64_t kvm_get_xsave(struct pyhv_vcpu *vcpu, uint8_t *area, size_t capacity, struct pyhv_error *error)
{
    size_t size = xsave_size(vcpu);
    if (size > capacity)
        return pyhv_fail(error, E2BIG, "KVM_GET_XSAVE2", "%zu bytes", size);
    if (size > sizeof(struct kvm_xsave)) {
        if (ioctl(kvm_of(vcpu)->fd, KVM_GET_XSAVE2, area) < 0)
            return pyhv_fail_errno(error, "KVM_GET_XSAVE2");
    } else if (ioctl(kvm_of(vcpu)->fd, KVM_GET_XSAVE, area) < 0) {
        return pyhv_fail_errno(error, "KVM_GET_XSAVE");
    }
    for (uint64_t last = 0; size > XSAVE_HEADER_END; size -= sizeof last) {
        memcpy(&last, area + size - sizeof last, sizeof last);
        if (last)
            break;
    }
    return (int64_t)size;
}

int kvm_set_xsave(struct pyhv_vcpu *vcpu, const uint8_t *area, size_t size, struct pyhv_error *error)
{
    uint8_t whole[PYHV_XSAVE_MAX] = {0};
    size_t wanted = xsave_size(vcpu);
    if (wanted > sizeof whole || size > sizeof whole)
        return pyhv_fail(error, E2BIG, "KVM_SET_XSAVE", "%zu bytes, the VM has %zu", size, wanted);
    memcpy(whole, area, size);
    for (size_t i = wanted; i < size; i++)
        if (whole[i])
            return pyhv_fail(error, E2BIG, "KVM_SET_XSAVE", "state beyond the %zu bytes that this VM has", wanted);
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_XSAVE, whole) < 0 ? pyhv_fail_errno(error, "KVM_SET_XSAVE") : 0;
}

int kvm_get_lapic(struct pyhv_vcpu *vcpu, uint8_t *page, struct pyhv_error *error)
{
    struct kvm_lapic_state lapic;
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_LAPIC, &lapic) < 0)
        return pyhv_fail_errno(error, "KVM_GET_LAPIC");
    memcpy(page, lapic.regs, PYHV_LAPIC_SIZE);
    return 0;
}

int kvm_set_lapic(struct pyhv_vcpu *vcpu, const uint8_t *page, struct pyhv_error *error)
{
    struct kvm_lapic_state lapic;
    memcpy(lapic.regs, page, PYHV_LAPIC_SIZE);
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_LAPIC, &lapic) < 0 ? pyhv_fail_errno(error, "KVM_SET_LAPIC") : 0;
}

/* KVM takes at most this many MSRs in a call (MAX_IO_MSRS, arch/x86/kvm/x86.c). */
enum { MSRS_IN_A_CALL = 256 };
struct msr_buffer {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MSRS_IN_A_CALL];
};

int kvm_get_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, uint64_t *values, size_t count,
                 struct pyhv_error *error)
{
    size_t done = 0;
    while (done < count) {
        struct msr_buffer msrs = {0};
        size_t part = count - done < MSRS_IN_A_CALL ? count - done : MSRS_IN_A_CALL;
        msrs.head.nmsrs = (uint32_t)part;
        for (size_t i = 0; i < part; i++)
            msrs.entries[i].index = indices[done + i];
        int taken = ioctl(kvm_of(vcpu)->fd, KVM_GET_MSRS, &msrs);
        if (taken < 0)
            return pyhv_fail_errno(error, "KVM_GET_MSRS");
        for (int i = 0; i < taken; i++)
            values[done + (size_t)i] = msrs.entries[i].data;
        done += (size_t)taken;
        if ((size_t)taken < part)
            break;
    }
    return (int)done;
}

int kvm_set_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, const uint64_t *values, size_t count,
                 struct pyhv_error *error)
{
    size_t done = 0;
    while (done < count) {
        struct msr_buffer msrs = {0};
        size_t part = count - done < MSRS_IN_A_CALL ? count - done : MSRS_IN_A_CALL;
        msrs.head.nmsrs = (uint32_t)part;
        for (size_t i = 0; i < part; i++)
            msrs.entries[i] = (struct kvm_msr_entry){.index = indices[done + i], .data = values[done + i]};
        int taken = ioctl(kvm_of(vcpu)->fd, KVM_SET_MSRS, &msrs);
        if (taken < 0)
            return pyhv_fail_errno(error, "KVM_SET_MSRS");
        done += (size_t)taken;
        if ((size_t)taken < part)
            break;
    }
    return (int)done;
}

/* KVM_X86_REG_KVM(KVM_REG_GUEST_SSP) of newer headers: an x86 register of 64 bits, of KVM's own (type 3), the first. */
#define GUEST_SSP (KVM_REG_X86 | KVM_REG_SIZE_U64 | UINT64_C(3) << 32)

int kvm_get_ssp(struct pyhv_vcpu *vcpu, uint64_t *value, struct pyhv_error *error)
{
    struct kvm_one_reg reg = {.id = GUEST_SSP, .addr = (uint64_t)(uintptr_t)value};
    if (ioctl(kvm_of(vcpu)->fd, KVM_GET_ONE_REG, &reg) == 0)
        return 0;
    return errno == EINVAL || errno == ENOTTY ? 1 : pyhv_fail(error, errno, "KVM_GET_ONE_REG", "SSP");
}

int kvm_set_ssp(struct pyhv_vcpu *vcpu, uint64_t value, struct pyhv_error *error)
{
    struct kvm_one_reg reg = {.id = GUEST_SSP, .addr = (uint64_t)(uintptr_t)&value};
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_ONE_REG, &reg) < 0 ? pyhv_fail(error, errno, "KVM_SET_ONE_REG", "SSP") : 0;
}

int kvm_clock_paused(struct pyhv_vcpu *vcpu, struct pyhv_error *error)
{
    /* EINVAL: this guest uses no kvmclock, so there is nothing to tell. */
    if (ioctl(kvm_of(vcpu)->fd, KVM_KVMCLOCK_CTRL, 0) < 0 && errno != EINVAL)
        return pyhv_fail_errno(error, "KVM_KVMCLOCK_CTRL");
    return 0;
}

static struct pyhv_pic pic_from_kvm(const struct kvm_pic_state *from)
{
    return (struct pyhv_pic){
        .last_irr = from->last_irr,
        .irr = from->irr,
        .imr = from->imr,
        .isr = from->isr,
        .priority_add = from->priority_add,
        .irq_base = from->irq_base,
        .read_reg_select = from->read_reg_select,
        .poll = from->poll,
        .special_mask = from->special_mask,
        .init_state = from->init_state,
        .auto_eoi = from->auto_eoi,
        .rotate_on_auto_eoi = from->rotate_on_auto_eoi,
        .special_fully_nested_mode = from->special_fully_nested_mode,
        .init4 = from->init4,
        .elcr = from->elcr,
        .elcr_mask = from->elcr_mask,
    };
}

static struct kvm_pic_state pic_to_kvm(const struct pyhv_pic *from)
{
    return (struct kvm_pic_state){
        .last_irr = from->last_irr,
        .irr = from->irr,
        .imr = from->imr,
        .isr = from->isr,
        .priority_add = from->priority_add,
        .irq_base = from->irq_base,
        .read_reg_select = from->read_reg_select,
        .poll = from->poll,
        .special_mask = from->special_mask,
        .init_state = from->init_state,
        .auto_eoi = from->auto_eoi,
        .rotate_on_auto_eoi = from->rotate_on_auto_eoi,
        .special_fully_nested_mode = from->special_fully_nested_mode,
        .init4 = from->init4,
        .elcr = from->elcr,
        .elcr_mask = from->elcr_mask,
    };
}

static struct pyhv_pit_channel pit_from_kvm(const struct kvm_pit_channel_state *from)
{
    return (struct pyhv_pit_channel){
        .initial_count = from->count,
        .latched_count = from->latched_count,
        .count_latched = from->count_latched,
        .status_latched = from->status_latched,
        .status = from->status,
        .read_state = from->read_state,
        .write_state = from->write_state,
        .write_latch = from->write_latch,
        .rw_mode = from->rw_mode,
        .mode = from->mode,
        .bcd = from->bcd,
        .gate = from->gate, /* but not count_load_time: see struct pyhv_pit_channel */
    };
}

static struct kvm_pit_channel_state pit_to_kvm(const struct pyhv_pit_channel *from)
{
    return (struct kvm_pit_channel_state){
        .count = from->initial_count,
        .latched_count = (uint16_t)from->latched_count,
        .count_latched = from->count_latched,
        .status_latched = from->status_latched,
        .status = from->status,
        .read_state = from->read_state,
        .write_state = from->write_state,
        .write_latch = from->write_latch,
        .rw_mode = from->rw_mode,
        .mode = from->mode,
        .bcd = from->bcd,
        .gate = from->gate,
    };
}

int kvm_get_irqchip(struct pyhv_vm *vm, struct pyhv_irqchip *irqchip, struct pyhv_error *error)
{
    *irqchip = (struct pyhv_irqchip){0};
    for (uint32_t id = KVM_IRQCHIP_PIC_MASTER; id < KVM_NR_IRQCHIPS; id++) {
        struct kvm_irqchip chip = {.chip_id = id};
        if (ioctl(kvm_vm_of(vm)->fd, KVM_GET_IRQCHIP, &chip) < 0)
            return pyhv_fail(error, errno, "KVM_GET_IRQCHIP", "chip %u", id);
        if (id != KVM_IRQCHIP_IOAPIC) {
            irqchip->pic[id] = pic_from_kvm(&chip.chip.pic);
            continue;
        }
        const struct kvm_ioapic_state *from = &chip.chip.ioapic;
        irqchip->ioapic.base_address = from->base_address;
        irqchip->ioapic.ioregsel = from->ioregsel;
        irqchip->ioapic.id = from->id;
        irqchip->ioapic.irr = from->irr;
        for (int pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++)
            irqchip->ioapic.redirection[pin] = from->redirtbl[pin].bits;
    }
    if (!vm->pit)
        return 0;
    struct kvm_pit_state2 pit;
    if (ioctl(kvm_vm_of(vm)->fd, KVM_GET_PIT2, &pit) < 0)
        return pyhv_fail_errno(error, "KVM_GET_PIT2");
    for (int i = 0; i < 3; i++)
        irqchip->pit[i] = pit_from_kvm(&pit.channels[i]);
    irqchip->pit_flags = pit.flags;
    return 0;
}

int kvm_set_irqchip(struct pyhv_vm *vm, const struct pyhv_irqchip *from, struct pyhv_error *error)
{
    for (int i = 0; i < 3; i++)
        CHECK_FITS("KVM_SET_PIT2", from, pit[i].latched_count, 0xffffu);
    for (uint32_t id = KVM_IRQCHIP_PIC_MASTER; id < KVM_NR_IRQCHIPS; id++) {
        struct kvm_irqchip chip = {.chip_id = id};
        if (id != KVM_IRQCHIP_IOAPIC) {
            chip.chip.pic = pic_to_kvm(&from->pic[id]);
        } else {
            chip.chip.ioapic.base_address = from->ioapic.base_address;
            chip.chip.ioapic.ioregsel = from->ioapic.ioregsel;
            chip.chip.ioapic.id = from->ioapic.id;
            chip.chip.ioapic.irr = from->ioapic.irr;
            for (int pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++)
                chip.chip.ioapic.redirtbl[pin].bits = from->ioapic.redirection[pin];
        }
        if (ioctl(kvm_vm_of(vm)->fd, KVM_SET_IRQCHIP, &chip) < 0)
            return pyhv_fail(error, errno, "KVM_SET_IRQCHIP", "chip %u", id);
    }
    if (!vm->pit)
        return 0;
    struct kvm_pit_state2 pit = {.flags = from->pit_flags};
    for (int i = 0; i < 3; i++)
        pit.channels[i] = pit_to_kvm(&from->pit[i]);
    return ioctl(kvm_vm_of(vm)->fd, KVM_SET_PIT2, &pit) < 0 ? pyhv_fail_errno(error, "KVM_SET_PIT2") : 0;
}

int kvm_get_clock(struct pyhv_vm *vm, uint64_t *ns, struct pyhv_error *error)
{
    struct kvm_clock_data data = {0};
    if (ioctl(kvm_vm_of(vm)->fd, KVM_GET_CLOCK, &data) < 0)
        return pyhv_fail_errno(error, "KVM_GET_CLOCK");
    *ns = data.clock;
    return 0;
}

int kvm_set_clock(struct pyhv_vm *vm, uint64_t ns, struct pyhv_error *error)
{
    struct kvm_clock_data data = {.clock = ns};
    return ioctl(kvm_vm_of(vm)->fd, KVM_SET_CLOCK, &data) < 0 ? pyhv_fail_errno(error, "KVM_SET_CLOCK") : 0;
}

static struct kvm_device_attr tsc_offset_attribute(uint64_t *offset)
{
    return (struct kvm_device_attr){
        .group = KVM_VCPU_TSC_CTRL,
        .attr = KVM_VCPU_TSC_OFFSET,
        .addr = (uint64_t)(uintptr_t)offset,
    };
}

int kvm_get_tsc_offset(struct pyhv_vcpu *vcpu, uint64_t *offset, struct pyhv_error *error)
{
    struct kvm_device_attr attribute = tsc_offset_attribute(offset);
    if (ioctl(kvm_of(vcpu)->fd, KVM_HAS_DEVICE_ATTR, &attribute) < 0)
        return 1;
    return ioctl(kvm_of(vcpu)->fd, KVM_GET_DEVICE_ATTR, &attribute) < 0
               ? pyhv_fail(error, errno, "KVM_GET_DEVICE_ATTR", "KVM_VCPU_TSC_OFFSET")
               : 0;
}

int kvm_set_tsc_offset(struct pyhv_vcpu *vcpu, uint64_t offset, struct pyhv_error *error)
{
    struct kvm_device_attr attribute = tsc_offset_attribute(&offset);
    if (ioctl(kvm_of(vcpu)->fd, KVM_HAS_DEVICE_ATTR, &attribute) < 0)
        return 1;
    return ioctl(kvm_of(vcpu)->fd, KVM_SET_DEVICE_ATTR, &attribute) < 0
               ? pyhv_fail(error, errno, "KVM_SET_DEVICE_ATTR", "KVM_VCPU_TSC_OFFSET")
               : 0;
}

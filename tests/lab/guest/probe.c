/* SPDX-License-Identifier: MIT
 *
 * Shows that a lab host's KVM runs a guest and honours the guest's CPUID table, with no more than ioctls: the lab's own
 * test of itself, which must hold before anything is believed that pyhv says there.
 *
 * The guest is real-mode code that stores what CPUID leaf 1 answers. The table is KVM's own less SSE3 (1.ECX[0]).
 * Prints one line of facts; exit status 0: the guest read exactly the table, 1: it did not, 2: a call failed.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define ENTRIES 256

static int check(int result, const char *what)
{
    if (result < 0) {
        printf("%s: %s\n", what, strerror(errno));
        exit(2);
    }
    return result;
}

int main(void)
{
    static const uint8_t code[] = {
        0x66, 0xb8, 1,    0,    0,    0, /* mov eax, 1 */
        0x0f, 0xa2,                      /* cpuid */
        0x66, 0x89, 0x0e, 0x00, 0x05,    /* mov [0x500], ecx */
        0x66, 0x89, 0x16, 0x04, 0x05,    /* mov [0x504], edx */
        0xf4,                            /* hlt */
    };
    struct kvm_userspace_memory_region region = {.memory_size = 0x10000};
    struct kvm_cpuid2 *table = calloc(1, sizeof *table + ENTRIES * sizeof table->entries[0]);
    struct kvm_cpuid_entry2 *one = NULL;
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    struct kvm_run *run;
    uint8_t *memory;
    uint32_t seen[2];
    int kvm, vm, vcpu, size;

    kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    /* A host without unrestricted guest needs these two for real mode. */
    check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
    memory = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    region.userspace_addr = (uintptr_t)memory;
    memcpy(memory + 0x1000, code, sizeof code);
    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    table->nent = ENTRIES;
    check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, table), "KVM_GET_SUPPORTED_CPUID");
    for (uint32_t i = 0; i < table->nent; i++)
        if (table->entries[i].function == 1)
            one = &table->entries[i];
    if (!one) {
        printf("KVM_GET_SUPPORTED_CPUID: no leaf 1\n");
        return 2;
    }
    one->ecx &= ~1u;
    check(ioctl(vcpu, KVM_SET_CPUID2, table), "KVM_SET_CPUID2");
    check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
    memcpy(seen, memory + 0x500, sizeof seen);
    /* OSXSAVE (1.ECX[27]) and the APIC bit (1.EDX[9]) follow the vCPU's state, not the table. */
    one->ecx &= ~(1u << 27), seen[0] &= ~(1u << 27);
    one->edx &= ~(1u << 9), seen[1] &= ~(1u << 9);
    printf("exit %u, leaf 1 ecx %08x edx %08x, table ecx %08x edx %08x\n", run->exit_reason, seen[0], seen[1], one->ecx,
           one->edx);
    return run->exit_reason == KVM_EXIT_HLT && seen[0] == one->ecx && seen[1] == one->edx ? 0 : 1;
}

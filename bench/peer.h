/* SPDX-License-Identifier: MIT
 *
 * What the C peers of the benchmarks share: the start state that pyhv gives to ELF64 and flat images
 * (guest_images/README.md), written down a second time and independently, and the conversation with the benchmark.
 *
 * A peer is a process that is kept for the whole benchmark, so that its samples and pyhv's can be taken alternately:
 * each line on its standard input asks for one sample, which it answers with one line, the nanoseconds that it took.
 */
#ifndef PYHV_BENCH_PEER_H
#define PYHV_BENCH_PEER_H

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    DEBUG_EXIT_PORT = 0xf4,
    GDT = 0x1000,
    TSS = 0x1100,
    PML4 = 0x2000,
    PDPT = 0x3000,
    PAGE_DIRECTORIES = 0x4000,
    COMMAND_LINE = 0x8000,
    STACK_TOP = 0x80000,
    LOAD_BASE = 0x100000,
};

static inline void fatal(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline int need(int result, const char *what)
{
    if (result < 0)
        fatal(what);
    return result;
}

static inline double now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* Answers requests until standard input ends. */
static inline int serve(double (*sample)(const char *request))
{
    char request[64];
    while (fgets(request, sizeof request, stdin)) {
        request[strcspn(request, "\n")] = 0;
        printf("%.1f\n", sample(request));
        fflush(stdout);
    }
    return 0;
}

/* A CPUID table as KVM_SET_CPUID2 takes it. */
struct cpuid {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[256];
};

/* Reads one from a file with leaf, subleaf, whether ECX matters, EAX, EBX, ECX and EDX a line, in hexadecimal. */
static inline void read_cpuid(const char *path, struct cpuid *cpuid)
{
    FILE *file = fopen(path, "r");
    uint32_t indexed;
    if (!file)
        fatal(path);
    while (cpuid->head.nent < 256) {
        struct kvm_cpuid_entry2 *entry = &cpuid->entries[cpuid->head.nent];
        if (fscanf(file, "%x %x %x %x %x %x %x", &entry->function, &entry->index, &indexed, &entry->eax, &entry->ebx,
                   &entry->ecx, &entry->edx) != 7)
            break;
        entry->flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
        cpuid->head.nent++;
    }
    fclose(file);
}

/* Descriptor tables and an identity map of the first 4 GiB in 2 MiB pages. */
static inline void write_start_state(uint8_t *ram)
{
    const uint64_t gdt[7] = {
        0,
        UINT64_C(0x00af9b000000ffff),
        UINT64_C(0x00cf93000000ffff),
        UINT64_C(0x00cff3000000ffff),
        UINT64_C(0x00affb000000ffff),
        UINT64_C(0x0000890000000067) | (uint64_t)TSS << 16,
        0,
    };
    uint64_t *pdpt = (uint64_t *)(ram + PDPT), *directories = (uint64_t *)(ram + PAGE_DIRECTORIES);
    const uint64_t stack = STACK_TOP;
    const uint16_t io_map = 104;
    memcpy(ram + GDT, gdt, sizeof gdt);
    memset(ram + TSS, 0, 104);
    memcpy(ram + TSS + 4, &stack, sizeof stack);
    memcpy(ram + TSS + 102, &io_map, sizeof io_map);
    *(uint64_t *)(ram + PML4) = PDPT | 3;
    for (uint64_t i = 0; i < 4; i++)
        pdpt[i] = (PAGE_DIRECTORIES + 0x1000 * i) | 3;
    for (uint64_t i = 0; i < 2048; i++)
        directories[i] = i << 21 | 0x83;
}

/* The registers for it: reads what the vCPU has after reset and changes it. */
static inline void set_registers(int vcpu, uint64_t entry, uint64_t ram_size)
{
    struct kvm_sregs2 sregs;
    need(ioctl(vcpu, KVM_GET_SREGS2, &sregs), "KVM_GET_SREGS2");
    const struct kvm_segment code = {
        .limit = 0xffffffff, .selector = 0x08, .type = 0xb, .present = 1, .s = 1, .l = 1, .g = 1};
    const struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x10, .type = 0x3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.tr = (struct kvm_segment){.base = TSS, .limit = 103, .selector = 0x28, .type = 0xb, .present = 1};
    sregs.ldt = (struct kvm_segment){.unusable = 1};
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 55;
    sregs.idt.base = sregs.idt.limit = 0;
    sregs.cr0 = 0x80010033;
    sregs.cr3 = PML4;
    sregs.cr4 = 0x620;
    sregs.efer = 0x500;
    need(ioctl(vcpu, KVM_SET_SREGS2, &sregs), "KVM_SET_SREGS2");
    const struct kvm_regs regs = {
        .rip = entry, .rsp = STACK_TOP, .rdi = COMMAND_LINE, .rsi = ram_size, .rdx = 1, .rflags = 2};
    need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

#endif

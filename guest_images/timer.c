/* SPDX-License-Identifier: MIT
 *
 * timer: arms the local APIC's timer and waits for its interrupt with HLT. It proves that interrupts arrive, and that a
 * timer that was armed before the VM was saved or moved still fires.
 *
 *     ms=N       fire after about N milliseconds (default 300)
 *     deadline   by IA32_TSC_DEADLINE, where CPUID shows it, instead of a count
 *
 * Prints a line when it is armed and one when it has fired; status 0. The length of a millisecond is taken from the
 * timer itself: it is KVM's, which counts 1 GHz of bus cycles (APIC_BUS_CYCLE_NS, arch/x86/kvm/lapic.h). For `deadline`
 * the TSC is measured against it.
 */
#include "guest.h"

NOTE_USER_MODE("");

enum {
    VECTOR = 0x40,
    SPURIOUS_VECTOR = 0x4f,
    LVT_MASKED = 1 << 16,
    LVT_TSC_DEADLINE = 2 << 17,
    APIC_SOFTWARE_ENABLE = 1 << 8,
    DIVIDE_BY_1 = 0xb,
    COUNTS_IN_A_MILLISECOND = 1000000,
    MSR_TSC_DEADLINE = 0x6e0,
};

/* Registers of the local APIC, bytes from its page (SDM Vol. 3, "Local APIC Register Address Map"). */
enum { EOI = 0xb0, SPURIOUS = 0xf0, LVT_TIMER = 0x320, INITIAL_COUNT = 0x380, CURRENT_COUNT = 0x390, DIVIDE = 0x3e0 };

static volatile uint32_t *const apic = (volatile uint32_t *)0xfee00000;

struct gate {
    uint16_t offset_low, segment;
    uint8_t stack, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};
static struct gate idt[SPURIOUS_VECTOR + 1];
static volatile bool fired;

void timer_handler(void)
{
    fired = true;
    apic[EOI / 4] = 0;
}

/* Saves what a C function may change and calls it; a spurious interrupt has nothing to do. */
__asm__(".pushsection .text\n"
        "timer_entry:\n"
        "push %rax\npush %rcx\npush %rdx\npush %rsi\npush %rdi\npush %r8\npush %r9\npush %r10\npush %r11\n"
        "call timer_handler\n"
        "pop %r11\npop %r10\npop %r9\npop %r8\npop %rdi\npop %rsi\npop %rdx\npop %rcx\npop %rax\n"
        "iretq\n"
        "spurious_entry:\n"
        "iretq\n"
        ".popsection\n");
extern const char timer_entry[], spurious_entry[];

static void set_gate(int vector, const char *entry)
{
    uint64_t address = (uintptr_t)entry;
    idt[vector] = (struct gate){
        .offset_low = (uint16_t)address,
        .segment = 0x08,
        .type = 0x8e,
        .offset_middle = (uint16_t)(address >> 16),
        .offset_high = (uint32_t)(address >> 32),
    };
}

static void write_msr(uint32_t number, uint64_t value)
{
    __asm__ volatile("wrmsr" : : "c"(number), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

/* TSC cycles in a millisecond, measured over ten of them by the masked timer. */
static uint64_t tsc_in_a_millisecond(void)
{
    apic[LVT_TIMER / 4] = LVT_MASKED | VECTOR;
    apic[INITIAL_COUNT / 4] = 0xffffffff;
    uint32_t from = apic[CURRENT_COUNT / 4];
    uint64_t begin = rdtsc();
    while (from - apic[CURRENT_COUNT / 4] < 10 * COUNTS_IN_A_MILLISECOND)
        ;
    uint64_t cycles = rdtsc() - begin;
    apic[INITIAL_COUNT / 4] = 0;
    return cycles / 10;
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes, (void)vcpus;
    uint64_t milliseconds = cmdline_number(cmdline, "ms=", 300);
    bool deadline = cmdline_has(cmdline, "deadline");
    struct registers leaf1;
    cpuid(1, 0, &leaf1);
    if (deadline && !(leaf1.ecx >> 24 & 1)) {
        PRINT("timer: this processor has no TSC deadline\n");
        return 2;
    }
    if (milliseconds > 4000) {
        PRINT("timer: at most 4000 milliseconds\n");
        return 2;
    }

    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) table = {sizeof idt - 1, (uintptr_t)idt};
    set_gate(VECTOR, timer_entry);
    set_gate(SPURIOUS_VECTOR, spurious_entry);
    __asm__ volatile("lidt %0" : : "m"(table));
    outb(0x21, 0xff); /* the PICs have nothing to say */
    outb(0xa1, 0xff);
    apic[SPURIOUS / 4] = APIC_SOFTWARE_ENABLE | SPURIOUS_VECTOR;
    apic[DIVIDE / 4] = DIVIDE_BY_1;
    if (deadline) {
        uint64_t cycles = tsc_in_a_millisecond() * milliseconds;
        apic[LVT_TIMER / 4] = LVT_TSC_DEADLINE | VECTOR;
        __asm__ volatile("mfence" : : : "memory"); /* SDM Vol. 3, "TSC-Deadline Mode": the mode must be set first */
        write_msr(MSR_TSC_DEADLINE, rdtsc() + cycles);
    } else {
        apic[LVT_TIMER / 4] = VECTOR;
        apic[INITIAL_COUNT / 4] = (uint32_t)(milliseconds * COUNTS_IN_A_MILLISECOND);
    }
    PRINT("timer: armed\n");
    while (!fired)
        __asm__ volatile("sti\n\thlt\n\tcli" : : : "memory");
    PRINT("timer: fired\n");
    return 0;
}

/* SPDX-License-Identifier: MIT
 *
 * pit: the PC's timer, without the interrupts that RFLAGS.IF switches. It proves that a VM whose vCPU is in HLT with
 * interrupts off is not at its end while something makes NMIs, and what a pause does to the timer's ticks.
 *
 *     nmi        make the timer's ticks NMIs, by the local APIC's LINT0; HLT until there were five (default)
 *     ioapic     make the serial port's interrupt an NMI, by the I/O APIC; HLT until it came
 *     masked     as nmi, but HLT inside the first NMI's handler, where no other gets through: the end
 *     silent     as nmi, with LINT0 masked: the end
 *     count      ask the interrupt controller for 1,000 ticks a second, and count them at 0x200000, for ever
 *
 * Prints a line when it begins; status 0.
 */
#include "guest.h"

NOTE_USER_MODE("");
NOTE_PC;

enum { LAPIC = 0xfee00000, SPURIOUS = 0xf0, LINT0 = 0x350, APIC_SOFTWARE_ENABLE = 1 << 8 };
enum { IOAPIC = 0xfec00000, WINDOW = 0x10, REDIRECTION = 0x10, UART_LINE = 4 };
enum { NMI = 2, MODE_NMI = 4 << 8, MASKED = 1 << 16 };
enum { PIC = 0x20, PIC_DATA = 0x21, PIT_CHANNEL_0 = 0x40, PIT_CONTROL = 0x43, UART = 0x3f8 };
enum { RATE_GENERATOR = 0x34, HZ = 1193182 };
enum { COUNT_AT = 0x200000 };

static volatile uint32_t nmis;
static volatile bool sleep_in_handler;

static void write_register(uint64_t page, uint32_t offset, uint32_t value)
{
    *(volatile uint32_t *)(page + offset) = value;
}

/* Takes the timer's interrupt from the controller, if it waits there: that takes no vector. */
static bool take_tick(void)
{
    outb(PIC, 0x0c); /* OCW3: poll */
    if (!(inb(PIC) & 0x80))
        return false;
    outb(PIC, 0x20); /* end of interrupt */
    return true;
}

void nmi_handler(void)
{
    nmis++;
    take_tick(); /* KVM makes the next one of what is taken */
    while (sleep_in_handler)
        __asm__ volatile("hlt");
}

__asm__(".pushsection .text\n"
        "nmi_entry:\n"
        "push %rax\npush %rcx\npush %rdx\npush %rsi\npush %rdi\npush %r8\npush %r9\npush %r10\npush %r11\n"
        "call nmi_handler\n"
        "pop %r11\npop %r10\npop %r9\npop %r8\npop %rdi\npop %rsi\npop %rdx\npop %rcx\npop %rax\n"
        "iretq\n"
        ".popsection\n");
extern const char nmi_entry[];

struct gate { /* SDM Vol. 3, "64-Bit Mode IDT" */
    uint16_t offset_low, segment;
    uint8_t stack, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};
static struct gate idt[NMI + 1];

static void take_nmis(void)
{
    uint64_t address = (uintptr_t)nmi_entry;
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) table = {sizeof idt - 1, (uintptr_t)idt};
    idt[NMI] = (struct gate){
        .offset_low = (uint16_t)address,
        .segment = 0x08,
        .type = 0x8e,
        .offset_middle = (uint16_t)(address >> 16),
        .offset_high = (uint32_t)(address >> 32),
    };
    __asm__ volatile("lidt %0" : : "m"(table));
    write_register(LAPIC, SPURIOUS, APIC_SOFTWARE_ENABLE | 0xff);
}

/* A tick each `count` periods of 1.193182 MHz; 0 means 65536. */
static void start_timer(uint16_t count)
{
    outb(PIT_CONTROL, RATE_GENERATOR);
    outb(PIT_CHANNEL_0, (uint8_t)count);
    outb(PIT_CHANNEL_0, (uint8_t)(count >> 8));
}

static void prepare_controller(void)
{
    outb(PIC, 0x11); /* ICW1 to ICW4: at vector 0x20, a slave at line 2 */
    outb(PIC_DATA, 0x20);
    outb(PIC_DATA, 0x04);
    outb(PIC_DATA, 0x01);
    outb(PIC_DATA, 0xfe); /* the timer's line only */
}

static void route_uart_as_nmi(void)
{
    write_register(IOAPIC, 0, REDIRECTION + 2 * UART_LINE + 1);
    write_register(IOAPIC, WINDOW, 0); /* to local APIC 0 */
    write_register(IOAPIC, 0, REDIRECTION + 2 * UART_LINE);
    write_register(IOAPIC, WINDOW, MODE_NMI);
    outb(UART + 4, 0x08); /* OUT2 lets its interrupt out, which input brings */
    outb(UART + 1, 0x01);
}

static _Noreturn void count_ticks(void)
{
    volatile uint32_t *count = (volatile uint32_t *)COUNT_AT;
    start_timer(HZ / 1000);
    for (;;)
        if (take_tick())
            ++*count;
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes, (void)vcpus;
    PRINT("pit: begins\n");
    prepare_controller();
    if (cmdline_has(cmdline, "count"))
        count_ticks();
    take_nmis();
    uint32_t wanted = 5;
    if (cmdline_has(cmdline, "ioapic")) {
        wanted = 1;
        route_uart_as_nmi();
    } else {
        sleep_in_handler = cmdline_has(cmdline, "masked");
        write_register(LAPIC, LINT0, cmdline_has(cmdline, "silent") ? MODE_NMI | MASKED : MODE_NMI);
        start_timer(0);
    }
    while (nmis < wanted)
        __asm__ volatile("hlt");
    return 0;
}

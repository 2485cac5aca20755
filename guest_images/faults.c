/* SPDX-License-Identifier: MIT
 *
 * faults: does what its command line says, to prove that the VMM has a defined answer for each way in which a guest can
 * end or do something odd. Where nothing else is said it prints a line and ends with status 0.
 *
 *     triple-fault  an exception with no IDT to handle it: the processor shuts down
 *     ud            an undefined instruction, with an IDT: the exception is printed, status 64 + 6
 *     fpu           an x87 addition, which an interpreting KVM reports as an internal error
 *     halt          HLT with interrupts off
 *     reset         the i8042's reset line (0xfe to port 0x64)
 *     unmapped      reads and writes memory at 0xd0000000, where no RAM is
 *     badport       reads and writes a port that nobody claims: status 1 unless it reads all-ones in every size
 *     echo          copies console input to console output, up to and with a `q`
 *     status=N      ends with the status N, modulo 256
 */
#include "guest.h"

NOTE_USER_MODE("");

enum {
    SERIAL_DATA = 0x3f8,
    SERIAL_LINE_STATUS = 0x3fd,
    DATA_READY = 1,
    I8042_COMMAND = 0x64,
    PULSE_RESET = 0xfe,
    NOBODYS_PORT = 0x4658,
};

static int fault_twice(void)
{
    __asm__ volatile("ud2");
    return 1;
}

static int undefined_instruction(void)
{
    exceptions_init();
    __asm__ volatile("ud2");
    return 1;
}

static int fpu(void)
{
    __asm__ volatile("fninit; fld1; fld1; faddp; fstp %%st(0)" : : : "memory");
    PRINT("faults: the x87 addition was executed\n");
    return 0;
}

static int halt(void)
{
    PRINT("faults: halting\n");
    __asm__ volatile("cli; hlt");
    PRINT("faults: awake again\n");
    return 1;
}

static int reset(void)
{
    outb(I8042_COMMAND, PULSE_RESET);
    PRINT("faults: still here after the reset\n");
    return 1;
}

static int unmapped(void)
{
    volatile uint32_t *nothing = (volatile uint32_t *)0xd0000000;
    uint32_t value = *nothing;
    PRINT("faults: no memory reads ");
    console_hex(value, 8);
    *nothing = 1;
    PRINT(", and can be written\n");
    return 0;
}

static int bad_port(void)
{
    uint8_t byte;
    uint16_t word;
    uint32_t dword;
    uint16_t port = NOBODYS_PORT;
    __asm__ volatile("inb %1, %0" : "=a"(byte) : "d"(port));
    __asm__ volatile("inw %1, %0" : "=a"(word) : "d"(port));
    __asm__ volatile("inl %1, %0" : "=a"(dword) : "d"(port));
    outb(port, 0);
    PRINT("faults: no device reads ");
    console_hex(byte, 2);
    PRINT(" ");
    console_hex(word, 4);
    PRINT(" ");
    console_hex(dword, 8);
    PRINT("\n");
    return !(byte == UINT8_MAX && word == UINT16_MAX && dword == UINT32_MAX);
}

static int echo(void)
{
    for (;;) {
        while (!(inb(SERIAL_LINE_STATUS) & DATA_READY))
            ;
        uint8_t byte = inb(SERIAL_DATA);
        outb(SERIAL_DATA, byte);
        if (byte == 'q')
            return 0;
    }
}

static const struct {
    const char *word;
    int (*act)(void);
} acts[] = {
    {"triple-fault", fault_twice}, {"ud", undefined_instruction}, {"fpu", fpu},   {"halt", halt}, {"reset", reset},
    {"unmapped", unmapped},        {"badport", bad_port},         {"echo", echo},
};

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes;
    (void)vcpus;
    for (size_t act = 0; act < sizeof acts / sizeof *acts; act++)
        if (cmdline_has(cmdline, acts[act].word))
            return acts[act].act();
    if (cmdline_value(cmdline, "status="))
        return (int)cmdline_number(cmdline, "status=", 0);
    PRINT("faults: the command line says what to do:");
    for (size_t act = 0; act < sizeof acts / sizeof *acts; act++) {
        PRINT(" ");
        console_string(acts[act].word);
    }
    PRINT(" status=N\n");
    return 2;
}

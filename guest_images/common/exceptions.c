/* SPDX-License-Identifier: MIT
 *
 * The IDT, and what a guest does about an exception that it did not expect: say which, and end.
 */
#include "guest.h"

enum { VECTORS = 32, CODE_SEGMENT = 0x08, ENTRY_BYTES = 16, INTERRUPT_GATE = 0x8e };

/* A 64-bit gate (SDM Vol. 3, "64-Bit Mode IDT"). */
struct gate {
    uint16_t offset_low, segment;
    uint8_t stack, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};

struct descriptor_table {
    uint16_t limit;
    uint64_t base;
} __attribute__((packed));

extern const char exception_entries[];

static struct gate idt[VECTORS];

void exceptions_init(void)
{
    for (int vector = 0; vector < VECTORS; vector++) {
        uint64_t entry = (uintptr_t)exception_entries + (uintptr_t)vector * ENTRY_BYTES;
        idt[vector] = (struct gate){
            .offset_low = (uint16_t)entry,
            .segment = CODE_SEGMENT,
            .type = INTERRUPT_GATE,
            .offset_middle = (uint16_t)(entry >> 16),
            .offset_high = (uint32_t)(entry >> 32),
        };
    }
    struct descriptor_table table = {sizeof idt - 1, (uintptr_t)idt};
    __asm__ volatile("lidt %0" : : "m"(table));
}

__attribute__((weak)) void exception_handler(const struct exception *exception)
{
    exception_report(exception);
}

void exception_report(const struct exception *exception)
{
    uint64_t address;
    __asm__ volatile("mov %%cr2, %0" : "=r"(address));
    PRINT("exception ");
    console_decimal(exception->vector);
    PRINT(" at ");
    console_hex(exception->rip, 16);
    PRINT(", CPL ");
    console_decimal(exception->cs & 3);
    PRINT(", error code ");
    console_hex(exception->error_code, 8);
    PRINT(", CR2 ");
    console_hex(address, 16);
    PRINT("\n");
    guest_exit(EXCEPTION_STATUS + (int)exception->vector);
}

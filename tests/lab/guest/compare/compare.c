/* SPDX-License-Identifier: MIT
 *
 * The runner: enters each case and prints a line about it. What is as it was before the case is not printed.
 */
#include "guest.h"

struct testcase {
    const char *name;
    void (*code)(void);
    uint32_t cs, ss;
    uint64_t rflags;
};
extern const struct testcase cases[], cases_end[], alone[], alone_end[], shown[], shown_end[];

/* As entry.S leaves it. */
extern struct {
    uint64_t regs[15]; /* RAX RBX RCX RDX RSI RDI RBP R8 to R15 */
    uint64_t vector, error_code, rip, cs, rflags, rsp, ss, cr2, cr0, cr4, dr6;
} result;

extern void enter(const struct testcase *testcase);
extern void load_tables(void);
extern uint64_t gdt[], pt[];
extern uint8_t page[], tss[], stubs[], counter[], ist_top[], gate_target[];
extern struct gate {
    uint64_t low, high;
} idt[256], counting[256];

enum { END = 0x80, IST1 = 1 };

static const char *const names[] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
                                    "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
static const uint64_t before[] = {
    0x8877665544332211, 0x0102030405060708, 3,          0x99,       0x40000000, 0x40000100,
    0x40000200,         0xd0000000,         0xfee00000, 0xfec00000, 0,          UINT64_C(1) << 63,
};

static struct gate gate(uint64_t handler, unsigned dpl, bool present)
{
    return (struct gate){
        .low = (handler & 0xffff) | 0x08 << 16 | (uint64_t)IST1 << 32 | UINT64_C(0xe) << 40 | (uint64_t)dpl << 45 |
               (uint64_t)present << 47 | (handler >> 16 & 0xffff) << 48,
        .high = handler >> 32,
    };
}

static void call_gate(uint64_t *entry, bool present)
{
    uint64_t target = (uint64_t)gate_target;
    entry[0] = (target & 0xffff) | 0x08 << 16 | UINT64_C(0xc) << 40 | UINT64_C(3) << 45 | (uint64_t)present << 47 |
               (target >> 16 & 0xffff) << 48;
    entry[1] = target >> 32;
}

/* Before each case, which may have changed them. */
static void make_tables(void)
{
    for (unsigned vector = 0; vector < 256; vector++) {
        unsigned dpl = vector == 3 || vector == 4 || vector >= 0x80 ? 3 : 0;
        idt[vector] = gate((uint64_t)stubs + 16 * vector, dpl, vector != 0x90);
        counting[vector] = vector == END ? idt[END] : gate((uint64_t)counter, dpl, true);
    }
    uint64_t base = (uint64_t)tss;
    *(uint64_t *)(tss + 4) = *(uint64_t *)(tss + 36) = (uint64_t)ist_top; /* RSP0, IST1 */
    *(uint16_t *)(tss + 102) = 104;                                       /* no ports for programs */
    gdt[5] = 103 | (base & 0xffffff) << 16 | UINT64_C(0x89) << 40 | (base >> 24 & 0xff) << 56;
    gdt[6] = base >> 32;
    gdt[15] = UINT64_C(0x82) << 40; /* an empty LDT */
    call_gate(&gdt[11], true);
    call_gate(&gdt[13], false);
    load_tables();
}

/* Pages hold a pattern, another in each quarter. */
static uint64_t pattern(unsigned at)
{
    return UINT64_C(0x0101010101010101) * (at % 251) ^ UINT64_C(0x8000000000000080);
}

static void fill(void)
{
    uint64_t *words = (uint64_t *)page;
    for (unsigned at = 0; at < 9 * PAGE / 8; at++)
        words[at] = pattern(at);
}

static void print_changes(void)
{
    uint64_t *words = (uint64_t *)page;
    int shown = 0;
    for (unsigned at = 0; at < 9 * PAGE / 8; at++)
        if (words[at] != pattern(at) && shown++ < 4) {
            PRINT(" [");
            console_hex(8 * at, 4);
            PRINT("] ");
            console_hex(words[at], 16);
        }
    for (unsigned at = 0; at < 9; at++) { /* accessed and dirty */
        if (pt[at] & 0x60) {
            PRINT(" pte");
            console_decimal(at);
            if (pt[at] & 0x40)
                PRINT(" dirty");
        }
        pt[at] &= ~UINT64_C(0x60);
    }
    uint64_t cr3;
    __asm__ volatile("mov %%cr3, %0; mov %0, %%cr3" : "=r"(cr3) : : "memory");
}

static void print(const struct testcase *testcase)
{
    console_string(testcase->name);
    PRINT(":");
    if (result.vector != END) {
        PRINT(" vector ");
        console_decimal(result.vector);
        PRINT(" error ");
        console_hex(result.error_code, 4);
        if (result.vector == 14) {
            PRINT(" cr2 ");
            console_hex(result.cr2, 16);
        }
        if (result.vector == 1) {
            PRINT(" dr6 ");
            console_hex(result.dr6, 8);
        }
    }
    PRINT(" at ");
    uint64_t offset = result.rip - (uint64_t)testcase->code;
    if (offset < 256)
        console_decimal(offset);
    else
        console_hex(result.rip, 16);
    PRINT(" cs ");
    console_hex(result.cs, 2);
    for (unsigned n = 0; n < sizeof names / sizeof *names; n++) {
        uint64_t was = n < sizeof before / sizeof *before ? before[n] : 0;
        if (result.regs[n] != was) {
            PRINT(" ");
            console_string(names[n]);
            PRINT(" ");
            console_hex(result.regs[n], 16);
        }
    }
    PRINT(" flags ");
    console_hex(result.rflags & ~UINT64_C(0x10000), 6); /* RF is compared in cases of its own */
    print_changes();
    PRINT("\n");
}

static void run(const struct testcase *testcase, const struct testcase *end)
{
    for (; testcase < end; testcase++) {
        fill();
        make_tables();
        console_string(testcase->name); /* of a case that does not come back the name is there */
        PRINT(" ...\n");
        enter(testcase);
        print(testcase);
    }
}

/* start_info: what PVH gives (Xen, public/arch-x86/hvm/start_info.h). */
int compare_main(const uint64_t *start_info)
{
    const char *cmdline = (const char *)start_info[3];
    PRINT("compare: begin\n");
    if (cmdline_has(cmdline, "alone"))
        run(alone, alone_end);
    else if (cmdline_has(cmdline, "shown"))
        run(shown, shown_end);
    else
        run(cases, cases_end);
    PRINT("compare: end\n");
    return 0;
}

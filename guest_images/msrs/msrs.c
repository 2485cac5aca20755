/* SPDX-License-Identifier: MIT
 *
 * msrs: writes to every model-specific register that lets itself be written, and then looks, round after round, whether
 * each still holds what it was given. It proves that what a guest can write is saved, restored and migrated.
 *
 * Prints a line for each MSR that holds a value of the guest's choice, then one a round; and one for an MSR that
 * holds something else later:
 *
 *     msrs: 0x000000e1 holds 0x0000000012345678
 *     msrs: 117 hold what was written
 *     msrs: round 1
 *     msrs: 0x000000e1 lost 0x0000000012345678, reads 0x0000000000000000
 *
 * It never ends, but for `rounds=N`: then with status 0, or 1 where something was lost.
 *
 * Not tried: the TSC, which counts, and IA32_APIC_BASE, without which there is no APIC.
 */
#include "guest.h"

NOTE_USER_MODE("");

/* try.S: false where the processor raises an exception instead. */
bool try_read(uint32_t msr, uint64_t *value);
bool try_write(uint32_t msr, uint64_t value);
_Noreturn void try_failed(void);

enum {
    MOST = 512,
    TSC = 0x10,
    APIC_BASE = 0x1b,
    HWCR = 0xc0010015,
    PAUSE = 20000, /* turns between two rounds */
};
#define HWCR_MC_STATUS_WRITABLE (UINT64_C(1) << 18) /* APM Vol. 2, "Machine Check Architecture" */

static const struct {
    uint32_t first, last;
    bool holds_an_address; /* to which KVM writes: only that of `page` may be there (Linux, virt/kvm/x86/msr.rst) */
} ranges[] = {
    {0, 0x10, false},
    {0x11, 0x12, true},
    {0x13, 0x1fff, false},
    {0x40000000, 0x400001ff, true},
    {0x4b564d00, 0x4b564dff, true},
    {0xc0000000, 0xc0002fff, false},
    {0xc0010000, 0xc0011fff, false},
};

/* Some value of these goes into almost every MSR: an address, memory types, all bits, 32 bits, a page. */
static const uint64_t patterns[] = {
    0x00005a5a12345678, 0x0406040604060406, UINT64_MAX, 0x12345678, 0x12345006, 0x12345000, 1, 2,
};

static uint8_t page[PAGE] __attribute__((aligned(PAGE)));
static struct {
    uint32_t msr;
    bool told;
    uint64_t value;
} held[MOST];
static unsigned count;

void exception_handler(const struct exception *exception)
{
    extern const char try_first[], try_last[];
    if (exception->rip < (uintptr_t)try_first || exception->rip > (uintptr_t)try_last)
        exception_report(exception);
    try_failed();
}

/* Whether the MSR, whose value is `old`, takes `value` and holds it; else it has its old value again. */
static bool keeps(uint32_t msr, uint64_t old, uint64_t value)
{
    uint64_t now;
    if (value == old || !try_write(msr, value))
        return false;
    if (!try_read(msr, &now) || now != value) {
        try_write(msr, old);
        return false;
    }
    if (count == MOST) {
        PRINT("msrs: more than this guest has room for\n");
        guest_exit(2);
    }
    held[count].msr = msr;
    held[count++].value = value;
    return true;
}

static void probe(uint32_t msr, bool holds_an_address)
{
    uint64_t old;
    if (msr == TSC || msr == APIC_BASE || !try_read(msr, &old))
        return;
    if (holds_an_address) {
        uint64_t address = (uintptr_t)page | 1;
        if (old != address && !keeps(msr, old, address)) /* where it is, the MSR has another number too */
            keeps(msr, old, 0);
        return;
    }
    for (unsigned i = 0; i < sizeof patterns / sizeof *patterns; i++)
        if (keeps(msr, old, patterns[i]))
            return;
    for (uint64_t bit = 1; bit; bit <<= 1)
        if (keeps(msr, old, old ^ bit))
            return;
}

static bool look(void)
{
    bool good = true;
    for (unsigned i = 0; i < count; i++) {
        uint64_t now = 0;
        if (try_read(held[i].msr, &now) && now == held[i].value)
            continue;
        good = false;
        if (held[i].told)
            continue;
        held[i].told = true;
        PRINT("msrs: ");
        console_hex(held[i].msr, 8);
        PRINT(" lost ");
        console_hex(held[i].value, 16);
        PRINT(", reads ");
        console_hex(now, 16);
        PRINT("\n");
    }
    return good;
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes;
    (void)vcpus;
    uint64_t rounds = cmdline_number(cmdline, "rounds=", 0), old;
    exceptions_init();
    /* First, for with this bit AMD guests may write the banks' status too. */
    if (try_read(HWCR, &old))
        keeps(HWCR, old, old | HWCR_MC_STATUS_WRITABLE);
    bool wrote_hwcr = count != 0;
    for (unsigned i = 0; i < sizeof ranges / sizeof *ranges; i++)
        for (uint64_t msr = ranges[i].first; msr <= ranges[i].last; msr++)
            if (msr != HWCR || !wrote_hwcr)
                probe((uint32_t)msr, ranges[i].holds_an_address);
    for (unsigned i = 0; i < count; i++) {
        PRINT("msrs: ");
        console_hex(held[i].msr, 8);
        PRINT(" holds ");
        console_hex(held[i].value, 16);
        PRINT("\n");
    }
    PRINT("msrs: ");
    console_decimal(count);
    PRINT(" hold what was written\n");
    for (uint64_t round = 1;; round++) {
        bool good = look();
        PRINT("msrs: round ");
        console_decimal(round);
        PRINT("\n");
        if (round == rounds)
            return !good;
        for (volatile int turn = 0; turn < PAUSE; turn++)
            ;
    }
}

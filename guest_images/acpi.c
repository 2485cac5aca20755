/* SPDX-License-Identifier: MIT
 *
 * acpi: finds the ACPI tables as a kernel does, checks their sums, prints what they say, and switches the machine off by
 * what they say: S5. Status 1 where they are not right. Words of its command line:
 *
 *     reset       resets the machine by the FADT's reset register instead
 *     panic       tells the host that it panics, by the port in the DSDT's device PEVT
 *     watch       prints the VM generation ID and waits for the event that tells of a new one; it is another one then
 */
#include "guest.h"

NOTE_USER_MODE("");
NOTE_PC;

struct __attribute__((packed)) rsdp {
    char signature[8];
    uint8_t sum, oem[6], revision;
    uint32_t rsdt, length;
    uint64_t xsdt;
};

struct __attribute__((packed)) table {
    uint32_t signature, length;
    uint8_t rest[28];
};

/* Offsets in the FADT (ACPI specification 6.4, table 5.9). */
enum {
    FADT_DSDT = 40,
    FADT_PM1A_CNT = 64,
    FADT_PM_TMR = 76,
    FADT_GPE0 = 80,
    FADT_RESET_PORT = 120,
    FADT_RESET_VALUE = 128,
};

enum { SLP_EN = 1 << 13, SLP_TYP_SHIFT = 10, WATCHED_EVENT = 0 };

#define NAME(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)

static void outw(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* Tables are not aligned for what is in them; this processor does not mind. */
static uint32_t get32(const void *at)
{
    uint32_t value;
    __asm__("movl %1, %0" : "=r"(value) : "m"(*(const uint32_t *)at));
    return value;
}

_Noreturn static void fail(const char *why)
{
    PRINT("acpi: ");
    console_string(why);
    PRINT("\n");
    guest_exit(1);
}

static bool sums_up(const void *bytes, uint32_t size)
{
    uint8_t sum = 0;
    for (const uint8_t *at = bytes; size--; at++)
        sum = (uint8_t)(sum + *at);
    return sum == 0;
}

static const struct rsdp *find_rsdp(void)
{
    for (uint32_t at = 0xe0000; at < 0x100000; at += 16) {
        const struct rsdp *rsdp = (const struct rsdp *)(uintptr_t)at;
        if (get32(rsdp->signature) == NAME('R', 'S', 'D', ' ') &&
            get32(rsdp->signature + 4) == NAME('P', 'T', 'R', ' ')) {
            if (!sums_up(rsdp, 20) || !sums_up(rsdp, rsdp->length))
                fail("the RSDP does not sum up");
            return rsdp;
        }
    }
    fail("no RSDP below 1 MiB");
}

static const struct table *checked(uint64_t address)
{
    const struct table *table = (const struct table *)address;
    PRINT("table ");
    console_write((const char *)&table->signature, 4);
    PRINT(" at ");
    console_hex(address, 8);
    PRINT("\n");
    if (!sums_up(table, table->length))
        fail("the table does not sum up");
    return table;
}

/* The table of this signature, through the XSDT. */
static const uint8_t *find_table(const struct table *xsdt, uint32_t signature)
{
    for (uint32_t at = sizeof *xsdt; at < xsdt->length; at += 8) {
        uint64_t address = get32((const uint8_t *)xsdt + at); /* below 4 GiB */
        if (((const struct table *)address)->signature == signature)
            return (const uint8_t *)checked(address);
    }
    fail("a table is missing");
}

/* The first element's bytes of the package that is the value of this name in the DSDT. A kernel without an interpreter
 * looks for it as a pattern: NameOp, the name, PackageOp. */
static const uint8_t *find_package(const uint8_t *dsdt, uint32_t name)
{
    const uint8_t *end = dsdt + ((const struct table *)dsdt)->length;
    for (const uint8_t *at = dsdt; at + 8 < end; at++)
        if (*at == name % 256 && get32(at) == name && at[4] == 0x12)
            return at + 5 + 1 + (at[5] >> 6) + 1; /* the length's first byte tells how many follow; the count */
    fail("a name is missing in the DSDT");
}

static uint32_t aml_integer(const uint8_t *at)
{
    switch (*at) {
    case 0x0a:
        return at[1];
    case 0x0b:
        return at[1] | (uint32_t)at[2] << 8;
    case 0x0c:
        return get32(at + 1);
    default:
        return *at; /* ZeroOp, OneOp */
    }
}

static uint32_t count_cpus(const uint8_t *madt)
{
    uint32_t count = 0;
    const uint8_t *end = madt + ((const struct table *)madt)->length;
    for (const uint8_t *at = madt + 44; at < end; at += at[1])
        count += at[0] == 0 && get32(at + 4) == 1; /* a local APIC that is enabled */
    return count;
}

static void print_generation(const uint32_t *id)
{
    PRINT("generation ID ");
    for (int i = 3; i >= 0; i--) {
        console_hex(id[i], 8);
        PRINT(" ");
    }
    PRINT("\n");
}

static int watch(const uint8_t *fadt, const volatile uint32_t *id)
{
    uint32_t before[4], now[4];
    uint16_t gpe = (uint16_t)get32(fadt + FADT_GPE0);
    bool same = true;
    for (int i = 0; i < 4; i++)
        before[i] = id[i];
    print_generation(before);
    while (!(inb(gpe) & 1 << WATCHED_EVENT))
        ;
    for (int i = 0; i < 4; i++) {
        now[i] = id[i];
        same = same && now[i] == before[i];
    }
    print_generation(now);
    if (same)
        fail("the event came, and the generation ID is the same");
    return 0;
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes;
    const struct rsdp *rsdp = find_rsdp();
    const struct table *xsdt = checked(rsdp->xsdt);
    const uint8_t *fadt = find_table(xsdt, NAME('F', 'A', 'C', 'P'));
    const uint8_t *madt = find_table(xsdt, NAME('A', 'P', 'I', 'C'));
    const uint8_t *dsdt = (const uint8_t *)checked(get32(fadt + FADT_DSDT));
    if (count_cpus(madt) != vcpus)
        fail("the MADT has another number of vCPUs");
    PRINT("vCPUs: ");
    console_decimal(vcpus);
    PRINT("\n");

    uint16_t timer = (uint16_t)get32(fadt + FADT_PM_TMR);
    uint32_t before = inl(timer);
    while (inl(timer) == before)
        ;
    PRINT("the timer counts\n");

    if (cmdline_has(cmdline, "watch"))
        return watch(fadt,
                     (const volatile uint32_t *)(uintptr_t)aml_integer(find_package(dsdt, NAME('A', 'D', 'D', 'R'))));
    if (cmdline_has(cmdline, "reset")) {
        outb((uint16_t)get32(fadt + FADT_RESET_PORT), fadt[FADT_RESET_VALUE]);
        fail("still here after the reset");
    }
    if (cmdline_has(cmdline, "panic"))
        outb(0x505, 1);
    uint32_t type = aml_integer(find_package(dsdt, NAME('_', 'S', '5', '_')));
    PRINT("switching off\n");
    outw((uint16_t)get32(fadt + FADT_PM1A_CNT), (uint16_t)(type << SLP_TYP_SHIFT | SLP_EN));
    fail("still here after S5");
}

/* SPDX-License-Identifier: MIT
 *
 * multiboot: a 32-bit multiboot kernel that prints what its loader and the firmware configuration tell it: command line,
 * memory map, modules, number of vCPUs. It looks for the MP table and into the BIOS data area too. Status 1 where they
 * disagree or something that is promised is missing; with the word `panic` on its command line it ends as a kernel that panics does, by port 0x505.
 */
#include "guest32.h"

/* Multiboot Specification 0.6.96, "Boot information format". */
struct info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, symbols[4];
    uint32_t mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name;
};

struct module {
    uint32_t start, end, string, reserved;
};

struct area {
    uint32_t entry_size;
    uint64_t address, size;
    uint32_t type;
} __attribute__((packed));

enum { BOOTED = 0x2badb002, WANTED = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9, RAM = 1, PANIC_PORT = 0x505 };

/* Words of the BIOS data area: port of COM1; segment of the extended area; equipment; KiB of low memory. */
enum { BIOS_COM1 = 0x400, BIOS_EBDA = 0x40e, BIOS_EQUIPMENT = 0x410, BIOS_LOW_KIB = 0x413, COM1_PORT = 0x3f8 };

/* Intel, MultiProcessor Specification 1.4, chapter 4. */
struct mp_pointer {
    uint32_t signature, table;
    uint8_t paragraphs, revision, sum, features[5];
};

struct mp_table {
    uint32_t signature;
    uint16_t length;
    uint8_t revision, sum, oem[20];
    uint32_t oem_table;
    uint16_t oem_size, entries;
    uint32_t local_apic, reserved;
};

/* A word of the BIOS data area, which is below where the compiler believes that anything is. */
static uint16_t bios_data(uint32_t address)
{
    uint16_t word;
    __asm__ volatile("movw (%1), %0" : "=r"(word) : "r"(address));
    return word;
}

static int fails(const char *why)
{
    PRINT("multiboot: ");
    console_string(why);
    PRINT("\n");
    return 1;
}

static bool sums_up(const void *bytes, uint32_t size)
{
    return sum_of(bytes, size) % 256 == 0;
}

/* How many processors the MP table has that can be used; -1 where there is none, or none that is right. */
static int mp_processors(void)
{
    for (uint32_t at = 0xf0000; at < 0x100000; at += 16) {
        const struct mp_pointer *pointer = (const struct mp_pointer *)at;
        if (pointer->signature != 0x5f504d5f) /* "_MP_" */
            continue;
        const struct mp_table *table = (const struct mp_table *)pointer->table;
        if (!sums_up(pointer, 16) || table->signature != 0x504d4350 || !sums_up(table, table->length)) /* "PCMP" */
            return -1;
        const uint8_t *entry = (const uint8_t *)(table + 1);
        int count = 0;
        for (uint32_t i = 0; i < table->entries; i++) {
            count += entry[0] == 0 && entry[3] & 1;
            entry += entry[0] == 0 ? 20 : 8;
        }
        return entry == (const uint8_t *)table + table->length ? count : -1;
    }
    return -1;
}

/* Whether the firmware configuration has the loader's command line, without the image's name. */
static bool fw_cfg_has_line(const char *line)
{
    while (*line && *line != ' ')
        line++;
    line += *line == ' ';
    uint32_t size = (uint32_t)fw_cfg(FW_CFG_CMDLINE_SIZE, 4);
    outw(FW_CFG_SELECTOR, FW_CFG_CMDLINE);
    for (uint32_t i = 0; i < size; i++) /* with the NUL */
        if ((char)inb(FW_CFG_DATA) != line[i])
            return false;
    return size > 0 && !line[size - 1];
}

/* The size of a file in the firmware configuration; 0 where there is none of that name. */
static uint32_t fw_cfg_file_size(const char *name)
{
    enum { NAME_SIZE = 56 };
    outw(FW_CFG_SELECTOR, FW_CFG_FILES);
    for (uint32_t files = fw_cfg_next(4); files--;) {
        uint32_t size = fw_cfg_next(4);
        const char *at = name;
        bool same = true;
        (void)fw_cfg_next(4);                 /* its key */
        for (int i = 0; i < NAME_SIZE; i++) { /* filled up with NULs */
            same &= (char)inb(FW_CFG_DATA) == *at;
            at += *at != 0;
        }
        if (same)
            return size;
    }
    return 0;
}

int start(uint32_t eax, uint32_t ebx)
{
    const struct info *info = (const struct info *)ebx;
    if (eax != BOOTED)
        return fails("EAX is not what a multiboot loader leaves there");
    if ((info->flags & WANTED) != WANTED)
        return fails("the loader tells too little");

    const char *cmdline = (const char *)info->cmdline;
    PRINT("multiboot: booted by ");
    console_string((const char *)info->boot_loader_name);
    PRINT("\ncommand line: ");
    console_string(cmdline);
    PRINT("\n");

    uint64_t ram = 0;
    uint32_t areas = 0;
    for (uint32_t at = info->mmap_addr; at < info->mmap_addr + info->mmap_length;) {
        const struct area *area = (const struct area *)at;
        PRINT("memory ");
        print_area(area->address, area->size, area->type);
        if (area->type == RAM)
            ram += area->size;
        if (area->address == 0x100000 && area->size >> 10 != info->mem_upper)
            return fails("mem_upper is not what the memory map says");
        at += area->entry_size + sizeof area->entry_size;
        areas++;
    }

    /* A boot loader's trampoline goes below both: there is no memory for it where they are 0. */
    if (bios_data(BIOS_LOW_KIB) != info->mem_lower || bios_data(BIOS_EBDA) != info->mem_lower << 6)
        return fails("the BIOS data area does not say where low memory ends");
    if (bios_data(BIOS_COM1) != COM1_PORT)
        return fails("the BIOS data area knows no serial port");
    if ((bios_data(BIOS_EQUIPMENT) >> 9 & 7) != 1 || bios_data(BIOS_EBDA) << 4 >= 0xa0000)
        return fails("the BIOS data area does not fit the machine");

    const struct module *modules = (const struct module *)info->mods_addr;
    for (uint32_t i = 0; i < info->mods_count; i++) {
        PRINT("module ");
        console_string((const char *)modules[i].string);
        PRINT(": ");
        console_hex(modules[i].end - modules[i].start, 8);
        PRINT(" bytes, sum ");
        console_hex(sum_of((const uint8_t *)modules[i].start, modules[i].end - modules[i].start), 4);
        PRINT("\n");
        if (modules[i].start % PAGE)
            return fails("a module does not begin with a page");
    }

    if (fw_cfg(FW_CFG_SIGNATURE, 4) != 0x554d4551) /* "QEMU" */
        return fails("there is no firmware configuration");
    PRINT("vCPUs: ");
    console_hex(fw_cfg(FW_CFG_NB_CPUS, 2), 2);
    PRINT("\n");
    if (mp_processors() != (int)fw_cfg(FW_CFG_NB_CPUS, 2))
        return fails("the MP table has another number of vCPUs");
    /* The map leaves out what a PC has between 639 KiB and 1 MiB. */
    uint64_t hole = 0x100000 - 639 * 1024;
    if (fw_cfg(FW_CFG_RAM_SIZE, 8) != ram + hole || fw_cfg_file_size("etc/e820") != areas * 20)
        return fails("the memory map and the firmware configuration do not agree");
    if (!fw_cfg_has_line(cmdline))
        return fails("the firmware configuration has another command line");

    if (cmdline_has(cmdline, "panic"))
        outb(PANIC_PORT, 1);
    return 0;
}

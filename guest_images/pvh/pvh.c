/* SPDX-License-Identifier: MIT
 *
 * pvh: a 32-bit PVH kernel that prints what the start info tells it: command line, memory map, modules, and whether the
 * ACPI tables are where it says. Status 1 where something that is promised is missing.
 */
#include "guest32.h"

/* Xen, public/arch-x86/hvm/start_info.h. */
struct start_info {
    uint32_t magic, version, flags, modules;
    uint64_t module_list, cmdline, rsdp, memory_map;
    uint32_t memory_map_entries, reserved;
};

struct module {
    uint64_t address, size, cmdline, reserved;
};

struct area {
    uint64_t address, size;
    uint32_t type, reserved;
};

enum { MAGIC = 0x336ec578 };

static int fails(const char *why)
{
    PRINT("pvh: ");
    console_string(why);
    PRINT("\n");
    return 1;
}

int start(uint32_t eax, uint32_t ebx)
{
    (void)eax;
    const struct start_info *info = (const struct start_info *)ebx;
    if (info->magic != MAGIC || info->version < 1)
        return fails("EBX points to no start info with a memory map");
    PRINT("pvh: started\ncommand line: ");
    console_string((const char *)(uint32_t)info->cmdline);
    PRINT("\n");

    const struct area *areas = (const struct area *)(uint32_t)info->memory_map;
    for (uint32_t i = 0; i < info->memory_map_entries; i++) {
        PRINT("memory ");
        print_area(areas[i].address, areas[i].size, areas[i].type);
    }
    const struct module *modules = (const struct module *)(uint32_t)info->module_list;
    for (uint32_t i = 0; i < info->modules; i++) {
        PRINT("module ");
        console_string(modules[i].cmdline ? (const char *)(uint32_t)modules[i].cmdline : "without a string");
        PRINT(": ");
        console_hex(modules[i].size, 8);
        PRINT(" bytes, sum ");
        console_hex(sum_of((const uint8_t *)(uint32_t)modules[i].address, (uint32_t)modules[i].size), 4);
        PRINT("\n");
    }
    static const char signature[] = "RSD PTR ";
    for (uint32_t i = 0; i < sizeof signature - 1; i++)
        if (((const char *)(uint32_t)info->rsdp)[i] != signature[i])
            return fails("there are no ACPI tables where the start info says");
    PRINT("ACPI tables at ");
    console_hex(info->rsdp, 8);
    PRINT("\n");
    return 0;
}

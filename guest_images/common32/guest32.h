/* SPDX-License-Identifier: MIT
 *
 * What the 32-bit guests share beyond common/guest.h, of which they use the console and the ports.
 */
#ifndef GUEST32_H
#define GUEST32_H

#include "guest.h"

/* Every 32-bit guest defines this; what it returns is its exit status. EAX and EBX as the loader left them. */
int start(uint32_t eax, uint32_t ebx);

static inline void outw(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

/* Firmware configuration: its items' keys, and its ports: for a key, and for the item's bytes, one after the other. */
enum {
    FW_CFG_SIGNATURE = 0,
    FW_CFG_RAM_SIZE = 3,
    FW_CFG_NB_CPUS = 5,
    FW_CFG_CMDLINE_SIZE = 0x14,
    FW_CFG_CMDLINE = 0x15,
    FW_CFG_FILES = 0x19,
    FW_CFG_SELECTOR = 0x510,
    FW_CFG_DATA = 0x511,
};

/* The first `size` bytes, at most 8, of an item, as a little-endian number. */
static inline uint64_t fw_cfg(uint16_t key, int size)
{
    uint64_t value = 0;
    outw(FW_CFG_SELECTOR, key);
    for (int i = 0; i < size; i++)
        value |= (uint64_t)inb(FW_CFG_DATA) << (8 * i);
    return value;
}

/* The next `size` bytes of the item, at most 4, as a big-endian number. */
static inline uint32_t fw_cfg_next(int size)
{
    uint32_t value = 0;
    while (size--)
        value = value << 8 | inb(FW_CFG_DATA);
    return value;
}

/* "0xADDRESS + 0xSIZE type T", and the line's end. */
static inline void print_area(uint64_t address, uint64_t size, uint32_t type)
{
    console_hex(address, 10);
    PRINT(" + ");
    console_hex(size, 10);
    PRINT(" type ");
    console_hex(type, 2);
    PRINT("\n");
}

/* The sum of the bytes, modulo 65536: shows that a module has come whole. */
static inline uint32_t sum_of(const uint8_t *bytes, uint32_t size)
{
    uint32_t sum = 0;
    while (size--)
        sum += *bytes++;
    return sum & 0xffff;
}

#endif

/* SPDX-License-Identifier: MIT
 *
 * cpuid: proves what a guest reads. It executes CPUID for every leaf and subleaf and prints the answers as `cpuid -r`
 * does, after a comment line that says at which privilege level it asked:
 *
 *     # CPL 0
 *     CPU 0:
 *        0x00000000 0x00: eax=0x00000010 ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
 *
 * With the word `cpl3` on the command line it asks at CPL 3, where a program would.
 */
#include "cpuid.h"

NOTE_USER_MODE("cpl3");

USER_DATA static struct answers answers;

/* One line; only the digits change. */
static char line[] = "   0x???????? 0x??: eax=0x???????? ebx=0x???????? ecx=0x???????? edx=0x????????\n";
enum { LEAF = 5, SUBLEAF = 16, EAX = 26, EBX = 41, ECX = 56, EDX = 71 };

static void put_pair(size_t at, uint8_t value)
{
    __builtin_memcpy(line + at, &hex_pairs[value], 2);
}

static void put_word(size_t at, uint32_t value)
{
    put_pair(at, (uint8_t)(value >> 24));
    put_pair(at + 2, (uint8_t)(value >> 16));
    put_pair(at + 4, (uint8_t)(value >> 8));
    put_pair(at + 6, (uint8_t)value);
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes;
    (void)vcpus; /* the others stay where they wait: their answers differ in APIC ids only */

    if (cmdline_has(cmdline, "cpl3")) {
        call_at_cpl3(collect, &answers);
        PRINT("# CPL 3\n");
    } else {
        collect(&answers);
        PRINT("# CPL 0\n");
    }

    PRINT("CPU 0:\n");
    for (const struct answer *answer = answers.list; answer < answers.list + answers.count; answer++) {
        put_word(LEAF, answer->leaf);
        put_pair(SUBLEAF, (uint8_t)answer->subleaf);
        put_word(EAX, answer->registers.eax);
        put_word(EBX, answer->registers.ebx);
        put_word(ECX, answer->registers.ecx);
        put_word(EDX, answer->registers.edx);
        console_write(line, sizeof line - 1);
    }
    if (answers.dropped) {
        PRINT("# no room for ");
        console_decimal(answers.dropped);
        PRINT(" more answers\n");
    }
    return 0;
}

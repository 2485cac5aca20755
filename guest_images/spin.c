/* SPDX-License-Identifier: MIT
 *
 * spin: an endless loop with interrupts off, which makes no exits. It proves that a vCPU can be stopped from outside.
 */
#include "guest.h"

NOTE_USER_MODE("");

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)cmdline;
    (void)ram_bytes;
    (void)vcpus;
    PRINT("spin: for ever\n");
    for (;;)
        __asm__ volatile("");
}

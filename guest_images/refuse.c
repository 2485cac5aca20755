/* SPDX-License-Identifier: MIT
 *
 * refuse: the program that does not adapt. It demands SSE4.2 as CPUID shows it, and ends with status 42 without it.
 * It executes nothing of SSE4.2, so what it proves is what a program is told, on any host.
 */
#include "guest.h"

NOTE_USER_MODE("");

enum { FEATURES = 1, SSE42 = 1 << 20 /* in ECX: SDM Vol. 2, "CPUID" */, REFUSED = 42 };

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)cmdline;
    (void)ram_bytes;
    (void)vcpus;

    struct registers shown;
    cpuid(FEATURES, 0, &shown);
    if (!(shown.ecx & SSE42)) {
        PRINT("refuse: this program needs SSE4.2\n");
        return REFUSED;
    }
    PRINT("refuse: SSE4.2 is here\n");
    return 0;
}

/* SPDX-License-Identifier: MIT
 *
 * hello: proves that an image is loaded where it belongs and that code, stack, constants, the serial port, the
 * command line and the exit status work. It does as little as it can beyond that, so that what it costs to run is
 * what a VM costs.
 */
#include "guest.h"

NOTE_USER_MODE("");

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes;
    (void)vcpus;
    PRINT("hello from a pyhv guest\n");
    if (*cmdline) {
        PRINT("command line: ");
        console_string(cmdline);
        PRINT("\n");
    }
    return 0;
}

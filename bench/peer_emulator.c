/* SPDX-License-Identifier: MIT
 *
 * The bare emulator library: the loop of the row emulator-loop in an engine with nothing attached to it, as the library's
 * own examples use it. argv[1]: the library, which is opened and not linked with.
 */
#include <dlfcn.h>

#include "peer.h"

enum { ARCH_X86 = 4, MODE_64 = 8, PROT_ALL = 7, REG_RCX = 38, CODE = 0x1000 };
static const uint64_t rounds = 50000000; /* of two instructions */

static void *engine;
static int (*start)(void *, uint64_t begin, uint64_t until, uint64_t timeout, size_t count);
static int (*reg_write)(void *, int number, const void *value);

static void *function(void *library, const char *name)
{
    void *address = dlsym(library, name);
    if (!address) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return address;
}

static double sample(const char *request)
{
    (void)request;
    double begin = now_ns();
    if (reg_write(engine, REG_RCX, &rounds) || start(engine, CODE, CODE + 4, 0, 0))
        fatal("uc_emu_start");
    return now_ns() - begin;
}

int main(int argc, char **argv)
{
    static const uint8_t code[] = {0xff, 0xc9, 0x75, 0xfc}; /* again: dec %ecx; jnz again */
    void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!library) {
        fprintf(stderr, "%s\n", argc > 1 ? dlerror() : "which library?");
        return 1;
    }
    int (*open_engine)(int, int, void **) = function(library, "uc_open");
    int (*map)(void *, uint64_t, uint64_t, uint32_t) = function(library, "uc_mem_map");
    int (*write_memory)(void *, uint64_t, const void *, uint64_t) = function(library, "uc_mem_write");
    start = function(library, "uc_emu_start");
    reg_write = function(library, "uc_reg_write");
    if (open_engine(ARCH_X86, MODE_64, &engine) || map(engine, CODE, 0x1000, PROT_ALL) ||
        write_memory(engine, CODE, code, sizeof code))
        fatal("the library");
    return serve(sample);
}

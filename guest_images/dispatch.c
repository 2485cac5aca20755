/* SPDX-License-Identifier: MIT
 *
 * dispatch: the program that adapts. It has a path for each of some features, asks CPUID which of them there are,
 * takes the first, and checks that path's result with the plain one:
 *
 *     dispatch: erms: no, CPUID leaf 0x00000007 EBX bit 9 is 0
 *     dispatch: path sse4.2, CPUID leaf 0x00000001 ECX bit 20 is 1
 *     result 0x000001fc8caa35c4 ok
 *
 * The status is 0, or 1 with `mismatch` in the place of `ok`. Where none is shown the path is `baseline`.
 *
 * The newest goes first: fast REP MOVSB (2012), CRC32 of SSE4.2 (2008), POPCNT (2007). So the first is also one that an
 * interpreting KVM can execute at CPL 0, which it cannot of the others. `path=NAME` on the command line begins the
 * search at that path instead.
 */
#include "guest.h"

NOTE_USER_MODE("");

enum path { ERMS, SSE42, POPCNT, BASELINE, PATHS };

/* Where CPUID shows what a path needs, in subleaf 0 (SDM Vol. 2, "CPUID"). */
static const struct {
    const char *name;
    const char *word; /* of the command line */
    uint32_t leaf;
    bool in_ecx; /* or else in EBX */
    unsigned bit;
} paths[PATHS] = {
    [ERMS] = {"erms", "path=erms", 7, false, 9},
    [SSE42] = {"sse4.2", "path=sse4.2", 1, true, 20},
    [POPCNT] = {"popcnt", "path=popcnt", 1, true, 23},
    [BASELINE] = {.name = "baseline", .word = "path=baseline"},
};

enum { WORDS = 16 };

/* The steps of the digest: in plain code, and as a processor with the feature does it. The latter in assembly,
 * because the compiler has been told to use none of these instructions. */

static void copy(uint64_t *to, const uint64_t *from)
{
    for (int word = 0; word < WORDS; word++)
        to[word] = from[word];
}

static void copy_erms(uint64_t *to, const uint64_t *from)
{
    size_t bytes = WORDS * sizeof *to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

static uint64_t count_ones(uint64_t value)
{
    value -= value >> 1 & 0x5555555555555555;
    value = (value & 0x3333333333333333) + (value >> 2 & 0x3333333333333333);
    value = (value + (value >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return value * 0x0101010101010101 >> 56;
}

static uint64_t count_ones_popcnt(uint64_t value)
{
    uint64_t count;
    __asm__("popcnt %1, %0" : "=r"(count) : "r"(value) : "cc");
    return count;
}

/* CRC-32C of eight bytes, least significant first: the polynomial 0x11edc6f41, its bits reversed. */
static uint64_t crc32c(uint64_t crc, uint64_t value)
{
    crc ^= value;
    for (int bit = 0; bit < 64; bit++)
        crc = crc >> 1 ^ (-(crc & 1) & 0x82f63b78);
    return crc;
}

static uint64_t crc32c_sse42(uint64_t crc, uint64_t value)
{
    __asm__("crc32q %1, %0" : "+r"(crc) : "r"(value));
    return crc;
}

/* The number of ones in some words, above their CRC-32C. */
static uint64_t digest(enum path path)
{
    uint64_t data[WORDS], copied[WORDS];
    uint64_t value = 0x0123456789abcdef;
    for (int word = 0; word < WORDS; word++) {
        data[word] = value;
        value = value * 6364136223846793005 + 1442695040888963407; /* Knuth's generator: any data will do */
    }

    if (path == ERMS)
        copy_erms(copied, data);
    else
        copy(copied, data);

    uint64_t ones = 0, crc = 0xffffffff;
    for (int word = 0; word < WORDS; word++) {
        ones += path == POPCNT ? count_ones_popcnt(copied[word]) : count_ones(copied[word]);
        crc = path == SSE42 ? crc32c_sse42(crc, copied[word]) : crc32c(crc, copied[word]);
    }
    return ones << 32 | (crc ^ 0xffffffff);
}

static bool is_shown(enum path path)
{
    struct registers answer;
    cpuid(0, 0, &answer);
    if (answer.eax < paths[path].leaf)
        return false; /* beyond the last leaf an Intel processor repeats that one */
    cpuid(paths[path].leaf, 0, &answer);
    return (paths[path].in_ecx ? answer.ecx : answer.ebx) >> paths[path].bit & 1;
}

static void print_bit(enum path path)
{
    PRINT(", CPUID leaf ");
    console_hex(paths[path].leaf, 8);
    if (paths[path].in_ecx)
        PRINT(" ECX bit ");
    else
        PRINT(" EBX bit ");
    console_decimal(paths[path].bit);
}

static enum path choose(enum path first)
{
    for (enum path path = first; path < BASELINE; path++) {
        if (is_shown(path)) {
            PRINT("dispatch: path ");
            console_string(paths[path].name);
            print_bit(path);
            PRINT(" is 1\n");
            return path;
        }
        PRINT("dispatch: ");
        console_string(paths[path].name);
        PRINT(": no");
        print_bit(path);
        PRINT(" is 0\n");
    }
    PRINT("dispatch: path baseline, which needs nothing\n");
    return BASELINE;
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)ram_bytes;
    (void)vcpus;

    enum path first = ERMS;
    if (cmdline_value(cmdline, "path=")) {
        while (first < PATHS && !cmdline_has(cmdline, paths[first].word))
            first++;
        if (first == PATHS) {
            PRINT("dispatch: there are path=erms, path=sse4.2, path=popcnt and path=baseline\n");
            return 2;
        }
    }

    uint64_t result = digest(choose(first));
    bool ok = result == digest(BASELINE);
    PRINT("result ");
    console_hex(result, 16);
    if (ok)
        PRINT(" ok\n");
    else
        PRINT(" mismatch\n");
    return !ok;
}

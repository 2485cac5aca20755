/* SPDX-License-Identifier: MIT
 *
 * ticker: the program that notices. It counts rounds for ever, and in each of them
 *
 *   - checks that every page of its memory has the stamp of the round before, and stamps it with this round's,
 *   - reads CPUID again and checks that nothing it sees has changed since the start,
 *   - checks that the TSC has not gone back, every 16 pages.
 *
 * So it proves that a VM that was paused, saved, restored or moved has lost nothing. The first thing that is wrong is
 * reported in one line that begins with `ticker: `, and ends the guest with status 1. A line `ticker: round N` comes
 * about once a second (every 2.5 billion TSC ticks).
 *
 *     pages=N   stamp N pages (default: all RAM from 2 MiB up, as far as the start state tells of it)
 *     every=N   print a line every N rounds instead of by the TSC
 *     rounds=N  end with status 0 after N rounds
 *
 * A stamp is made so that not only a stale page is found, but also one that got another's contents: 16 pages make a
 * block; page P (address / 4096) has its stamp at byte 8 * (P % 16), where no other page of its block has one, and the
 * stamp is ROUND << 32 | (P - P % 16). At any moment each page has the stamp of one of two successive rounds (0: no
 * stamp yet), and those of the later one come first. In the first round the pages are expected to be zero, as the
 * start state promises.
 */
#include "guest.h"

NOTE_USER_MODE("");

enum { BLOCK = 16 };
static const uint64_t first_byte = 0x200000, ticks_a_line = 2500000000;

/* What a program looks at, and what a VMM is tempted to make up anew for each host. */
static const struct {
    uint32_t leaf, subleaf;
} questions[] = {
    {0, 0},          {1, 0},          {7, 0},          {7, 1},          {0xd, 0},        {0xd, 1},
    {0x40000000, 0}, {0x40000001, 0}, {0x80000000, 0}, {0x80000001, 0}, {0x80000007, 0}, {0x80000008, 0},
};
enum { QUESTIONS = sizeof questions / sizeof *questions };
static struct registers at_start[QUESTIONS];

static uint64_t last_tsc;

static uint64_t read_tsc(void)
{
    uint64_t tsc = rdtsc();
    if (tsc < last_tsc) {
        PRINT("ticker: the TSC went back from ");
        console_hex(last_tsc, 16);
        PRINT(" to ");
        console_hex(tsc, 16);
        PRINT("\n");
        guest_exit(1);
    }
    last_tsc = tsc;
    return tsc;
}

static void check_register(int question, const char *name, uint32_t was, uint32_t is)
{
    if (was == is)
        return;
    PRINT("ticker: CPUID leaf ");
    console_hex(questions[question].leaf, 8);
    PRINT(" subleaf ");
    console_hex(questions[question].subleaf, 2);
    console_string(name);
    console_hex(was, 8);
    PRINT(", is ");
    console_hex(is, 8);
    PRINT("\n");
    guest_exit(1);
}

static void check_cpuid(void)
{
    for (int question = 0; question < QUESTIONS; question++) {
        const struct registers *was = &at_start[question];
        struct registers is;
        cpuid(questions[question].leaf, questions[question].subleaf, &is);
        check_register(question, " EAX was ", was->eax, is.eax);
        check_register(question, " EBX was ", was->ebx, is.ebx);
        check_register(question, " ECX was ", was->ecx, is.ecx);
        check_register(question, " EDX was ", was->edx, is.edx);
    }
}

/* `word` is where a page's stamp should be and is not. */
static _Noreturn void report_page(const uint64_t *word, uint64_t round)
{
    uint64_t address = (uintptr_t)word & ~(uint64_t)(PAGE - 1);
    uint32_t block = (uint32_t)(address / PAGE) & -(uint32_t)BLOCK;
    uint64_t found = *word;
    PRINT("ticker: page ");
    console_hex(address, 16);
    PRINT(" holds ");
    console_decimal(found >> 32);
    PRINT(", expected ");
    console_decimal(round - 1);
    if (found && (uint32_t)found != block) {
        PRINT(", in the stamp of block ");
        console_hex((uint64_t)(uint32_t)found * PAGE, 16);
    }
    PRINT("\n");
    guest_exit(1);
}

static uint64_t *stamp_of(uint64_t block, uint64_t slot)
{
    return (uint64_t *)(block + slot * (PAGE + sizeof(uint64_t)));
}

/* Does the page hold `expected`? Then it gets `stamp`. */
static bool stamp_page(uint64_t block, uint64_t slot, uint64_t expected, uint64_t stamp)
{
    bool equal;
    __asm__ volatile("cmpxchg %3, %0" : "+m"(*stamp_of(block, slot)), "+a"(expected), "=@ccz"(equal) : "r"(stamp));
    return equal;
}

/* The same for a whole block, in two instructions a page: with tens of thousands of pages that is what a round costs.
 * As long as all is well CMPXCHG leaves RAX as it is, ready for the next page. Returns the slot of the first page that
 * holds something else, or BLOCK. */
static uint64_t stamp_block(uint64_t block, uint64_t expected, uint64_t stamp)
{
    uint32_t slot;
    __asm__ volatile(
        ".set slot, 0\n"
        ".rept %c[block_pages]\n"
        "cmpxchg %[stamp], slot * %c[distance](%[block])\n"
        "jne 1f\n"
        ".subsection 1\n"
        "1: mov $slot, %[slot]\n"
        "jmp 2f\n"
        ".previous\n"
        ".set slot, slot + 1\n"
        ".endr\n"
        "mov %[block_pages], %[slot]\n"
        "2:\n"
        : [slot] "=r"(slot), "+a"(expected)
        : [block] "r"(block), [stamp] "r"(stamp), [block_pages] "i"(BLOCK), [distance] "i"(PAGE + sizeof(uint64_t))
        : "cc", "memory");
    return slot;
}

/* Checks and stamps `pages` pages from first_byte on. */
static void stamp_pages(uint64_t pages, uint64_t round)
{
    uint64_t block = first_byte, slot;
    uint64_t stamp = round << 32 | first_byte / PAGE;
    uint64_t expected = round == 1 ? 0 : stamp - (1ull << 32);
    uint64_t step = round == 1 ? 0 : BLOCK;

    for (uint64_t blocks = pages / BLOCK; blocks; blocks--) {
        slot = stamp_block(block, expected, stamp);
        if (slot < BLOCK)
            goto wrong;
        block += BLOCK * PAGE;
        stamp += BLOCK;
        expected += step;
        /* Here too: a TSC that goes back by less than a whole round takes would be missed. */
        read_tsc();
    }
    for (slot = 0; slot < pages % BLOCK; slot++)
        if (!stamp_page(block, slot, expected, stamp))
            goto wrong;
    return;
wrong:
    report_page(stamp_of(block, slot), round);
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)vcpus;

    uint64_t room = ram_bytes > first_byte ? (ram_bytes - first_byte) / PAGE : 0;
    uint64_t pages = cmdline_number(cmdline, "pages=", room);
    uint64_t every = cmdline_number(cmdline, "every=", 0);
    uint64_t rounds = cmdline_number(cmdline, "rounds=", 0);
    if (pages > room) {
        PRINT("ticker: pages=");
        console_decimal(pages);
        PRINT(": there is room for ");
        console_decimal(room);
        PRINT("\n");
        return 2;
    }
    PRINT("ticker: ");
    console_decimal(pages);
    PRINT(" pages from ");
    console_hex(first_byte, 8);
    PRINT("\n");

    for (int question = 0; question < QUESTIONS; question++)
        cpuid(questions[question].leaf, questions[question].subleaf, &at_start[question]);

    uint64_t line_at = read_tsc() + ticks_a_line;
    for (uint64_t round = 1;; round++) {
        stamp_pages(pages, round);
        check_cpuid();
        uint64_t tsc = read_tsc();
        if (every ? round % every == 0 : tsc >= line_at) {
            PRINT("ticker: round ");
            console_decimal(round);
            PRINT("\n");
            line_at = tsc + ticks_a_line;
        }
        if (round == rounds) {
            PRINT("ticker: done, all was well\n");
            return 0;
        }
    }
}

/* SPDX-License-Identifier: MIT
 *
 * What every guest shares: the entry point, the console, the command line, CPUID, exceptions, the ELF notes.
 *
 * The start state is described in README.md. An interpreting KVM needs about a microsecond for an instruction
 * at CPL 0 and knows no SSE and no x87, so this code is integer-only and counts instructions. KVM makes one exit of
 * every byte on the serial port, also of those of a REP OUTSB, which saves the instructions of a loop around them:
 * short messages are cheap messages.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PAGE = 4096 };

/* ----------------------------------------------------------------------------------- start and end, start.S -- */

/* Every guest defines this; what it returns is its exit status. `cmdline` is NUL-terminated. */
int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus);

/* Ends the VM with this status. */
_Noreturn void guest_exit(int status);

/* ------------------------------------------------------------------------------------ console, console.c -- */

/* The two ASCII digits of every byte, lower case, as they lie in memory. */
extern const uint16_t hex_pairs[256];

void console_write(const char *text, size_t length);
void console_string(const char *text); /* NUL-terminated */
void console_decimal(uint64_t value);
void console_hex(uint64_t value, int digits); /* "0x" and exactly this many digits, an even number up to 16 */

/* A literal's length is known: no search for its end. */
#define PRINT(literal) console_write(literal, sizeof(literal "") - 1)

/* --------------------------------------------------------------------------------- command line, cmdline.c -- */

/* Is `word` one of the words? Words are separated by spaces and tabs and by nothing else: a loader that splits at
 * any white space sees every word that the guest sees, so the "user mode" note (below) stays sound. */
bool cmdline_has(const char *cmdline, const char *word);

/* The text after `prefix` in the first word that begins with it, up to the next blank (or the end); or NULL. */
const char *cmdline_value(const char *cmdline, const char *prefix);

/* The decimal number after `prefix` ("rounds="), or `fallback` where no word has it. A value that is no number below
 * 2^63 is reported on the console and ends the guest with status 2. */
uint64_t cmdline_number(const char *cmdline, const char *prefix, uint64_t fallback);

/* -------------------------------------------------------------------------------------------- CPUID, cpuid.S -- */

struct registers {
    uint32_t eax, ebx, ecx, edx;
};

/* The one CPUID instruction of every image. Callable at CPL 3 too. */
void cpuid(uint32_t leaf, uint32_t subleaf, struct registers *answer);

/* -------------------------------------------------------------------- exceptions, exceptions.c and vectors.S -- */

/* What the handler gets: the frame that the processor pushed, above it what vectors.S added. */
struct exception {
    uint64_t rax; /* as the interrupted code left it */
    uint64_t vector;
    uint64_t error_code; /* 0 for the vectors that have none */
    uint64_t rip, cs, rflags, rsp, ss;
};

/* Loads an IDT with a gate for each of the 32 exception vectors. Until then an exception is a triple fault. */
void exceptions_init(void);

/* Where every exception ends. The common one calls exception_report(); a guest may define its own. */
_Noreturn void exception_handler(const struct exception *exception);

/* Names the exception on the console and ends the guest with status EXCEPTION_STATUS + vector. */
_Noreturn void exception_report(const struct exception *exception);
enum { EXCEPTION_STATUS = 64 };

/* ------------------------------------------------------------------------------------ processor and ports -- */

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/* ---------------------------------------------------------------------------------------- code for CPL 3 -- */

/* The linker script keeps these on pages of their own, between user_text_start and user_text_end and between
 * user_data_start and user_data_end, so that a guest may map them for CPL 3. Code there must not touch anything else:
 * the compiler is told to make no jump tables and no constant arrays of its own (build.py). */
#define USER_TEXT __attribute__((section(".user.text")))
#define USER_DATA __attribute__((section(".user.bss")))
extern char user_text_start[], user_text_end[], user_data_start[], user_data_end[];

/* ---------------------------------------------------------------------------------------------- ELF notes -- */

/* "User mode": this guest leaves CPL 0 only when its command line has this word; with "" it never does. */
#define NOTE_USER_MODE(word)                          \
    __asm__(".pushsection .note.pyhv, \"a\", @note\n" \
            ".balign 4\n"                             \
            ".long 5, 2f - 1f, 2\n"                   \
            ".asciz \"pyhv\"\n"                       \
            ".balign 4\n"                             \
            "1: .asciz \"" word "\"\n"                \
            "2: .balign 4\n"                          \
            ".popsection\n")

/* "PC": this guest wants a PC's timer, devices and ACPI tables, which images with notes do not get otherwise. */
#define NOTE_PC                                       \
    __asm__(".pushsection .note.pyhv, \"a\", @note\n" \
            ".balign 4\n"                             \
            ".long 5, 0, 3\n"                         \
            ".asciz \"pyhv\"\n"                       \
            ".balign 4\n"                             \
            ".popsection\n")

#endif

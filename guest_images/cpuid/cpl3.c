/* SPDX-License-Identifier: MIT
 *
 * Running a function at CPL 3.
 *
 * At the start all memory is for the supervisor only. The first 2 MiB, where the image is, get a page table instead
 * of their one large page, in which the pages of USER_TEXT (read-only) and USER_DATA have the user bit, and only these.
 */
#include "cpuid.h"

enum { PRESENT = 1, WRITABLE = 2, USER = 4, ENTRIES = 512 };

/* README.md: where the first entries of the paging structures are. */
static uint64_t *const pml4 = (uint64_t *)0x2000, *const pdpt = (uint64_t *)0x3000, *const pd = (uint64_t *)0x4000;

static uint64_t page_table[ENTRIES] __attribute__((aligned(PAGE)));

USER_DATA static char user_stack[PAGE] __attribute__((aligned(16)));

extern const char user_end[];
void enter_cpl3(void (*function)(struct answers *), struct answers *argument, void *stack_top);
_Noreturn void leave_cpl3(void);

static void map_range(char *start, char *end, uint64_t bits)
{
    for (uintptr_t address = (uintptr_t)start; address < (uintptr_t)end; address += PAGE)
        page_table[address / PAGE] = address | bits;
}

void call_at_cpl3(void (*function)(struct answers *), struct answers *argument)
{
    map_range(0, (char *)((uintptr_t)ENTRIES * PAGE), PRESENT | WRITABLE);
    map_range(user_text_start, user_text_end, PRESENT | USER);
    map_range(user_data_start, user_data_end, PRESENT | WRITABLE | USER);
    /* The user bit counts where every level has it; the rest of the memory still lacks it in its large pages. */
    pml4[0] |= USER;
    pdpt[0] |= USER;
    pd[0] = (uintptr_t)page_table | PRESENT | WRITABLE | USER;
    __asm__ volatile("mov %0, %%cr3" : : "r"(pml4) : "memory"); /* forget the large page */

    exceptions_init();
    enter_cpl3(function, argument, user_stack + sizeof user_stack);
}

void exception_handler(const struct exception *exception)
{
    if (exception->vector == 6 && exception->rip == (uintptr_t)user_end)
        leave_cpl3();
    exception_report(exception);
}

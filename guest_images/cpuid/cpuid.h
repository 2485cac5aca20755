/* SPDX-License-Identifier: MIT */
#ifndef CPUID_H
#define CPUID_H

#include "guest.h"

struct answer {
    uint32_t leaf, subleaf;
    struct registers registers;
};

/* The bundled profiles and every processor that was looked at need fewer than 100 answers. */
enum { MAX_ANSWERS = 512 };

struct answers {
    uint32_t count;
    uint32_t dropped; /* questions that were not asked for want of room */
    struct answer list[MAX_ANSWERS];
};

/* collect.c: asks for every leaf and subleaf that the answers themselves announce. Runs at CPL 0 or CPL 3. */
void collect(struct answers *answers);

/* cpl3.c: calls function(argument) at CPL 3 and comes back to CPL 0. Both must lie in USER_TEXT and USER_DATA. Once. */
void call_at_cpl3(void (*function)(struct answers *), struct answers *argument);

#endif

/* SPDX-License-Identifier: MIT
 *
 * Random numbers for tests: the same in every run, unless the program sets another seed, which it then prints.
 */
#ifndef RANDOM_H
#define RANDOM_H

#include <stdint.h>
#include <string.h>

static uint64_t random_state = 88172645463325252u; /* never 0, where xorshift stays for good */

static inline uint64_t random64(void)
{
    random_state ^= random_state << 13; /* xorshift64 */
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static inline uint32_t random32(void)
{
    return (uint32_t)(random64() >> 16);
}

/* No 8 bytes of it are zeros. */
static inline void fill_random(uint8_t *at, size_t size)
{
    for (size_t i = 0; i < size; i += 8) {
        uint64_t value = random64() | 1;
        memcpy(at + i, &value, size - i < 8 ? size - i : 8);
    }
}

#endif

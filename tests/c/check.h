/* SPDX-License-Identifier: MIT
 *
 * What the C tests share: a failed check says where and goes on; check_report() is main's last word.
 */
#ifndef PYHV_TESTS_CHECK_H
#define PYHV_TESTS_CHECK_H

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static unsigned check_count, check_failures;

#define CHECK(condition)                                                            \
    do {                                                                            \
        check_count++;                                                              \
        if (!(condition)) {                                                         \
            check_failures++;                                                       \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                           \
    } while (0)

#define CHECK_EQUAL(got, expected)                                                                              \
    do {                                                                                                        \
        uint64_t check_got = (uint64_t)(got), check_expected = (uint64_t)(expected);                            \
        check_count++;                                                                                          \
        if (check_got != check_expected) {                                                                      \
            check_failures++;                                                                                   \
            fprintf(stderr, "%s:%d: %s: expected 0x%" PRIx64 ", got 0x%" PRIx64 "\n", __FILE__, __LINE__, #got, \
                    check_expected, check_got);                                                                 \
        }                                                                                                       \
    } while (0)

/* The exit status of the test program. */
static inline int check_report(const char *name)
{
    printf("%s: %u checks, %u failed\n", name, check_count, check_failures);
    return check_failures != 0;
}

#endif

/* SPDX-License-Identifier: MIT
 *
 * What the fuzz_*.c programs share. Each defines LLVMFuzzerTestOneInput(), which is all that libFuzzer needs:
 *
 *   clang -std=c11 -D_GNU_SOURCE -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc \
 *         tests/c/fuzz_NAME.c csrc/[a-z]*.c csrc/devices/[a-z]*.c -lpthread -o fuzz && ./fuzz -max_len=8192
 *
 * With gcc, which has no fuzzer, add -DPYHV_FUZZ_MAIN and leave out "fuzzer,": the program then makes its own inputs.
 *
 *   ./fuzz [SECONDS [SEED]]     prints the seed; the same seed gives the same inputs
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define REQUIRE(condition)                                                                 \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                       \
        }                                                                                  \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#ifdef PYHV_FUZZ_MAIN
#include <inttypes.h>
#include <time.h>
#include <unistd.h>

#include "random.h"

/* Tries inputs until the time is over. make: puts an input into the buffer `input`, and returns its size. */
static inline int fuzz(int argc, char **argv, uint8_t *input, size_t (*make)(uint8_t *input))
{
    double seconds = argc > 1 ? atof(argv[1]) : 5;
    random_state = argc > 2 ? strtoull(argv[2], NULL, 0) : (uint64_t)time(NULL) << 20 | (uint64_t)getpid();
    if (random_state == 0)
        random_state = 1;
    printf("%s: seed 0x%" PRIx64 ", %g s\n", argv[0], random_state, seconds);
    fflush(stdout);

    struct timespec start, now;
    uint64_t inputs = 0;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        size_t size = make(input);
        LLVMFuzzerTestOneInput(input, size);
        inputs++;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - start.tv_sec) + (double)(now.tv_nsec - start.tv_nsec) / 1e9 < seconds);
    printf("%s: %" PRIu64 " inputs, nothing found\n", argv[0], inputs);
    return 0;
}
#endif

#endif

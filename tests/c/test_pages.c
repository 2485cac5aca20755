/* SPDX-License-Identifier: MIT
 *
 * pages.c: checksums against published values, and saving and verifying memory against a plain model of both, with
 * every system call failing in turn. The file is included here so that its calls can be made to fail.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "random.h"

/* ------------------------------------------------------------------------------- system calls that can fail -- */

/* What happens to one kind of call: from call number `from` on (0: the first), `times` of them fail or do less. */
struct fault {
    int from, times;
    int errnum;        /* fails with it, unless it is 0 */
    size_t limit;      /* otherwise: moves at most so many bytes */
    _Atomic int calls; /* of both threads */
};
static struct fault pwrite_fault, pread_fault, lseek_fault, create_fault, ftruncate_fault;

static const struct fault never = {.from = INT_MAX};

static void no_faults(void)
{
    pwrite_fault = pread_fault = lseek_fault = create_fault = ftruncate_fault = never;
}

static bool strikes(struct fault *fault)
{
    int call = fault->calls++;
    return call >= fault->from && call - fault->from < fault->times;
}

static ssize_t faulty_pwrite(int fd, const void *data, size_t size, off_t offset)
{
    if (strikes(&pwrite_fault)) {
        if (pwrite_fault.errnum) {
            errno = pwrite_fault.errnum;
            return -1;
        }
        if (size > pwrite_fault.limit)
            size = pwrite_fault.limit;
        if (!size)
            return 0;
    }
    return pwrite(fd, data, size, offset);
}

static ssize_t faulty_pread(int fd, void *data, size_t size, off_t offset)
{
    if (strikes(&pread_fault)) {
        if (pread_fault.errnum) {
            errno = pread_fault.errnum;
            return -1;
        }
        if (size > pread_fault.limit)
            size = pread_fault.limit;
        if (!size)
            return 0;
    }
    return pread(fd, data, size, offset);
}

static off_t faulty_lseek(int fd, off_t offset, int whence)
{
    if (strikes(&lseek_fault)) {
        errno = lseek_fault.errnum;
        return -1;
    }
    return lseek(fd, offset, whence);
}

static int faulty_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                                 void *with)
{
    return strikes(&create_fault) ? create_fault.errnum : pthread_create(thread, attributes, start, with);
}

static int faulty_ftruncate(int fd, off_t size)
{
    if (strikes(&ftruncate_fault)) {
        errno = ftruncate_fault.errnum;
        return -1;
    }
    return ftruncate(fd, size);
}

#define pwrite         faulty_pwrite
#define pread          faulty_pread
#define lseek          faulty_lseek
#define pthread_create faulty_pthread_create
#define ftruncate      faulty_ftruncate
#include "memory/pages.c"
#undef pwrite
#undef pread
#undef lseek
#undef pthread_create
#undef ftruncate

/* ------------------------------------------------------------------------------------------------- helpers -- */

#define PAGE       ((size_t)PYHV_PAGE_SIZE)
#define CHUNK      ((size_t)PYHV_CHUNK_SIZE)
#define OUT_OFFSET (3 * PAGE)
#define MAX_CHUNKS 40

static struct pyhv_error error;
static uint64_t sums[MAX_CHUNKS];

static int new_file(size_t size)
{
    int fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static uint64_t blocks(int fd)
{
    struct stat file;
    CHECK_EQUAL(fstat(fd, &file), 0);
    return (uint64_t)file.st_blocks * 512;
}

static int open_files(void)
{
    int count = 0;
    for (int fd = 0; fd < 256; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* A page of guest RAM at `page` gets something; `kind` 0: random bytes, 1: zeros (touched all the same), 2: one bit. */
static void touch(int fd, size_t page, int kind)
{
    uint8_t data[PYHV_PAGE_SIZE] = {0};
    if (kind == 0)
        fill_random(data, sizeof data);
    else if (kind == 2)
        data[random64() % sizeof data] = (uint8_t)(1u << random64() % 8);
    CHECK_EQUAL(pwrite(fd, data, sizeof data, (off_t)(page * PAGE)), sizeof data);
}

/* Whether the file holds `expected`, and `sums` are its sums. */
static bool is_saved(int out, const uint8_t *expected, size_t size)
{
    uint8_t *got = malloc(size + 1);
    bool same = got && pread(out, got, size + 1, OUT_OFFSET) == (ssize_t)size && memcmp(got, expected, size) == 0;
    free(got);
    for (size_t at = 0; at < size; at += CHUNK)
        same = same && sums[at / CHUNK] == pyhv_xxh64(expected + at, size - at < CHUNK ? size - at : CHUNK, 0);
    return same;
}

static int verify(int fd, size_t offset, size_t size, uint64_t *bad)
{
    struct pyhv_pages pages = {.fd = fd, .offset = offset, .size = size};
    *bad = UINT64_MAX;
    return pyhv_pages_verify(&pages, sums, bad, &error);
}

/* Saves `size` bytes at `offset` of a file, and checks everything about it: with and without a mapping, at once and in
 * pieces. Returns the bytes of disk that it took. */
static uint64_t check_save_as(int ram, size_t offset, size_t size, bool is_mapped, size_t step)
{
    uint8_t *mapped = is_mapped ? mmap(NULL, size, PROT_READ, MAP_SHARED, ram, (off_t)offset) : NULL;
    struct pyhv_pages pages = {.fd = ram};
    CHECK(mapped != MAP_FAILED);
    uint8_t *expected = malloc(size + 1);
    uint64_t before = blocks(ram), bad;
    int out = new_file(OUT_OFFSET), files = open_files();

    CHECK_EQUAL(pread(ram, expected, size, (off_t)offset), size);
    memset(sums, 0x5a, sizeof sums);
    for (size_t at = 0; at < size; at += step) {
        pages.offset = offset + at;
        pages.size = size - at < step ? size - at : step;
        pages.mapped = mapped ? mapped + at : NULL;
        CHECK_EQUAL(pyhv_pages_save(&pages, out, OUT_OFFSET + at, sums + at / CHUNK, &error), 0);
    }
    CHECK(is_saved(out, expected, size));
    CHECK_EQUAL(blocks(ram), before); /* nothing was allocated by looking at it */
    CHECK_EQUAL(open_files(), files);
    CHECK_EQUAL(verify(out, OUT_OFFSET, size, &bad), 0);
    uint64_t used = blocks(out);
    if (mapped)
        munmap(mapped, size);
    close(out);
    free(expected);
    return used;
}

static uint64_t check_save(int ram, size_t offset, size_t size)
{
    uint64_t used = check_save_as(ram, offset, size, true, size);
    CHECK_EQUAL(check_save_as(ram, offset, size, false, size), used);
    CHECK_EQUAL(check_save_as(ram, offset, size, true, CHUNK), used);
    CHECK_EQUAL(check_save_as(ram, offset, size, false, 3 * CHUNK), used);
    return used;
}

/* ---------------------------------------------------------------------------------------------- checksums -- */

static void test_xxh64(void)
{
    /* The values that the reference implementation checks itself with: bytes of this generator, two seeds. */
    static const struct {
        size_t size;
        uint64_t seed, hash;
    } cases[] = {
        {0, 0, 0xEF46DB3751D8E999},
        {0, 2654435761, 0xAC75FDA2929B17EF},
        {1, 0, 0xE934A84ADB052768},
        {1, 2654435761, 0x5014607643A9B4C3},
        {4, 0, 0x9136A0DCA57457EE},
        {14, 0, 0x8282DCC4994E35C8},
        {14, 2654435761, 0xC3BD6BF63DEB6DF0},
        {222, 0, 0xB641AE8CB691C174},
        {222, 2654435761, 0x20CB8AB7AE10C14A},
    };
    uint8_t data[222];
    uint64_t generator = 2654435761;
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)(generator >> 56);
        generator *= 11400714785074694797u;
    }
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_EQUAL(pyhv_xxh64(data, cases[i].size, cases[i].seed), cases[i].hash);
    CHECK_EQUAL(pyhv_xxh64("a", 1, 0), 0xD24EC4F1A98C6E5B);
    CHECK_EQUAL(pyhv_xxh64("abc", 3, 0), 0x44BC2CF5AD770999);
    /* Unaligned data is the same data. */
    uint8_t moved[sizeof data + 8];
    for (size_t by = 0; by < 8; by++) {
        memcpy(moved + by, data, sizeof data);
        CHECK_EQUAL(pyhv_xxh64(moved + by, sizeof data, 0), 0xB641AE8CB691C174);
    }
    /* Both ways to do the rounds give the same, whichever this processor takes. */
    for (size_t size = 0; size <= sizeof data; size++) {
        uint64_t one[4] = {1, 2, 3, UINT64_MAX}, other[4] = {1, 2, 3, UINT64_MAX};
        xxh64_stripes(one, data, size);
        if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            xxh64_stripes_avx512(other, data, size);
            CHECK(memcmp(one, other, sizeof one) == 0);
        }
    }
}

static void test_is_zero(void)
{
    for (size_t size = 0; size <= 300; size += size < 140 ? 1 : 53) {
        uint8_t *data = calloc(1, size ? size : 1); /* exactly as large, so that the sanitizer sees a step too far */
        CHECK(pyhv_is_zero(data, size));
        for (size_t i = 0; i < size; i++) {
            data[i] = 0x80;
            CHECK(!pyhv_is_zero(data, size));
            data[i] = 0;
        }
        free(data);
    }
    uint8_t page[PYHV_PAGE_SIZE] = {0};
    for (size_t bit = 0; bit < 8 * sizeof page; bit += 5) {
        page[bit / 8] = (uint8_t)(1u << bit % 8);
        CHECK(!pyhv_is_zero(page, sizeof page));
        page[bit / 8] = 0;
    }
    CHECK(pyhv_is_zero(page, sizeof page));
}

/* --------------------------------------------------------------------------------------------------- save -- */

static void test_save_sizes(void)
{
    static const size_t sizes[] = {PAGE, 2 * PAGE, CHUNK - PAGE, CHUNK, CHUNK + PAGE, 3 * CHUNK, 9 * CHUNK + 5 * PAGE};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t size = sizes[i], pages = size / PAGE;
        int ram = new_file(size);
        CHECK(check_save(ram, 0, size) <= 2 * PAGE); /* nothing was touched */
        touch(ram, 0, 0);
        check_save(ram, 0, size);
        touch(ram, pages - 1, 2);
        check_save(ram, 0, size);
        for (size_t page = 0; page < pages; page += 2)
            touch(ram, page, 0);
        check_save(ram, 0, size);
        for (size_t page = 0; page < pages; page++)
            touch(ram, page, 0);
        check_save(ram, 0, size);
        close(ram);
    }
    uint64_t bad;
    int out = new_file(0);
    struct pyhv_pages none = {.fd = out};
    CHECK_EQUAL(pyhv_pages_save(&none, out, 0, sums, &error), 0);
    CHECK_EQUAL(verify(out, 0, 0, &bad), 0);
    close(out);
}

static void test_save_random_patterns(void)
{
    for (int round = 0; round < 30; round++) {
        size_t pages = 1 + random64() % (12 * PAGES_IN_A_CHUNK), first = random64() % 300, used = random64() % 100;
        int ram = new_file((first + pages + random64() % 300) * PAGE);
        for (size_t i = 0; i < used; i++) {
            size_t page = random64() % (first + pages), run = 1 + random64() % 40;
            int kind = (int)(random64() % 3);
            for (; run && page < first + pages; run--, page++)
                touch(ram, page, kind);
        }
        check_save(ram, first * PAGE, pages * PAGE);
        close(ram);
    }
}

static void test_zero_pages_take_no_space(void)
{
    int ram = new_file(4 * CHUNK);
    for (size_t page = 0; page < 4 * PAGES_IN_A_CHUNK; page++)
        touch(ram, page, 1);
    CHECK_EQUAL(blocks(ram), 4 * CHUNK);
    CHECK(check_save(ram, 0, 4 * CHUNK) <= 2 * PAGE);
    touch(ram, 700, 0);
    touch(ram, 702, 2);
    CHECK(check_save(ram, 0, 4 * CHUNK) <= 4 * PAGE);
    close(ram);
}

static void test_save_large_and_sparse(void)
{
    size_t size = (size_t)64 << 30, page = size / PAGE - 9;
    struct pyhv_pages pages = {.size = size};
    uint64_t *many = calloc(size / CHUNK, sizeof *many), bad;
    int ram = pages.fd = new_file(size), out = new_file(0);
    touch(ram, page, 0);
    CHECK_EQUAL(pyhv_pages_save(&pages, out, 0, many, &error), 0);
    CHECK(blocks(ram) == PAGE && blocks(out) == PAGE);
    struct pyhv_pages saved = {.fd = out, .size = size};
    CHECK_EQUAL(pyhv_pages_verify(&saved, many, &bad, &error), 0);
    many[12345]++;
    saved = (struct pyhv_pages){.fd = out, .size = size};
    CHECK_EQUAL(pyhv_pages_verify(&saved, many, &bad, &error), 1);
    CHECK_EQUAL(bad, 12345);
    close(ram);
    close(out);
    free(many);
}

/* RAM that is a private mapping of a snapshot: the file's content, and the process's where something was written. */
static void test_save_private_mapping(void)
{
    size_t size = 6 * CHUNK + 7 * PAGE, place = 5 * PAGE, pages = size / PAGE;
    for (int round = 0; round < 20; round++) {
        int file = new_file(place + size), out = new_file(0);
        for (size_t page = 0; page < pages; page++)
            if (random64() % 4 == 0 && page / 200 % 2 == 0)
                touch(file, place / PAGE + page, (int)(random64() % 3));
        uint8_t *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, (off_t)place);
        CHECK(mapped != MAP_FAILED);
        /* Reading through the mapping must not make pages its own, nor may it be needed. */
        for (size_t i = 0; i < 300; i++)
            CHECK(mapped[random64() % size] < 256);
        for (size_t i = 0; round && i < 100; i++) {
            size_t page = random64() % pages;
            if (i % 5 == 0)
                memset(mapped + page * PAGE, 0, PAGE); /* a page of zeros where the file has something */
            else
                mapped[page * PAGE + random64() % PAGE] ^= 0x11;
        }
        uint64_t before = blocks(file);
        struct pyhv_pages ram = {.fd = file, .offset = place, .size = size, .mapped = mapped, .is_private = 1};
        CHECK_EQUAL(pyhv_pages_save(&ram, out, OUT_OFFSET, sums, &error), 0);
        CHECK_EQUAL(blocks(file), before);
        CHECK(is_saved(out, mapped, size)); /* last, for it touches every page */
        munmap(mapped, size);
        close(file);
        close(out);
    }
    /* A file that was cut short under the mapping is an error, and no SIGBUS: pages of its own are still there, others
     * are not to be had. */
    int file = new_file(size), out = new_file(0);
    touch(file, 2, 0);
    uint8_t *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    mapped[CHUNK] = 1;
    CHECK_EQUAL(ftruncate(file, (off_t)PAGE), 0);
    struct pyhv_pages ram = {.fd = file, .size = size, .mapped = mapped, .is_private = 1};
    CHECK_EQUAL(pyhv_pages_save(&ram, out, 0, sums, &error), -1);
    CHECK(strcmp(error.what, "read memory") == 0 && strstr(error.detail, "ends at offset 0x1000"));
    munmap(mapped, size);
    close(file);
    close(out);
}

static void test_save_leaves_signals_alone(void)
{
    sigset_t before, after, some;
    sigemptyset(&some);
    sigaddset(&some, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &some, &before);
    int ram = new_file(CHUNK);
    touch(ram, 1, 0);
    check_save(ram, 0, CHUNK);
    pthread_sigmask(SIG_SETMASK, &before, &after);
    for (int signal = 1; signal < 32; signal++)
        CHECK_EQUAL(sigismember(&after, signal), signal == SIGUSR2 || sigismember(&before, signal));
    close(ram);
}

/* ------------------------------------------------------------------------------------------------- faults -- */

/* Fourteen chunks with something in each. */
static int full_ram(size_t *size)
{
    *size = 14 * CHUNK;
    int ram = new_file(*size);
    for (size_t page = 0; page < *size / PAGE; page++)
        if (page % 3)
            touch(ram, page, 0);
    return ram;
}

static void test_calls_that_do_less(void)
{
    size_t size;
    int ram = full_ram(&size);
    pwrite_fault = (struct fault){.from = 0, .times = INT_MAX, .limit = 5000};
    check_save(ram, 0, size);
    pread_fault = (struct fault){.from = 0, .times = INT_MAX, .limit = 4097};
    check_save(ram, 0, size);
    no_faults();
    pwrite_fault = (struct fault){.from = 1, .times = 7, .errnum = EINTR};
    pread_fault = (struct fault){.from = 1, .times = 7, .errnum = EINTR};
    check_save(ram, 0, size);
    no_faults();
    lseek_fault = (struct fault){.from = 0, .times = INT_MAX, .errnum = EINVAL}; /* a file system that knows no holes */
    check_save_as(ram, 0, size, false, size);
    no_faults();
    create_fault = (struct fault){.from = 0, .times = INT_MAX, .errnum = EAGAIN}; /* no second thread: then by one */
    check_save(ram, 0, size);
    CHECK(create_fault.calls > 0);
    no_faults();
    close(ram);
}

/* The fault strikes once, at its 1st, 2nd ... call, until a save has fewer calls than that; each time the save must
 * fail with that errno, and leave neither a descriptor nor, as the sanitizer sees, memory or a thread. */
static void fail_each(struct fault *fault, int errnum, const char *what, int stride)
{
    size_t size;
    int ram = full_ram(&size), struck = 0;
    for (int call = 0;; call += stride) {
        struct pyhv_pages pages = {.fd = ram, .size = size};
        int out = new_file(0), files = open_files();
        *fault = (struct fault){.from = call, .times = 1, .errnum = errnum};
        error = (struct pyhv_error){0};
        int result = pyhv_pages_save(&pages, out, 0, sums, &error);
        bool strikes_now = fault->calls > call;
        *fault = never;
        CHECK_EQUAL(open_files(), files);
        close(out);
        if (!strikes_now) {
            CHECK_EQUAL(result, 0);
            break;
        }
        struck++;
        CHECK_EQUAL(result, -1);
        CHECK_EQUAL(error.errnum, errnum);
        CHECK(strncmp(error.what, what, strlen(what)) == 0);
        CHECK_EQUAL(pyhv_pages_save(&pages, -1, 0, sums, NULL), -1); /* without an error to fill */
    }
    CHECK(struck > 0);
    close(ram);
}

static void test_calls_that_fail(void)
{
    fail_each(&pwrite_fault, ENOSPC, "pwrite", 97);
    fail_each(&pwrite_fault, EIO, "pwrite", 401);
    fail_each(&pread_fault, EIO, "pread", 97);
    fail_each(&lseek_fault, EIO, "lseek", 193);
    fail_each(&ftruncate_fault, EFBIG, "ftruncate", 1);

    size_t size;
    int ram = full_ram(&size), out = new_file(0);
    struct pyhv_pages pages = {.fd = ram, .size = size};
    pwrite_fault = (struct fault){
        .from = 3, .times = 1, .limit = 0}; /* a write() that does nothing must not be repeated for ever */
    CHECK_EQUAL(pyhv_pages_save(&pages, out, 0, sums, &error), -1);
    CHECK_EQUAL(error.errnum, EIO);
    pread_fault = (struct fault){.from = 3, .times = 1, .limit = 0}; /* the end of the file, where there was more */
    pwrite_fault = never;
    CHECK_EQUAL(pyhv_pages_save(&pages, out, 0, sums, &error), -1);
    CHECK(error.errnum == 0 && strstr(error.detail, "the file ends at offset"));
    no_faults();

    struct pyhv_pages wrong[] = {
        {.fd = ram, .size = size + 1},                                               /* no whole pages */
        {.fd = ram, .size = UINT64_MAX - 4095},                                      /* no file is as large */
        {.fd = ram, .size = PAGE, .offset = UINT64_MAX - 4095},                      /* goes round */
        {.fd = ram, .size = PAGE, .is_private = 1},                                  /* but mapped where? */
        {.fd = ram, .size = PAGE, .is_private = 1, .mapped = (uint8_t *)4096 + 100}, /* not at a page */
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        CHECK_EQUAL(pyhv_pages_save(&wrong[i], out, 0, sums, &error), -1);
        CHECK_EQUAL(error.errnum, EINVAL);
        CHECK_EQUAL(pyhv_pages_verify(&wrong[i], sums, sums, &error), -1);
    }
    close(ram);
    close(out);
}

/* ------------------------------------------------------------------------------------------------- verify -- */

static void flip(int fd, size_t at, int bit)
{
    uint8_t byte;
    CHECK_EQUAL(pread(fd, &byte, 1, (off_t)at), 1);
    byte ^= (uint8_t)(1u << bit);
    CHECK_EQUAL(pwrite(fd, &byte, 1, (off_t)at), 1);
}

static void test_verify(void)
{
    size_t size = 5 * CHUNK + 3 * PAGE;
    int ram = new_file(size), out = new_file(0);
    struct pyhv_pages pages = {.fd = ram, .size = size};
    uint64_t bad;
    uint8_t *expected = malloc(size);
    touch(ram, 3, 0);
    touch(ram, 2 * PAGES_IN_A_CHUNK + 5, 2);
    touch(ram, size / PAGE - 1, 0);
    CHECK_EQUAL(pyhv_pages_save(&pages, out, OUT_OFFSET, sums, &error), 0);
    CHECK_EQUAL(pread(ram, expected, size, 0), size);

    for (int i = 0; i < 200; i++) { /* any bit, in pages as in holes */
        size_t at = random64() % size;
        int bit = (int)(random64() % 8);
        flip(out, OUT_OFFSET + at, bit);
        CHECK_EQUAL(verify(out, OUT_OFFSET, size, &bad), 1);
        CHECK_EQUAL(bad, at / CHUNK);
        if (i == 0)
            CHECK(!is_saved(out, expected, size)); /* the other checker of these tests can fail too */
        flip(out, OUT_OFFSET + at, bit);
    }
    CHECK_EQUAL(verify(out, OUT_OFFSET, size, &bad), 0);
    for (size_t chunk = 0; chunk <= size / CHUNK; chunk++) {
        sums[chunk] ^= 1;
        CHECK(!is_saved(out, expected, size));
        CHECK_EQUAL(verify(out, OUT_OFFSET, size, &bad), 1);
        CHECK_EQUAL(bad, chunk);
        sums[chunk] ^= 1;
    }
    /* Two pages that have changed places. */
    uint8_t one[PYHV_PAGE_SIZE], other[PYHV_PAGE_SIZE] = {0};
    CHECK_EQUAL(pread(out, one, PAGE, (off_t)(OUT_OFFSET + 3 * PAGE)), PAGE);
    CHECK_EQUAL(pwrite(out, other, PAGE, (off_t)(OUT_OFFSET + 3 * PAGE)), PAGE);
    CHECK_EQUAL(pwrite(out, one, PAGE, (off_t)(OUT_OFFSET + 4 * PAGE)), PAGE);
    CHECK_EQUAL(verify(out, OUT_OFFSET, size, &bad), 1);

    CHECK_EQUAL(ftruncate(out, (off_t)(OUT_OFFSET + size - PAGE)), 0);
    CHECK_EQUAL(verify(out, OUT_OFFSET, size, &bad), -1);
    CHECK(error.errnum == 0 && strstr(error.detail, "the file ends at offset"));
    CHECK_EQUAL(verify(-1, 0, size, &bad), -1);
    CHECK_EQUAL(error.errnum, EBADF);
    close(ram);
    close(out);
    free(expected);
}

/* ------------------------------------------------------------------------------------------------- bitmaps -- */

/* Finding pages against a model: pages with content, and holes, of a memfd and behind a private mapping. */
static void test_find_pages(void)
{
    enum { PAGES = 1000, WORDS = PAGES / 64 + 1 };
    for (int is_private = 0; is_private < 2; is_private++)
        for (int density = 1; density <= 64; density *= 8) {
            uint64_t expected[WORDS] = {0}, bitmap[WORDS] = {0};
            struct pyhv_memory ram;
            int fd = new_file(OUT_OFFSET + PAGES * PAGE);
            for (size_t page = 0; page < PAGES; page++)
                if (random64() >> 20 & 1 && random64() % (uint64_t)density == 0) {
                    CHECK_EQUAL(pwrite(fd, "x", 1, (off_t)(OUT_OFFSET + page * PAGE + random64() % PAGE)), 1);
                    expected[page / 64] |= UINT64_C(1) << page % 64;
                }
            if (is_private) {
                CHECK_EQUAL(pyhv_memory_map_file(&ram, fd, OUT_OFFSET, PAGES * PAGE, &error), 0);
                for (int i = 0; i < 50; i++) { /* the guest's own */
                    size_t page = random64() % PAGES;
                    ram.host[page * PAGE] = 1;
                    expected[page / 64] |= UINT64_C(1) << page % 64;
                }
            } else {
                ram = (struct pyhv_memory){.size = PAGES * PAGE, .offset = OUT_OFFSET, .fd = fd};
            }
            CHECK_EQUAL(pyhv_pages_find(&ram, bitmap, &error), 0);
            CHECK(memcmp(bitmap, expected, sizeof bitmap) == 0);
            uint64_t count = 0;
            for (size_t page = 0; page < PAGES; page++) {
                CHECK_EQUAL(pyhv_pages_count(bitmap, page), count);
                count += expected[page / 64] >> page % 64 & 1;
            }
            CHECK_EQUAL(pyhv_pages_count(bitmap, PAGES), count);
            bitmap[WORDS - 1] |= UINT64_C(1) << 63; /* beyond the last page */
            CHECK_EQUAL(pyhv_pages_count(bitmap, PAGES), count);
            bitmap[WORDS - 1] &= ~(UINT64_C(1) << 63);

            lseek_fault = (struct fault){.times = 1, .errnum = EIO};
            CHECK_EQUAL(pyhv_pages_find(&ram, bitmap, &error), -1);
            CHECK_EQUAL(error.errnum, EIO);
            no_faults();
            if (is_private)
                pyhv_memory_destroy(&ram);
            close(fd);
        }
}

static void test_page_sums(void)
{
    enum { PAGES = 9 };
    static uint8_t pages[PAGES * 4096];
    fill_random(pages, sizeof pages);
    for (size_t count = 0; count <= PAGES; count++) {
        uint64_t page_sums[PAGES + 1] = {0};
        pyhv_page_sums(pages, count, page_sums);
        for (size_t i = 0; i <= PAGES; i++)
            CHECK_EQUAL(page_sums[i], i < count ? pyhv_xxh64(pages + i * PAGE, PAGE, 0) : 0);
    }
}

int main(void)
{
    alarm(100);
    no_faults();
    test_xxh64();
    test_page_sums();
    test_is_zero();
    test_save_sizes();
    test_save_random_patterns();
    test_zero_pages_take_no_space();
    test_save_large_and_sparse();
    test_save_private_mapping();
    test_save_leaves_signals_alone();
    test_calls_that_do_less();
    test_calls_that_fail();
    test_verify();
    test_find_pages();
    return check_report("test_pages");
}

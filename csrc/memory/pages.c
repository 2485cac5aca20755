/* SPDX-License-Identifier: MIT
 *
 * The inner loops of save: zero pages, checksums, and guest RAM on its way into a file. No policy, no guest, no KVM.
 *
 * How RAM is read. Whether a page has content is asked of the kernel and never of the mapping: a mapping of a memfd
 * allocates the pages that are read through it, and one of a file raises SIGBUS when somebody truncates the file. So
 * SEEK_DATA and SEEK_HOLE tell where there is something. A chunk that is full of it is used where it is mapped; any
 * other is put together in a buffer by pread, which names the truncated file instead of dying of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "pyhv.h"

enum { PAGES_IN_A_CHUNK = PYHV_CHUNK_SIZE / PYHV_PAGE_SIZE };

/* ------------------------------------------------------------------------------------------------ checksum -- */

/* XXH64 as its specification has it (xxHash fast digest algorithm, version 0.1.1, "XXH64 algorithm description").
 * Little-endian loads: x86-64 is all that pyhv runs on. */
#define PRIME1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define PRIME3 UINT64_C(0x165667B19E3779F9)
#define PRIME4 UINT64_C(0x85EBCA77C2B2AE63)
#define PRIME5 UINT64_C(0x27D4EB2F165667C5)

static inline uint64_t rotate(uint64_t value, int bits)
{
    return value << bits | value >> (64 - bits);
}

static inline uint64_t load64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint64_t xxh64_round(uint64_t lane, uint64_t input)
{
    return rotate(lane + input * PRIME2, 31) * PRIME1;
}

static inline uint64_t xxh64_merge(uint64_t hash, uint64_t lane)
{
    return (hash ^ xxh64_round(0, lane)) * PRIME1 + PRIME4;
}

/* The rounds of the whole 32-byte stripes among `size` bytes. */
static void xxh64_stripes(uint64_t lanes[4], const uint8_t *at, size_t size)
{
    uint64_t lane1 = lanes[0], lane2 = lanes[1], lane3 = lanes[2], lane4 = lanes[3];
    for (; size >= 32; at += 32, size -= 32) {
        lane1 = xxh64_round(lane1, load64(at));
        lane2 = xxh64_round(lane2, load64(at + 8));
        lane3 = xxh64_round(lane3, load64(at + 16));
        lane4 = xxh64_round(lane4, load64(at + 24));
    }
    lanes[0] = lane1;
    lanes[1] = lane2;
    lanes[2] = lane3;
    lanes[3] = lane4;
}

/* The same with the four lanes in one register, where the processor multiplies 64-bit lanes (VPMULLQ): there is one
 * multiplier for integers, which bounds the other way to 4 bytes a clock (measured on Zen 4: 19 GB/s instead of 10). */
__attribute__((target("avx512dq,avx512vl"))) static void xxh64_stripes_avx512(uint64_t lanes[4], const uint8_t *at,
                                                                              size_t size)
{
    typedef uint64_t vector __attribute__((vector_size(32)));
    vector all, input;
    memcpy(&all, lanes, sizeof all);
    for (; size >= 32; at += 32, size -= 32) {
        memcpy(&input, at, sizeof input);
        all += input * PRIME2;
        all = (all << 31 | all >> 33) * PRIME1;
    }
    memcpy(lanes, &all, sizeof all);
}

/* Four pages side by side: a page alone waits for one product after the other (20 GB/s; so 60). */
__attribute__((target("avx512dq,avx512vl"))) static void xxh64_four_pages_avx512(uint64_t lanes[4][4],
                                                                                 const uint8_t *at)
{
    typedef uint64_t vector __attribute__((vector_size(32)));
    vector all[4], input;
    memcpy(all, lanes, sizeof all);
    for (const uint8_t *end = at + PYHV_PAGE_SIZE; at < end; at += 32) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            memcpy(&input, at + i * PYHV_PAGE_SIZE, sizeof input);
            all[i] += input * PRIME2;
            all[i] = (all[i] << 31 | all[i] >> 33) * PRIME1;
        }
    }
    memcpy(lanes, all, sizeof all);
}

static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static void xxh64_begin(uint64_t lanes[4], uint64_t seed)
{
    lanes[0] = seed + PRIME1 + PRIME2;
    lanes[1] = seed + PRIME2;
    lanes[2] = seed;
    lanes[3] = seed - PRIME1;
}

static uint64_t xxh64_join(const uint64_t lanes[4])
{
    uint64_t hash = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
    for (int i = 0; i < 4; i++)
        hash = xxh64_merge(hash, lanes[i]);
    return hash;
}

/* The last `left` bytes, which are no stripe, and the final mixing. */
static uint64_t xxh64_end(uint64_t hash, const uint8_t *at, size_t left)
{
    for (; left >= 8; at += 8, left -= 8)
        hash = rotate(hash ^ xxh64_round(0, load64(at)), 27) * PRIME1 + PRIME4;
    if (left >= 4) {
        hash = rotate(hash ^ load32(at) * PRIME1, 23) * PRIME2 + PRIME3;
        at += 4;
        left -= 4;
    }
    for (; left; at++, left--)
        hash = rotate(hash ^ *at * PRIME5, 11) * PRIME1;
    hash = (hash ^ hash >> 33) * PRIME2;
    hash = (hash ^ hash >> 29) * PRIME3;
    return hash ^ hash >> 32;
}

uint64_t pyhv_xxh64(const void *data, size_t size, uint64_t seed)
{
    const uint8_t *at = data;
    uint64_t hash = seed + PRIME5;
    if (size >= 32) {
        uint64_t lanes[4];
        xxh64_begin(lanes, seed);
        if (has_avx512())
            xxh64_stripes_avx512(lanes, at, size);
        else
            xxh64_stripes(lanes, at, size);
        hash = xxh64_join(lanes);
    }
    return xxh64_end(hash + size, at + size / 32 * 32, size % 32);
}

void pyhv_page_sums(const uint8_t *pages, size_t count, uint64_t *sums)
{
    if (has_avx512()) {
        for (; count >= 4; count -= 4, pages += 4 * PYHV_PAGE_SIZE) {
            uint64_t lanes[4][4];
            for (int i = 0; i < 4; i++)
                xxh64_begin(lanes[i], 0);
            xxh64_four_pages_avx512(lanes, pages);
            for (int i = 0; i < 4; i++)
                *sums++ = xxh64_end(xxh64_join(lanes[i]) + PYHV_PAGE_SIZE, NULL, 0);
        }
    }
    for (; count; count--, pages += PYHV_PAGE_SIZE)
        *sums++ = pyhv_xxh64(pages, PYHV_PAGE_SIZE, 0);
}

/* -------------------------------------------------------------------------------------------------- zeros -- */

int pyhv_is_zero(const void *data, size_t size)
{
    const uint8_t *at = data;
    /* 128 bytes at a time, so that the compiler can use vectors; the first tell of most pages that have content. */
    for (; size >= 128; at += 128, size -= 128) {
        uint64_t any = 0;
        for (int i = 0; i < 128; i += 8)
            any |= load64(at + i);
        if (any)
            return 0;
    }
    for (; size; at++, size--)
        if (*at)
            return 0;
    return 1;
}

static const uint8_t *zeros(void)
{
    static uint8_t chunk[PYHV_CHUNK_SIZE]; /* never written, so that all of it is the kernel's one page of zeros */
    return chunk;
}

static uint64_t zero_chunk_sum;

static void compute_zero_chunk_sum(void)
{
    zero_chunk_sum = pyhv_xxh64(zeros(), PYHV_CHUNK_SIZE, 0);
}

/* The sum of `size` zeros, at most a chunk. Most of an idle guest's chunks are whole ones of zeros. */
static uint64_t sum_of_zeros(size_t size)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (size < PYHV_CHUNK_SIZE)
        return pyhv_xxh64(zeros(), size, 0);
    pthread_once(&once, compute_zero_chunk_sum);
    return zero_chunk_sum;
}

/* ------------------------------------------------------------------------------------------------ reading -- */

/* Reads a piece of memory, front to back, as the comment at the top says. Offsets are the file's. */
struct reader {
    struct pyhv_pages piece; /* its data and data_end: the first stretch with content that ends behind what was read */
    int pagemap;             /* -1 without a private mapping */
};

/* Looks up the first stretch with content that ends behind `from`, unless it is known already. Where it ends is asked
 * once: the kernel looks at every page of a memfd on the way there (60 ns each). */
static int find_data(struct pyhv_pages *piece, uint64_t from, struct pyhv_error *error)
{
    if (from < piece->data_end)
        return 0;
    off_t data = lseek(piece->fd, (off_t)from, SEEK_DATA), hole = INT64_MAX;
    if (data >= 0)
        hole = lseek(piece->fd, data, SEEK_HOLE);
    else if (errno == ENXIO) /* nothing but a hole up to the end */
        data = INT64_MAX;
    else if (errno == EINVAL) /* a file system that knows no holes (no memfd's): all is content */
        data = (off_t)from;
    if (data < 0 || (hole <= data && data != INT64_MAX))
        return pyhv_fail(error, errno, "lseek SEEK_DATA", "at offset 0x%llx", (unsigned long long)from);
    piece->data = (uint64_t)data;
    piece->data_end = (uint64_t)hole;
    return 0;
}

static int reader_open(struct reader *reader, const struct pyhv_pages *piece, struct pyhv_error *error)
{
    struct stat file;
    *reader = (struct reader){.piece = *piece, .pagemap = -1};
    /* Whole pages, and offsets that lseek and pread can take. */
    if (piece->size % PYHV_PAGE_SIZE || (uintptr_t)piece->mapped % PYHV_PAGE_SIZE || piece->size > INT64_MAX ||
        piece->offset > INT64_MAX - piece->size || (piece->is_private && !piece->mapped))
        return pyhv_fail(error, EINVAL, "read memory", "0x%llx bytes at offset 0x%llx, mapped at %p",
                         (unsigned long long)piece->size, (unsigned long long)piece->offset,
                         (const void *)piece->mapped);
    if (fstat(piece->fd, &file) < 0)
        return pyhv_fail_errno(error, "fstat");
    /* Behind the end of a file there is nothing either, but that is no hole: it is a file cut short. */
    if ((uint64_t)file.st_size < piece->offset + piece->size)
        return pyhv_fail(error, 0, "read memory", "the file ends at offset 0x%llx, before 0x%llx",
                         (unsigned long long)file.st_size, (unsigned long long)(piece->offset + piece->size));
    if (find_data(&reader->piece, piece->offset, error) < 0)
        return -1;
    if (piece->is_private) {
        reader->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        if (reader->pagemap < 0)
            return pyhv_fail_errno(error, "open /proc/self/pagemap");
    }
    return 0;
}

static void reader_close(struct reader *reader)
{
    if (reader->pagemap >= 0)
        close(reader->pagemap);
}

static int pread_all(int fd, uint8_t *buffer, size_t size, uint64_t offset, struct pyhv_error *error)
{
    while (size) {
        ssize_t got = pread(fd, buffer, size, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return pyhv_fail(error, errno, "pread", "at offset 0x%llx", (unsigned long long)offset);
        if (got == 0)
            return pyhv_fail(error, 0, "read memory", "the file ends at offset 0x%llx", (unsigned long long)offset);
        buffer += got;
        size -= (size_t)got;
        offset += (uint64_t)got;
    }
    return 0;
}

/* What the file has from `from` to `to`, zeros for its holes. */
static int read_file(struct reader *reader, uint64_t from, uint64_t to, uint8_t *buffer, struct pyhv_error *error)
{
    while (from < to) {
        if (find_data(&reader->piece, from, error) < 0)
            return -1;
        uint64_t until = reader->piece.data < to ? reader->piece.data : to; /* a hole up to there */
        if (from < until) {
            memset(buffer, 0, until - from);
        } else {
            until = reader->piece.data_end < to ? reader->piece.data_end : to;
            if (pread_all(reader->piece.fd, buffer, until - from, from, error) < 0)
                return -1;
        }
        buffer += until - from;
        from = until;
    }
    return 0;
}

/* The bits of a /proc/PID/pagemap entry (Documentation/admin-guide/mm/pagemap.rst). */
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_SWAPPED (UINT64_C(1) << 62)
#define PAGEMAP_OF_FILE (UINT64_C(1) << 61) /* of a file or of shared memory: not this process's own */

static bool is_own(uint64_t entry)
{
    return (entry & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED)) && !(entry & PAGEMAP_OF_FILE);
}

/* The parts of a chunk of a private mapping of the file: pages that were written since it was mapped are this process's
 * own, all others are the file's still. */
static int read_private(struct reader *reader, uint64_t at, const uint64_t *pagemap, size_t pages, uint8_t *buffer,
                        struct pyhv_error *error)
{
    uint64_t from = reader->piece.offset + at;
    for (size_t page = 0; page < pages;) {
        size_t first = page;
        bool own = is_own(pagemap[first]);
        while (page < pages && is_own(pagemap[page]) == own)
            page++;
        size_t skip = first * PYHV_PAGE_SIZE, size = (page - first) * PYHV_PAGE_SIZE;
        /* Who shortens the file takes the process's own pages behind its new end away as well. */
        int failed = own ? pyhv_memory_read(reader->piece.mapped + at + skip, buffer + skip, size, error)
                         : read_file(reader, from + skip, from + skip + size, buffer + skip, error);
        if (failed)
            return -1;
    }
    return 0;
}

/* Finds the chunk of `size` bytes that begins `at` bytes into the piece: where it is mapped, or put into `buffer`.
 * *data is NULL where it is nothing but hole. */
static int read_chunk(struct reader *reader, uint64_t at, size_t size, uint8_t *buffer, const uint8_t **data,
                      struct pyhv_error *error)
{
    uint64_t pagemap[PAGES_IN_A_CHUNK];
    uint64_t from = reader->piece.offset + at, to = from + size;
    const uint8_t *mapped = reader->piece.mapped ? reader->piece.mapped + at : NULL;
    size_t pages = size / PYHV_PAGE_SIZE, own = 0;

    *data = NULL;
    if (find_data(&reader->piece, from, error) < 0)
        return -1;
    if (!reader->piece.is_private) {
        if (reader->piece.data >= to)
            return 0;
        *data = mapped && reader->piece.data <= from && reader->piece.data_end >= to ? mapped : buffer;
        return *data == buffer ? read_file(reader, from, to, buffer, error) : 0;
    }
    uint64_t place = (uintptr_t)mapped / PYHV_PAGE_SIZE * sizeof *pagemap;
    if (pread_all(reader->pagemap, (uint8_t *)pagemap, pages * sizeof *pagemap, place, error) < 0)
        return -1;
    for (size_t page = 0; page < pages; page++)
        own += is_own(pagemap[page]);
    if (own == 0 && reader->piece.data >= to)
        return 0;
    *data = buffer; /* never where it is mapped: that may be gone at any moment */
    return read_private(reader, at, pagemap, pages, buffer, error);
}

/* Moves *at on to the first chunk that may have content, or to the end. */
static int skip_holes(struct reader *reader, uint64_t *at, struct pyhv_error *error)
{
    struct pyhv_pages *piece = &reader->piece;
    if (piece->is_private)
        return 0; /* the holes of the file may have been written to in the mapping */
    if (find_data(piece, piece->offset + *at, error) < 0)
        return -1;
    if (piece->data >= piece->offset + piece->size)
        *at = piece->size;
    else if (piece->data > piece->offset + *at)
        *at = (piece->data - piece->offset) / PYHV_CHUNK_SIZE * PYHV_CHUNK_SIZE;
    return 0;
}

/* The bytes of the chunk that begins `at` bytes into `size`. */
static size_t chunk_size(uint64_t size, uint64_t at)
{
    return size - at < PYHV_CHUNK_SIZE ? (size_t)(size - at) : PYHV_CHUNK_SIZE;
}

/* ------------------------------------------------------------------------------------------------- saving -- */

/* The disk gets its work in pieces of this many bytes while the rest is still being written, so that the fsync that
 * follows finds little left to do: the device and the processor work at the same time. */
#define WRITEBACK_SIZE (UINT64_C(8) << 20)

/* Two threads go over the memory: the caller writes what is not zero, a helper computes the sums. Neither waits for the
 * other: the sums are done before the writing is, and cost no time where there is a second processor. */
struct save {
    uint64_t size; /* of the memory */
    uint64_t *sums;
    int fd;
    uint64_t offset;    /* of the memory in the file */
    uint64_t writeback; /* up to here the file is on its way to the disk */
    _Atomic bool stop;  /* one of the two has failed */

    struct reader helper_reader;
    uint8_t *helper_buffer;
    int helper_result;
    struct pyhv_error helper_error;
};

static int pwrite_all(int fd, const uint8_t *data, size_t size, uint64_t offset, struct pyhv_error *error)
{
    while (size) {
        ssize_t put = pwrite(fd, data, size, (off_t)offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return pyhv_fail(error, put < 0 ? errno : EIO, "pwrite", "%zu bytes at offset 0x%llx", size,
                             (unsigned long long)offset);
        data += put;
        size -= (size_t)put;
        offset += (uint64_t)put;
    }
    return 0;
}

static bool is_zero_page(const uint8_t *data, size_t at)
{
    return pyhv_is_zero(data + at, PYHV_PAGE_SIZE);
}

/* Writes what is not zero of the chunk that begins `at` bytes into the memory, in runs as long as they come. */
static int write_chunk(struct save *save, uint64_t at, const uint8_t *data, size_t size, struct pyhv_error *error)
{
    uint64_t place = save->offset + at, end = place + size;
    for (size_t from, to = 0; to < size;) {
        for (from = to; from < size && is_zero_page(data, from);)
            from += PYHV_PAGE_SIZE;
        for (to = from; to < size && !is_zero_page(data, to);)
            to += PYHV_PAGE_SIZE;
        if (pwrite_all(save->fd, data + from, to - from, place + from, error) < 0)
            return -1;
    }
    if (end - save->writeback >= WRITEBACK_SIZE) {
        /* No more than a hint: where it fails, the fsync says why. */
        sync_file_range(save->fd, (off_t)save->writeback, (off_t)(end - save->writeback), SYNC_FILE_RANGE_WRITE);
        save->writeback = end;
    }
    return 0;
}

static int sum_chunk(struct save *save, uint64_t at, const uint8_t *data, size_t size, struct pyhv_error *error)
{
    (void)error;
    save->sums[at / PYHV_CHUNK_SIZE] = pyhv_xxh64(data, size, 0);
    return 0;
}

typedef int chunk_handler(struct save *save, uint64_t at, const uint8_t *data, size_t size, struct pyhv_error *error);

/* Has every chunk handled in which there is something. `buffer`: for a chunk. */
static int for_each_chunk(struct save *save, struct reader *reader, uint8_t *buffer, chunk_handler *handle,
                          struct pyhv_error *error)
{
    for (uint64_t at = 0; at < save->size && !save->stop; at += PYHV_CHUNK_SIZE) {
        const uint8_t *data;
        if (skip_holes(reader, &at, error) < 0)
            return -1;
        if (at >= save->size)
            break;
        size_t size = chunk_size(save->size, at);
        if (read_chunk(reader, at, size, buffer, &data, error) < 0 || (data && handle(save, at, data, size, error) < 0))
            return -1;
    }
    return 0;
}

static void *helper(void *opaque)
{
    struct save *save = opaque;
    save->helper_result =
        for_each_chunk(save, &save->helper_reader, save->helper_buffer, sum_chunk, &save->helper_error);
    if (save->helper_result < 0)
        save->stop = true;
    return NULL;
}

/* Starts the helper. It takes no signals: those are for the threads that expect them. */
static bool start_helper(struct save *save, pthread_t *thread)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int errnum = pthread_create(thread, NULL, helper, save);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return errnum == 0;
}

/* Makes the file large enough; what is new in it is a hole. */
static int extend(int fd, uint64_t size, struct pyhv_error *error)
{
    struct stat file;
    if (fstat(fd, &file) < 0)
        return pyhv_fail_errno(error, "fstat");
    if ((uint64_t)file.st_size < size && ftruncate(fd, (off_t)size) < 0)
        return pyhv_fail(error, errno, "ftruncate", "to 0x%llx bytes", (unsigned long long)size);
    return 0;
}

/* The same as pyhv_pages_save(), with a reader that is open and a file that is long enough. */
static int save_all(struct save *save, struct reader *reader, struct pyhv_error *error)
{
    pthread_t thread;
    uint8_t *buffers = malloc(2 * (size_t)PYHV_CHUNK_SIZE);
    if (!buffers)
        return pyhv_fail(error, ENOMEM, "pyhv_pages_save", NULL);
    for (uint64_t at = 0; at < save->size; at += PYHV_CHUNK_SIZE)
        save->sums[at / PYHV_CHUNK_SIZE] = sum_of_zeros(chunk_size(save->size, at));
    save->helper_buffer = buffers + PYHV_CHUNK_SIZE;
    save->helper_reader = *reader;
    bool helped = start_helper(save, &thread);
    int result = for_each_chunk(save, reader, buffers, write_chunk, error);
    if (result < 0)
        save->stop = true;
    if (helped)
        pthread_join(thread, NULL);
    else
        helper(save); /* no thread to be had: then one after the other */
    free(buffers);
    if (result == 0 && save->helper_result < 0) {
        if (error)
            *error = save->helper_error;
        result = -1;
    }
    return result;
}

int pyhv_pages_save(struct pyhv_pages *ram, int out_fd, uint64_t out_offset, uint64_t *sums, struct pyhv_error *error)
{
    struct save save = {.size = ram->size, .sums = sums, .fd = out_fd, .offset = out_offset, .writeback = out_offset};
    struct reader reader;
    if (reader_open(&reader, ram, error) < 0)
        return -1;
    int result = extend(out_fd, out_offset + ram->size, error);
    if (result == 0)
        result = save_all(&save, &reader, error);
    reader_close(&reader);
    *ram = reader.piece; /* with what is known of the next holes */
    return result;
}

/* ---------------------------------------------------------------------------------------------- verifying -- */

int pyhv_pages_verify(struct pyhv_pages *pages, const uint64_t *sums, uint64_t *bad_chunk, struct pyhv_error *error)
{
    struct reader reader;
    if (reader_open(&reader, pages, error) < 0)
        return -1;
    int result = 0;
    uint8_t *buffer = malloc(PYHV_CHUNK_SIZE);
    if (!buffer)
        result = pyhv_fail(error, ENOMEM, "pyhv_pages_verify", NULL);
    for (uint64_t at = 0; at < pages->size && result == 0; at += PYHV_CHUNK_SIZE) {
        const uint8_t *data;
        uint64_t chunk = at / PYHV_CHUNK_SIZE;
        size_t size = chunk_size(pages->size, at);
        result = read_chunk(&reader, at, size, buffer, &data, error);
        if (result == 0 && (data ? pyhv_xxh64(data, size, 0) : sum_of_zeros(size)) != sums[chunk]) {
            *bad_chunk = chunk;
            result = 1;
        }
    }
    free(buffer);
    reader_close(&reader);
    *pages = reader.piece;
    return result;
}

/* ----------------------------------------------------------------------------------------------- bitmaps -- */

static void set_bits(uint64_t *bitmap, uint64_t from, uint64_t to)
{
    for (; from < to && from % 64; from++)
        bitmap[from / 64] |= UINT64_C(1) << from % 64;
    for (; to - from >= 64; from += 64)
        bitmap[from / 64] = UINT64_MAX;
    for (; from < to; from++)
        bitmap[from / 64] |= UINT64_C(1) << from % 64;
}

/* Sets the bits of the pages that are this process's own. */
static int find_own(const struct reader *reader, uint64_t *bitmap, struct pyhv_error *error)
{
    uint64_t pagemap[PAGES_IN_A_CHUNK];
    for (uint64_t at = 0; at < reader->piece.size; at += PYHV_CHUNK_SIZE) {
        size_t pages = chunk_size(reader->piece.size, at) / PYHV_PAGE_SIZE;
        uint64_t place = (uintptr_t)(reader->piece.mapped + at) / PYHV_PAGE_SIZE * sizeof *pagemap;
        if (pread_all(reader->pagemap, (uint8_t *)pagemap, pages * sizeof *pagemap, place, error) < 0)
            return -1;
        for (size_t i = 0; i < pages; i++)
            if (is_own(pagemap[i]))
                set_bits(bitmap, at / PYHV_PAGE_SIZE + i, at / PYHV_PAGE_SIZE + i + 1);
    }
    return 0;
}

int pyhv_pages_find(const struct pyhv_memory *ram, uint64_t *bitmap, struct pyhv_error *error)
{
    const struct pyhv_pages whole = {
        .fd = ram->fd,
        .is_private = ram->of_a_file != 0,
        .offset = ram->offset,
        .size = ram->size,
        .mapped = ram->host,
    };
    struct reader reader;
    if (reader_open(&reader, &whole, error) < 0)
        return -1;
    int result = ram->of_a_file ? find_own(&reader, bitmap, error) : 0;
    const struct pyhv_pages *piece = &reader.piece;
    uint64_t end = ram->offset + ram->size;
    for (uint64_t at = ram->offset; at < end && result == 0; at = piece->data_end) {
        result = find_data(&reader.piece, at, error);
        if (result < 0 || piece->data >= end)
            break;
        /* Data ends where it likes in a file; a page with some of it has content. */
        uint64_t from = piece->data > at ? piece->data : at, to = piece->data_end < end ? piece->data_end : end;
        set_bits(bitmap, (from - ram->offset) / PYHV_PAGE_SIZE,
                 (to - ram->offset + PYHV_PAGE_SIZE - 1) / PYHV_PAGE_SIZE);
    }
    reader_close(&reader);
    return result;
}

uint64_t pyhv_pages_count(const uint64_t *bitmap, uint64_t pages)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < pages / 64; i++)
        count += (uint64_t)__builtin_popcountll(bitmap[i]);
    if (pages % 64)
        count += (uint64_t)__builtin_popcountll(bitmap[pages / 64] & ((UINT64_C(1) << pages % 64) - 1));
    return count;
}

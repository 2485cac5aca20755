/* SPDX-License-Identifier: MIT
 *
 * The inner loops of save: zero pages, checksums, and guest RAM on its way into a file. No policy, no guest, no KVM.
 *
 * How RAM is read. Whether a page has content is asked of the kernel and never of the mapping: a mapping of a memfd
 * allocates the pages that are read through it, and one of a file raises SIGBUS when somebody truncates the file. So
 * what stands in the file is fetched by pread into a buffer, from one SEEK_DATA to the next SEEK_HOLE. Only pages that
 * are this process's own (written through a private mapping) are copied out of the mapping: they are in no file. The
 * copy is not wasted: checksum and file see the same bytes whatever happens to the memory meanwhile, and the buffers
 * stay in the processor's cache.
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

uint64_t pyhv_xxh64(const void *data, size_t size, uint64_t seed)
{
    const uint8_t *at = data;
    size_t left = size;
    uint64_t hash;
    if (left >= 32) {
        uint64_t lane1 = seed + PRIME1 + PRIME2, lane2 = seed + PRIME2, lane3 = seed, lane4 = seed - PRIME1;
        for (; left >= 32; at += 32, left -= 32) {
            lane1 = xxh64_round(lane1, load64(at));
            lane2 = xxh64_round(lane2, load64(at + 8));
            lane3 = xxh64_round(lane3, load64(at + 16));
            lane4 = xxh64_round(lane4, load64(at + 24));
        }
        hash = rotate(lane1, 1) + rotate(lane2, 7) + rotate(lane3, 12) + rotate(lane4, 18);
        hash = xxh64_merge(hash, lane1);
        hash = xxh64_merge(hash, lane2);
        hash = xxh64_merge(hash, lane3);
        hash = xxh64_merge(hash, lane4);
    } else {
        hash = seed + PRIME5;
    }
    hash += size;
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

/* -------------------------------------------------------------------------------------------------- zeros -- */

int pyhv_is_zero(const void *data, size_t size)
{
    const uint8_t *at = data;
    /* 128 bytes at a time, so that the compiler can use vectors; a page with content is mostly found out by the first. */
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
    int fd;
    uint64_t begin, end; /* the piece, in the file */
    const uint8_t *mapped;
    int pagemap;             /* -1 without a private mapping */
    uint64_t data, data_end; /* the first stretch of the file with content that ends behind what was read so far */
};

/* Looks up the first stretch with content that ends behind `from`, unless it is known already. */
static int find_data(struct reader *reader, uint64_t from, struct pyhv_error *error)
{
    if (from < reader->data_end || reader->data >= reader->end)
        return 0;
    reader->data = reader->data_end = reader->end;
    if (from >= reader->end)
        return 0;
    off_t data = lseek(reader->fd, (off_t)from, SEEK_DATA);
    if (data < 0) {
        if (errno == ENXIO) /* nothing but a hole up to the end */
            return 0;
        if (errno != EINVAL)
            return pyhv_fail(error, errno, "lseek SEEK_DATA", "at offset 0x%llx", (unsigned long long)from);
        reader->data = from; /* a file system that knows no holes: all is content */
        return 0;
    }
    if ((uint64_t)data >= reader->end)
        return 0;
    off_t hole = lseek(reader->fd, data, SEEK_HOLE);
    if (hole < 0)
        return pyhv_fail(error, errno, "lseek SEEK_HOLE", "at offset 0x%llx", (unsigned long long)data);
    reader->data = (uint64_t)data;
    if ((uint64_t)hole < reader->end)
        reader->data_end = (uint64_t)hole;
    return 0;
}

static int reader_open(struct reader *reader, int fd, uint64_t offset, uint64_t size, const uint8_t *mapped,
                       struct pyhv_error *error)
{
    struct stat file;
    *reader = (struct reader){.fd = fd, .begin = offset, .end = offset + size, .mapped = mapped, .pagemap = -1};
    /* As lseek and pread take offsets. The sum above may have gone round, but is not used before this. */
    if (size > INT64_MAX || offset > INT64_MAX - size)
        return pyhv_fail(error, EINVAL, "read memory", "0x%llx bytes at offset 0x%llx", (unsigned long long)size,
                         (unsigned long long)offset);
    if (fstat(fd, &file) < 0)
        return pyhv_fail_errno(error, "fstat");
    /* Behind the end of a file there is nothing either, but that is no hole: it is a file cut short. */
    if ((uint64_t)file.st_size < reader->end)
        return pyhv_fail(error, 0, "read memory", "the file ends at offset 0x%llx, before 0x%llx",
                         (unsigned long long)file.st_size, (unsigned long long)reader->end);
    if (mapped) {
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
        if (find_data(reader, from, error) < 0)
            return -1;
        uint64_t until = reader->data < to ? reader->data : to; /* a hole up to there */
        if (from < until) {
            memset(buffer, 0, until - from);
        } else {
            until = reader->data_end < to ? reader->data_end : to;
            if (pread_all(reader->fd, buffer, until - from, from, error) < 0)
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

/* Fetches the chunk of `size` bytes that begins `at` bytes into the piece. *any: 0 where it is nothing but hole, and
 * `buffer` was not written to. */
static int read_chunk(struct reader *reader, uint64_t at, size_t size, uint8_t *buffer, bool *any,
                      struct pyhv_error *error)
{
    uint64_t pagemap[PAGES_IN_A_CHUNK];
    uint64_t from = reader->begin + at;
    size_t pages = size / PYHV_PAGE_SIZE;
    if (find_data(reader, from, error) < 0)
        return -1;
    *any = reader->data < from + size;
    if (!reader->mapped)
        return *any ? read_file(reader, from, from + size, buffer, error) : 0;

    /* A private mapping of the file: pages that were written since are this process's own, all others are the file's. */
    const uint8_t *mapped = reader->mapped + at;
    uint64_t place = (uintptr_t)mapped / PYHV_PAGE_SIZE * sizeof *pagemap;
    if (pread_all(reader->pagemap, (uint8_t *)pagemap, pages * sizeof *pagemap, place, error) < 0)
        return -1;
    for (size_t page = 0; page < pages && !*any; page++)
        *any = is_own(pagemap[page]);
    for (size_t page = 0, first; page < pages && *any;) {
        bool own = is_own(pagemap[page]);
        for (first = page; page < pages && is_own(pagemap[page]) == own;)
            page++;
        size_t skip = first * PYHV_PAGE_SIZE, length = (page - first) * PYHV_PAGE_SIZE;
        if (own)
            memcpy(buffer + skip, mapped + skip, length);
        else if (read_file(reader, from + skip, from + skip + length, buffer + skip, error) < 0)
            return -1;
    }
    return 0;
}

/* Moves *chunk on to the first one that may have content. */
static int skip_chunks(struct reader *reader, uint64_t *chunk, struct pyhv_error *error)
{
    if (reader->mapped)
        return 0; /* the holes of the file may have been written to in the mapping */
    if (find_data(reader, reader->begin + *chunk * PYHV_CHUNK_SIZE, error) < 0)
        return -1;
    uint64_t next = (reader->data - reader->begin) / PYHV_CHUNK_SIZE;
    if (next > *chunk)
        *chunk = next;
    return 0;
}

static size_t chunk_size(uint64_t size, uint64_t chunk)
{
    uint64_t left = size - chunk * PYHV_CHUNK_SIZE;
    return left < PYHV_CHUNK_SIZE ? (size_t)left : PYHV_CHUNK_SIZE;
}

/* ------------------------------------------------------------------------------------------------- saving -- */

/* One chunk between the two threads. */
struct slot {
    uint8_t *buffer;
    uint64_t chunk;
    uint64_t content[PAGES_IN_A_CHUNK / 64]; /* a bit for every page that is not zero */
};

/* Two threads: a helper reads, looks for zeros and computes sums; the caller writes what is left. Neither waits for
 * the other but over a few slots, and a second processor hides all that the first does beyond what write() costs. */
enum { SLOTS = 4 };
struct pipeline {
    struct reader reader;
    uint64_t size;
    uint64_t chunk; /* where the helper is */
    uint64_t *sums;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    /* Under the lock: */
    uint64_t filled, emptied; /* how many so far; of the n-th the slot is n % SLOTS */
    bool finished;            /* the helper fills no more */
    bool stop;                /* the caller wants no more */
    bool failed;              /* `error` says how the helper did */

    struct pyhv_error error;
    struct slot slots[SLOTS];
};

/* Marks the pages with content; whether there are any. */
static bool find_content(struct slot *slot, size_t size)
{
    bool any = false;
    memset(slot->content, 0, sizeof slot->content);
    for (size_t page = 0; page * PYHV_PAGE_SIZE < size; page++)
        if (!pyhv_is_zero(slot->buffer + page * PYHV_PAGE_SIZE, PYHV_PAGE_SIZE)) {
            slot->content[page / 64] |= UINT64_C(1) << page % 64;
            any = true;
        }
    return any;
}

/* Fills `slot` with the next chunk that has content, and moves past it. 1, or 0 if there is none, or -1. */
static int fill(struct pipeline *pipeline, struct slot *slot)
{
    uint64_t chunks = (pipeline->size + PYHV_CHUNK_SIZE - 1) / PYHV_CHUNK_SIZE;
    for (;;) {
        bool any;
        if (pipeline->chunk < chunks && skip_chunks(&pipeline->reader, &pipeline->chunk, &pipeline->error) < 0)
            return -1;
        if (pipeline->chunk >= chunks)
            return 0;
        slot->chunk = pipeline->chunk++;
        size_t size = chunk_size(pipeline->size, slot->chunk);
        if (read_chunk(&pipeline->reader, slot->chunk * PYHV_CHUNK_SIZE, size, slot->buffer, &any, &pipeline->error) <
            0)
            return -1;
        if (!any || !find_content(slot, size))
            continue; /* its sum is there already */
        pipeline->sums[slot->chunk] = pyhv_xxh64(slot->buffer, size, 0);
        return 1;
    }
}

static void *helper(void *opaque)
{
    struct pipeline *pipeline = opaque;
    int result = 1;
    pthread_mutex_lock(&pipeline->lock);
    while (result > 0) {
        while (pipeline->filled - pipeline->emptied == SLOTS && !pipeline->stop)
            pthread_cond_wait(&pipeline->changed, &pipeline->lock);
        if (pipeline->stop)
            break;
        struct slot *slot = &pipeline->slots[pipeline->filled % SLOTS];
        pthread_mutex_unlock(&pipeline->lock);
        result = fill(pipeline, slot);
        pthread_mutex_lock(&pipeline->lock);
        pipeline->filled += result > 0;
        pthread_cond_signal(&pipeline->changed);
    }
    pipeline->failed = result < 0;
    pipeline->finished = true;
    pthread_cond_signal(&pipeline->changed);
    pthread_mutex_unlock(&pipeline->lock);
    return NULL;
}

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

static bool has_content(const struct slot *slot, size_t page)
{
    return slot->content[page / 64] >> page % 64 & 1;
}

/* Writes the pages of a chunk that have content, in runs; `offset` is the chunk's place in the file. */
static int write_slot(const struct slot *slot, size_t size, int fd, uint64_t offset, struct pyhv_error *error)
{
    size_t pages = size / PYHV_PAGE_SIZE;
    for (size_t page = 0; page < pages;) {
        size_t first = page;
        while (page < pages && has_content(slot, page))
            page++;
        size_t skip = first * PYHV_PAGE_SIZE;
        if (pwrite_all(fd, slot->buffer + skip, (page - first) * PYHV_PAGE_SIZE, offset + skip, error) < 0)
            return -1;
        while (page < pages && !has_content(slot, page))
            page++;
    }
    return 0;
}

/* The disk gets its work in pieces of this many bytes while the rest is still being written, so that the fsync that
 * follows finds little left to do. It makes the device and the processor work at the same time: of the time of a
 * plain write and fsync the second half nearly disappears. */
#define WRITEBACK_SIZE (UINT64_C(8) << 20)

/* The caller's half. */
static int write_all(struct pipeline *pipeline, int fd, uint64_t offset, struct pyhv_error *error)
{
    int result = 0;
    uint64_t writeback = offset; /* everything before it is on its way */
    pthread_mutex_lock(&pipeline->lock);
    for (;;) {
        while (pipeline->filled == pipeline->emptied && !pipeline->finished)
            pthread_cond_wait(&pipeline->changed, &pipeline->lock);
        if (pipeline->filled == pipeline->emptied)
            break;
        struct slot *slot = &pipeline->slots[pipeline->emptied % SLOTS];
        pthread_mutex_unlock(&pipeline->lock);
        size_t size = chunk_size(pipeline->size, slot->chunk);
        uint64_t place = offset + slot->chunk * PYHV_CHUNK_SIZE;
        result = write_slot(slot, size, fd, place, error);
        if (place + size - writeback >= WRITEBACK_SIZE) {
            /* A hint: where it fails, the fsync says why. */
            sync_file_range(fd, (off_t)writeback, (off_t)(place + size - writeback), SYNC_FILE_RANGE_WRITE);
            writeback = place + size;
        }
        pthread_mutex_lock(&pipeline->lock);
        pipeline->emptied++;
        pthread_cond_signal(&pipeline->changed);
        if (result < 0) {
            pipeline->stop = true;
            break;
        }
    }
    pthread_mutex_unlock(&pipeline->lock);
    return result;
}

/* Starts the helper. It takes no signals: those are for the threads that expect them. */
static int start_helper(pthread_t *thread, struct pipeline *pipeline, struct pyhv_error *error)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int errnum = pthread_create(thread, NULL, helper, pipeline);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return errnum ? pyhv_fail(error, errnum, "pthread_create", NULL) : 0;
}

/* With the first chunk in its slot: writes it and all that follow. */
static int run_pipeline(struct pipeline *pipeline, int fd, uint64_t offset, struct pyhv_error *error)
{
    pthread_t thread;
    pthread_mutex_init(&pipeline->lock, NULL);
    pthread_cond_init(&pipeline->changed, NULL);
    int result = start_helper(&thread, pipeline, error);
    if (result == 0) {
        result = write_all(pipeline, fd, offset, error);
        pthread_join(thread, NULL);
        if (result == 0 && pipeline->failed) {
            if (error)
                *error = pipeline->error;
            result = -1;
        }
    }
    pthread_cond_destroy(&pipeline->changed);
    pthread_mutex_destroy(&pipeline->lock);
    return result;
}

static int check_piece(const char *what, uint64_t size, const uint8_t *mapped, struct pyhv_error *error)
{
    if (size % PYHV_PAGE_SIZE || (uintptr_t)mapped % PYHV_PAGE_SIZE)
        return pyhv_fail(error, EINVAL, what, "0x%llx bytes at %p: not whole pages", (unsigned long long)size,
                         (const void *)mapped);
    return 0;
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

int pyhv_pages_save(const struct pyhv_pages *ram, int out_fd, uint64_t out_offset, uint64_t *sums,
                    struct pyhv_error *error)
{
    if (check_piece("pyhv_pages_save", ram->size, ram->mapped, error) < 0)
        return -1;
    struct pipeline *pipeline = calloc(1, sizeof *pipeline);
    uint8_t *buffers = malloc((size_t)SLOTS * PYHV_CHUNK_SIZE);
    int result = -1;
    if (!pipeline || !buffers) {
        pyhv_fail(error, ENOMEM, "pyhv_pages_save", NULL);
        goto out;
    }
    pipeline->size = ram->size;
    pipeline->sums = sums;
    for (int i = 0; i < SLOTS; i++)
        pipeline->slots[i].buffer = buffers + (size_t)i * PYHV_CHUNK_SIZE;

    uint64_t chunks = (ram->size + PYHV_CHUNK_SIZE - 1) / PYHV_CHUNK_SIZE;
    for (uint64_t chunk = 0; chunk < chunks; chunk++)
        sums[chunk] = sum_of_zeros(chunk_size(ram->size, chunk));
    if (reader_open(&pipeline->reader, ram->fd, ram->offset, ram->size, ram->mapped, error) < 0)
        goto out;
    if (extend(out_fd, out_offset + ram->size, error) == 0) {
        /* Most of an idle guest's memory needs no helper: there is nothing in it. */
        result = fill(pipeline, &pipeline->slots[0]);
        if (result < 0 && error)
            *error = pipeline->error;
        pipeline->filled = 1;
        if (result > 0)
            result = run_pipeline(pipeline, out_fd, out_offset, error);
    }
    reader_close(&pipeline->reader);
out:
    free(buffers);
    free(pipeline);
    return result;
}

int pyhv_pages_verify(int fd, uint64_t offset, uint64_t size, const uint64_t *sums, uint64_t *bad_chunk,
                      struct pyhv_error *error)
{
    struct reader reader;
    uint64_t chunks = (size + PYHV_CHUNK_SIZE - 1) / PYHV_CHUNK_SIZE;
    if (check_piece("pyhv_pages_verify", size, NULL, error) < 0 ||
        reader_open(&reader, fd, offset, size, NULL, error) < 0)
        return -1;
    int result = -1;
    uint8_t *buffer = malloc(PYHV_CHUNK_SIZE);
    if (!buffer) {
        pyhv_fail(error, ENOMEM, "pyhv_pages_verify", NULL);
        goto out;
    }
    result = 0;
    for (uint64_t chunk = 0; chunk < chunks && result == 0; chunk++) {
        bool any;
        size_t length = chunk_size(size, chunk);
        result = read_chunk(&reader, chunk * PYHV_CHUNK_SIZE, length, buffer, &any, error);
        if (result == 0 && (any ? pyhv_xxh64(buffer, length, 0) : sum_of_zeros(length)) != sums[chunk]) {
            *bad_chunk = chunk;
            result = 1;
        }
    }
    free(buffer);
out:
    reader_close(&reader);
    return result;
}

/* SPDX-License-Identifier: MIT
 *
 * Pages over a link: finding those that are to go, putting together messages of them, and landing what comes in. The
 * sender's guest may be running; what the receiver is told is not trusted.
 */
#include "migration/link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* A run in a PAGES message; see pyhv.h. */
#define RUN_FIRST_BITS 40
#define RUN_PAGES_BITS 23
#define RUN_PAGES_MAX  ((UINT64_C(1) << RUN_PAGES_BITS) - 1)
#define RUN_ZERO       (UINT64_C(1) << 63)

static uint64_t load64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* What compresses the link's pages: made when compressed pages are first sent or received. */
static struct link_zstd *zstd_of(struct pyhv_link *link, struct pyhv_error *error)
{
    if (!link->zstd)
        link->zstd = link_zstd_create(LINK_ZSTD_MAX, error);
    return link->zstd;
}

/* ------------------------------------------------------------------------------------------------ sending -- */

/* A PAGES message that is being put together. Its content is named in the link's outgoing pieces, behind the first; it
 * stands where the guest has it, or if it is a copy in the link's buffer, behind room for the rest. */
struct parcel {
    uint32_t runs, pages, pieces;
    bool copies;
    uint64_t zero_pages;
    uint64_t run[PYHV_RUNS_MAX];
};

/* A message is sent, full or not, after a look at so many pages: so that the link gets its turn. */
#define SCAN_MAX 32768

/* Pages that are looked at, or copied, at once: they stay in the processor's first cache, and a call to the kernel is
 * worth it. */
#define LOOK_PAGES 8

static uint64_t first_of(uint64_t run)
{
    return run & ((UINT64_C(1) << RUN_FIRST_BITS) - 1);
}

static uint64_t pages_of(uint64_t run)
{
    return run >> RUN_FIRST_BITS & RUN_PAGES_MAX;
}

/* Adds a page to the last run, or a new one; there is room. */
static void add_page(struct parcel *parcel, uint64_t page, bool is_zero)
{
    uint64_t zero = is_zero ? RUN_ZERO : 0;
    if (parcel->runs) {
        uint64_t *last = &parcel->run[parcel->runs - 1];
        if ((*last & RUN_ZERO) == zero && first_of(*last) + pages_of(*last) == page &&
            pages_of(*last) < RUN_PAGES_MAX) {
            *last += UINT64_C(1) << RUN_FIRST_BITS;
            return;
        }
    }
    parcel->run[parcel->runs++] = page | UINT64_C(1) << RUN_FIRST_BITS | zero;
}

/* The first page from `page` on whose bit is set, or `end`. */
static uint64_t find_bit(const uint64_t *bitmap, uint64_t page, uint64_t end)
{
    while (page < end) {
        uint64_t word = bitmap[page / 64] >> page % 64;
        if (word) {
            page += (uint64_t)__builtin_ctzll(word);
            return page < end ? page : end;
        }
        page = (page / 64 + 1) * 64;
    }
    return end;
}

/* How many bits from `page` on are set, `most` at most. They are cleared. */
static uint64_t take_bits(uint64_t *bitmap, uint64_t page, uint64_t most)
{
    uint64_t count = 0;
    while (count < most && (bitmap[(page + count) / 64] >> (page + count) % 64 & 1)) {
        bitmap[(page + count) / 64] &= ~(UINT64_C(1) << (page + count) % 64);
        count++;
    }
    return count;
}

/* Adds a page's content to the last piece, or a new one; there is room. */
static void add_content(struct parcel *parcel, struct iovec *pieces, const uint8_t *data)
{
    struct iovec *last = &pieces[parcel->pieces];
    parcel->pages++;
    if (parcel->pieces && (const uint8_t *)last->iov_base + last->iov_len == data) {
        last->iov_len += PYHV_PAGE_SIZE;
        return;
    }
    pieces[++parcel->pieces] = (struct iovec){(uint8_t *)(uintptr_t)data, PYHV_PAGE_SIZE};
}

/* Fills a parcel, beginning at sending->next.
 *
 * Pages are summed and sent where they stand, though the guest may write to them in between: then it writes after the
 * page's bit was cleared, so that the page is in the dirty log and comes once more. Therefore they may also be sent by
 * reference, and be read by the other side later. Pages of a file, which may be cut short, are copied by a call that
 * fails then; and so are those that go into one frame: copies are not by reference, for the next take their place. */
static int collect(struct pyhv_link *link, struct pyhv_sending *sending, struct parcel *parcel,
                   struct pyhv_error *error)
{
    const struct pyhv_memory *ram = sending->ram;
    bool of_a_file = ram->of_a_file && !ram->anonymous, copies = of_a_file || sending->zstd_level;
    parcel->copies = copies;
    uint64_t total = ram->size / PYHV_PAGE_SIZE, start = sending->next;
    parcel->runs = parcel->pages = parcel->pieces = 0;
    parcel->zero_pages = 0;
    while (parcel->pages < PYHV_PAGES_MAX) {
        uint64_t page = find_bit(sending->bitmap, sending->next, total);
        sending->next = page;
        if (page == total || page - start >= SCAN_MAX)
            return 0;
        /* Each page may need a run of its own. */
        uint64_t room = PYHV_RUNS_MAX - parcel->runs, most = PYHV_PAGES_MAX - parcel->pages;
        most = room < most ? room : most;
        if (most > total - page)
            most = total - page;
        if (most > LOOK_PAGES)
            most = LOOK_PAGES;
        if (most == 0)
            return 0;
        uint64_t count = take_bits(sending->bitmap, page, most);
        size_t size = (size_t)count * PYHV_PAGE_SIZE;
        const uint8_t *data = ram->host + page * PYHV_PAGE_SIZE;
        uint8_t *copy = link->out.buffer + LINK_FRONT + (size_t)parcel->pages * PYHV_PAGE_SIZE;
        if (of_a_file && pyhv_memory_read(data, copy, size, error) < 0)
            return -1;
        if (copies)
            data = of_a_file ? copy : memcpy(copy, data, size);
        for (uint64_t i = 0; i < count; i++, data += PYHV_PAGE_SIZE) {
            bool is_zero = pyhv_is_zero(data, PYHV_PAGE_SIZE);
            add_page(parcel, page + i, is_zero);
            if (is_zero) {
                parcel->zero_pages++;
                continue;
            }
            if (copies && copy != data) /* behind one of zeros */
                memcpy(copy, data, PYHV_PAGE_SIZE);
            add_content(parcel, link->out.pieces.at, copies ? copy : data);
            copy += PYHV_PAGE_SIZE;
        }
        sending->next = page + count;
    }
    return 0;
}

/* Makes a message of the parcel, and returns its bytes on the wire. */
static int64_t dispatch(struct pyhv_link *link, const struct parcel *parcel, int level, struct pyhv_error *error)
{
    uint8_t *content = link->out.buffer + LINK_FRONT;
    size_t size = (size_t)parcel->pages * PYHV_PAGE_SIZE, runs = (size_t)parcel->runs * 8;
    size_t sums = (size_t)parcel->pages * 8, front = LINK_PAGES_HEADER + runs + sums;
    const uint32_t head[2] = {parcel->runs, 0};
    if (level && parcel->pages) {
        struct link_zstd *zstd = zstd_of(link, error);
        if (!zstd)
            return -1;
        memcpy(content - runs - sizeof head, head, sizeof head);
        memcpy(content - runs, parcel->run, runs);
        size_t length = link_compress(zstd, content - runs - sizeof head, LINK_PAGES_HEADER + runs + size, level);
        if (length) { /* else it goes as it is */
            memcpy(link->out.buffer + LINK_HEADER, link_zstd_buffer(zstd), length);
            link_seal(link, PYHV_MESSAGE_PAGES_ZSTD, LINK_HEADER, length, 0);
            return (int64_t)(LINK_HEADER + length);
        }
    }
    memcpy(content - front, head, sizeof head);
    memcpy(content - front + sizeof head, parcel->run, runs);
    uint64_t *sum = (uint64_t *)(void *)(content - sums);
    for (uint32_t i = 1; i <= parcel->pieces; i++) {
        const struct iovec *piece = &link->out.pieces.at[i];
        pyhv_page_sums(piece->iov_base, piece->iov_len / PYHV_PAGE_SIZE, sum);
        sum += piece->iov_len / PYHV_PAGE_SIZE;
    }
    link->out.by_reference = !parcel->copies;
    link_seal(link, PYHV_MESSAGE_PAGES, LINK_FRONT - front, front, parcel->pieces);
    return (int64_t)(LINK_HEADER + front + size);
}

static int send_pages(struct pyhv_link *link, struct pyhv_sending *sending, struct pyhv_error *error)
{
    struct parcel parcel;
    uint64_t deadline = sending->max_ms ? link_now() + sending->max_ms * UINT64_C(1000000) : UINT64_MAX;
    uint64_t total = sending->ram->size / PYHV_PAGE_SIZE, bytes = 0;
    if (sending->ram->size % PYHV_PAGE_SIZE || sending->next > total || total >> RUN_FIRST_BITS)
        return pyhv_fail(error, EINVAL, "pyhv_link_send_pages", "page %llu of %llu", (unsigned long long)sending->next,
                         (unsigned long long)total);
    for (;;) {
        int found = link_wait(link, LINK_SENT | LINK_MESSAGE, deadline, error);
        if (found < 0)
            return -1;
        if (sending->next == total && (found & LINK_SENT)) {
            sending->next = 0;
            return 0;
        }
        if (!(found & LINK_SENT) || (found & LINK_MESSAGE) || (sending->max_bytes && bytes >= sending->max_bytes) ||
            link_now() >= deadline)
            return 1;
        if (collect(link, sending, &parcel, error) < 0)
            return -1;
        if (parcel.runs == 0)
            continue;
        int64_t size = dispatch(link, &parcel, sending->zstd_level, error);
        if (size < 0)
            return -1;
        bytes += (uint64_t)size;
        sending->bytes += (uint64_t)size;
        sending->pages += parcel.pages;
        sending->zero_pages += parcel.zero_pages;
    }
}

int pyhv_link_send_pages(struct pyhv_link *link, struct pyhv_sending *sending, struct pyhv_error *error)
{
    link_enter(link);
    return link_leave(link, send_pages(link, sending, error));
}

/* ------------------------------------------------------------------------------------------------ landing -- */

static void set_bits(uint64_t *bitmap, uint64_t page, uint64_t count)
{
    for (uint64_t end = page + count; page < end; page++)
        bitmap[page / 64] |= UINT64_C(1) << page % 64;
}

/* The other bits' words are passed over. */
static void clear_bits(uint64_t *bitmap, uint64_t page, uint64_t count)
{
    for (uint64_t end = page + count; (page = find_bit(bitmap, page, end)) < end;)
        page += take_bits(bitmap, page, end - page);
}

/* Makes pages zero that had content; their memory is given back. */
static int land_zeros(struct pyhv_landing *landing, uint64_t page, uint64_t count, struct pyhv_error *error)
{
    uint64_t end = page + count;
    clear_bits(landing->unsettled, page, count);
    while ((page = find_bit(landing->written, page, end)) < end) {
        uint64_t some = take_bits(landing->written, page, end - page);
        if (madvise(landing->ram->host + page * PYHV_PAGE_SIZE, some * PYHV_PAGE_SIZE, MADV_DONTNEED) < 0)
            return pyhv_fail(error, errno, "madvise", "clearing pages %llu to %llu", (unsigned long long)page,
                             (unsigned long long)(page + some - 1));
        page += some;
    }
    return 0;
}

/* What a message of pages says, checked. */
struct runs {
    const uint8_t *at;
    uint32_t count;
    uint64_t content, zeros; /* pages */
};

/* Checks the runs of a message: that they ascend, within the RAM, and that there are `unit` bytes for each of their
 * pages with content behind them. */
static int check_runs(struct runs *runs, const struct pyhv_landing *landing, const uint8_t *payload, size_t length,
                      size_t unit, struct pyhv_error *error)
{
    uint64_t total = landing->ram->size / PYHV_PAGE_SIZE, behind = 0;
    uint32_t count = length >= LINK_PAGES_HEADER ? load32(payload) : 0;
    *runs = (struct runs){.at = payload + LINK_PAGES_HEADER, .count = count};
    if (count < 1 || count > PYHV_RUNS_MAX || load32(payload + 4) || length < LINK_PAGES_HEADER + (size_t)count * 8)
        return link_bad(error, "pages: %zu bytes with %u runs", length, count);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t run = load64(runs->at + (size_t)i * 8), first = first_of(run), pages = pages_of(run);
        if (pages == 0 || first < behind || first >= total || pages > total - first)
            return link_bad(error, "pages: run %u has %llu pages from page %llu on, after page %llu, of %llu", i,
                            (unsigned long long)pages, (unsigned long long)first, (unsigned long long)behind,
                            (unsigned long long)total);
        behind = first + pages;
        *(run & RUN_ZERO ? &runs->zeros : &runs->content) += pages;
    }
    if (runs->content > PYHV_PAGES_MAX || length != LINK_PAGES_HEADER + (size_t)count * 8 + runs->content * unit)
        return link_bad(error, "pages: %zu bytes with %u runs of %llu pages", length, count,
                        (unsigned long long)runs->content);
    return 0;
}

/* Prepares the RAM for what is to come: pages of zeros are, and the others count as written. Doing it twice is as good
 * as doing it once. */
static int prepare(struct pyhv_landing *landing, const struct runs *runs, struct pyhv_error *error)
{
    for (uint32_t i = 0; i < runs->count; i++) {
        uint64_t run = load64(runs->at + (size_t)i * 8);
        if (!(run & RUN_ZERO))
            set_bits(landing->written, first_of(run), pages_of(run));
        else if (land_zeros(landing, first_of(run), pages_of(run), error) < 0)
            return -1;
    }
    return 0;
}

static void land_copies(struct pyhv_landing *landing, const struct runs *runs, const uint8_t *data)
{
    for (uint32_t i = 0; i < runs->count; i++) {
        uint64_t run = load64(runs->at + (size_t)i * 8), size = pages_of(run) * PYHV_PAGE_SIZE;
        if (run & RUN_ZERO)
            continue;
        memcpy(landing->ram->host + first_of(run) * PYHV_PAGE_SIZE, data, size);
        clear_bits(landing->unsettled, first_of(run), pages_of(run));
        data += size;
    }
}

/* Names the places where the content goes that has not come yet. */
static void name_pieces(struct link_in *in, const struct pyhv_landing *landing, const struct runs *runs)
{
    size_t skip = in->landed, count = 0;
    for (uint32_t i = 0; i < runs->count; i++) {
        uint64_t run = load64(runs->at + (size_t)i * 8);
        size_t size = pages_of(run) * PYHV_PAGE_SIZE;
        if (run & RUN_ZERO)
            continue;
        if (skip >= size) {
            skip -= size;
            continue;
        }
        in->pieces.at[count++] =
            (struct iovec){landing->ram->host + first_of(run) * PYHV_PAGE_SIZE + skip, size - skip};
        skip = 0;
    }
    in->pieces.at[count] = (struct iovec){in->buffer + in->end, LINK_HEADER};
    in->pieces.next = 0;
    in->pieces.count = count + 1;
}

/* Compares the content with its sums. Where it is another the page was changed on the way, most likely by the guest,
 * which could write to it until it was sent; then it comes again. */
static void check_content(struct pyhv_landing *landing, const struct runs *runs)
{
    const uint8_t *expected = runs->at + (size_t)runs->count * 8;
    for (uint32_t i = 0; i < runs->count; i++) {
        uint64_t run = load64(runs->at + (size_t)i * 8), first = first_of(run), pages = pages_of(run);
        uint64_t sums[PYHV_PAGES_MAX];
        if (run & RUN_ZERO)
            continue;
        pyhv_page_sums(landing->ram->host + first * PYHV_PAGE_SIZE, pages, sums);
        clear_bits(landing->unsettled, first, pages);
        for (uint64_t page = 0; page < pages; page++, expected += sizeof *sums)
            if (sums[page] != load64(expected))
                set_bits(landing->unsettled, first + page, 1);
    }
}

int pyhv_landing_check(const struct pyhv_landing *landing, struct pyhv_error *error)
{
    uint64_t total = landing->ram->size / PYHV_PAGE_SIZE, page = find_bit(landing->unsettled, 0, total);
    if (page == total)
        return 0;
    return link_bad(error, "page %llu was changed on the way, and did not come again", (unsigned long long)page);
}

static int land_content(struct pyhv_link *link, struct pyhv_landing *landing, const struct runs *runs,
                        uint64_t deadline, struct pyhv_error *error)
{
    name_pieces(&link->in, landing, runs);
    int found = link_wait(link, LINK_CONTENT, deadline, error);
    link->in.pieces.next = link->in.pieces.count = 0;
    if (found <= 0)
        return found;
    check_content(landing, runs);
    return 1;
}

int link_land(struct pyhv_link *link, struct pyhv_landing *landing, uint64_t deadline, struct pyhv_error *error)
{
    struct pyhv_message message = link_message(link);
    const uint8_t *payload = message.payload;
    size_t length = message.length, unit = 8;
    struct runs runs;
    if (!landing->ram->anonymous)
        return pyhv_fail(error, EINVAL, "pyhv_link_receive", "pages land in anonymous memory only");
    if (message.type == PYHV_MESSAGE_PAGES_ZSTD) {
        struct link_zstd *zstd = zstd_of(link, error);
        int64_t size = zstd ? link_decompress(zstd, payload, length, error) : -1;
        if (size < 0)
            return -1;
        length = (size_t)size;
        payload = link_zstd_buffer(zstd);
        unit = PYHV_PAGE_SIZE;
    }
    if (check_runs(&runs, landing, payload, length, unit, error) < 0 || prepare(landing, &runs, error) < 0)
        return -1;
    if (message.type == PYHV_MESSAGE_PAGES_ZSTD) {
        land_copies(landing, &runs, runs.at + (size_t)runs.count * 8);
    } else {
        int found = land_content(link, landing, &runs, deadline, error);
        if (found <= 0)
            return found;
    }
    landing->pages += runs.content;
    landing->zero_pages += runs.zeros;
    return 1;
}

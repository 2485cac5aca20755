/* SPDX-License-Identifier: MIT
 *
 * The files of csrc/migration over sockets and pipes, against streams that are made here, byte by byte, and against every
 * way in which they can be wrong. transfer.c is included so that its calls can be made to fail.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "random.h"

static int madvise_errnum; /* 0: the call works */

static int faulty_madvise(void *start, size_t size, int advice)
{
    if (madvise_errnum) {
        errno = madvise_errnum;
        return -1;
    }
    return madvise(start, size, advice);
}

#define madvise faulty_madvise
#include "migration/transfer.c"
#include "migration/zstd.c"
#undef madvise

/* ------------------------------------------------------------------------------------------------- helpers -- */

#define PAGE       ((size_t)PYHV_PAGE_SIZE)
#define TYPE       100   /* any type that is the caller's */
#define LONG_MS    20000 /* longer than any test should take */
#define STREAM_MAX (4 << 20)

static struct pyhv_error error;

static uint64_t now_ms(void)
{
    return link_now() / 1000000;
}

static void sleep_ms(unsigned ms)
{
    const struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&time, NULL);
}

/* The two ends of a connection: of one socket each, or of two pipes. */
struct ends {
    int in[2], out[2]; /* [side] */
};

static struct ends connect_ends(bool pipes)
{
    struct ends ends;
    int one[2], two[2];
    if (pipes) {
        CHECK(pipe(one) == 0 && pipe(two) == 0);
        ends = (struct ends){{one[0], two[0]}, {two[1], one[1]}};
    } else {
        CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM, 0, one), 0);
        ends = (struct ends){{one[0], one[1]}, {one[0], one[1]}};
    }
    return ends;
}

static void close_side(struct ends *ends, int side)
{
    if (ends->in[side] >= 0)
        close(ends->in[side]);
    if (ends->out[side] >= 0 && ends->out[side] != ends->in[side])
        close(ends->out[side]);
    ends->in[side] = ends->out[side] = -1;
}

static struct pyhv_link *open_link(const struct ends *ends, int side, uint32_t heartbeat_ms, uint32_t silence_ms)
{
    const struct pyhv_link_config config = {ends->in[side], ends->out[side], heartbeat_ms, silence_ms};
    struct pyhv_link *link = pyhv_link_create(&config, &error);
    if (!link) {
        fprintf(stderr, "pyhv_link_create: %s %s\n", error.what, error.detail);
        exit(1);
    }
    return link;
}

/* What a call returned, when it should have failed with that errnum. */
#define CHECK_FAILS(call, expected)              \
    do {                                         \
        error = (struct pyhv_error){0};          \
        CHECK_EQUAL(call, -1);                   \
        CHECK_EQUAL(error.errnum, expected);     \
        CHECK(error.what[0] && error.detail[0]); \
    } while (0)

/* A stream that is made here. */
struct stream {
    uint8_t *bytes;
    size_t size;
    uint64_t sum;
};

static void add_message(struct stream *stream, uint32_t type, const void *payload, size_t length)
{
    uint8_t *at = stream->bytes + stream->size;
    uint32_t head[2] = {type, (uint32_t)length};
    stream->sum = pyhv_xxh64(payload, length, pyhv_xxh64(head, 8, stream->sum));
    memcpy(at, head, 8);
    memcpy(at + 8, &stream->sum, 8);
    if (length)
        memcpy(at + 16, payload, length);
    stream->size += 16 + length;
}

static uint64_t run_of(uint64_t first, uint64_t pages, bool zero)
{
    return first | pages << 40 | (uint64_t)zero << 63;
}

/* The payload of a PAGES message of these runs, and so much content behind it. Returns the payload's length. */
static size_t make_pages(uint8_t *payload, const uint64_t *runs, uint32_t count, size_t content)
{
    const uint32_t head[2] = {count, 0};
    uint8_t *sums = payload + 8 + count * sizeof *runs, *pages = sums + content * 8;
    memcpy(payload, head, 8);
    memcpy(payload + 8, runs, count * sizeof *runs);
    fill_random(pages, content * PAGE);
    for (size_t page = 0; page < content; page++) {
        uint64_t sum = pyhv_xxh64(pages + page * PAGE, PAGE, 0);
        memcpy(sums + page * 8, &sum, 8);
    }
    return (size_t)(pages - payload);
}

/* The message with that payload. Its content is copied behind it. */
static void add_pages(struct stream *stream, const uint8_t *payload, size_t length, size_t content)
{
    add_message(stream, PYHV_MESSAGE_PAGES, payload, length);
    memcpy(stream->bytes + stream->size, payload + length, content * PAGE);
    stream->size += content * PAGE;
}

/* A link whose other side says these bytes and closes. */
static struct pyhv_link *told(struct ends *ends, const void *bytes, size_t size)
{
    *ends = connect_ends(false);
    int room = 1 << 20;
    setsockopt(ends->out[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    CHECK_EQUAL(write(ends->out[1], bytes, size), size);
    close_side(ends, 1);
    return open_link(ends, 0, 0, LONG_MS);
}

static void finish(struct pyhv_link *link, struct ends *ends)
{
    pyhv_link_destroy(link);
    close_side(ends, 0);
    close_side(ends, 1);
}

/* RAM for the pages that come in. */
struct target {
    struct pyhv_memory ram;
    uint64_t written[64], unsettled[64];
    struct pyhv_landing landing;
};

static void target_create(struct target *target, size_t pages)
{
    *target = (struct target){0};
    CHECK_EQUAL(pyhv_memory_create_anonymous(&target->ram, pages * PAGE, &error), 0);
    CHECK_EQUAL(madvise(target->ram.host, target->ram.size, MADV_NOHUGEPAGE), 0); /* so that pages can be counted */
    target->landing =
        (struct pyhv_landing){.ram = &target->ram, .written = target->written, .unsettled = target->unsettled};
}

static uint64_t allocated_pages(const struct pyhv_memory *ram)
{
    uint64_t pages[128] = {0};
    CHECK(ram->size / PAGE <= 64 * 128);
    CHECK_EQUAL(pyhv_pages_find(ram, pages, &error), 0);
    return pyhv_pages_count(pages, ram->size / PAGE);
}

/* ---------------------------------------------------------------------------------------------- round trips -- */

struct sender {
    struct pyhv_link *link;
    const uint8_t *data;
    size_t count;
    const size_t *sizes;
    int result;
    struct pyhv_error error;
};

static void *send_all(void *opaque)
{
    struct sender *sender = opaque;
    for (size_t i = 0; i < sender->count && sender->result == 0; i++)
        sender->result =
            pyhv_link_send(sender->link, TYPE + (uint32_t)i, sender->data, sender->sizes[i], i % 2, &sender->error);
    return NULL;
}

static void round_trips(bool pipes)
{
    static const size_t sizes[] = {0, 1, 7, 8, 4095, 4096, 100000, PYHV_MESSAGE_MAX, 0, PYHV_MESSAGE_MAX, 3};
    enum { COUNT = sizeof sizes / sizeof sizes[0] };
    static uint8_t data[PYHV_MESSAGE_MAX];
    fill_random(data, sizeof data);
    struct ends ends = connect_ends(pipes);
    struct pyhv_link *links[2] = {open_link(&ends, 0, 1000, LONG_MS), open_link(&ends, 1, 1000, LONG_MS)};
    for (int from = 0; from < 2; from++) {
        struct sender sender = {.link = links[from], .data = data, .count = COUNT, .sizes = sizes};
        pthread_t thread;
        uint64_t bytes = 0;
        CHECK_EQUAL(pthread_create(&thread, NULL, send_all, &sender), 0);
        for (uint32_t i = 0; i < COUNT; i++) {
            struct pyhv_message message = {0};
            CHECK_EQUAL(pyhv_link_receive(links[!from], NULL, LONG_MS, &message, &error), 1);
            CHECK_EQUAL(message.type, TYPE + i);
            CHECK_EQUAL(message.length, sizes[i]);
            CHECK(message.length == sizes[i] && memcmp(message.payload, data, sizes[i]) == 0);
            bytes += LINK_HEADER + sizes[i];
        }
        pthread_join(thread, NULL);
        CHECK_EQUAL(sender.result, 0);
        CHECK_EQUAL(pyhv_link_counters(links[from])->bytes_sent, bytes);
        CHECK_EQUAL(pyhv_link_counters(links[from])->messages_sent, COUNT);
        CHECK_EQUAL(pyhv_link_counters(links[!from])->bytes_received, bytes);
        CHECK_EQUAL(pyhv_link_counters(links[!from])->messages_received, COUNT);
    }
    /* What cannot be sent. */
    CHECK_FAILS(pyhv_link_send(links[0], TYPE, data, PYHV_MESSAGE_MAX + 1, 0, &error), EINVAL);
    for (uint32_t type = 0; type <= PYHV_MESSAGE_PAGES_ZSTD; type++)
        CHECK_FAILS(pyhv_link_send(links[0], type, data, 0, 0, &error), EINVAL);
    /* Nothing is there, and none of this was sent. */
    struct pyhv_message message;
    CHECK_EQUAL(pyhv_link_receive(links[1], NULL, 0, &message, &error), 0);
    pyhv_link_destroy(links[0]);
    finish(links[1], &ends);
}

struct talker {
    struct pyhv_link *link;
    int sent, received;
};

static void *send_then_receive(void *opaque)
{
    struct talker *talker = opaque;
    static const uint8_t data[PYHV_MESSAGE_MAX];
    struct pyhv_message message;
    talker->sent = pyhv_link_send(talker->link, TYPE, data, sizeof data, 0, NULL);
    talker->received = pyhv_link_receive(talker->link, NULL, LONG_MS, &message, NULL);
    return NULL;
}

/* Both sides send before they receive, over pipes that hold less than the message. */
static void both_send_at_once(void)
{
    struct ends ends = connect_ends(true);
    struct talker talkers[2];
    pthread_t threads[2];
    for (int side = 0; side < 2; side++)
        talkers[side].link = open_link(&ends, side, 50, LONG_MS);
    for (int side = 0; side < 2; side++) {
        CHECK_EQUAL(fcntl(ends.out[side], F_SETPIPE_SZ, 4096), 4096);
        CHECK_EQUAL(pthread_create(&threads[side], NULL, send_then_receive, &talkers[side]), 0);
    }
    for (int side = 0; side < 2; side++) {
        pthread_join(threads[side], NULL);
        CHECK_EQUAL(talkers[side].sent, 0);
        CHECK_EQUAL(talkers[side].received, 1);
    }
    pyhv_link_destroy(talkers[0].link);
    finish(talkers[1].link, &ends);
}

/* ------------------------------------------------------------------------------------- streams that are wrong -- */

/* Three messages and a page: what an honest side may send. ends_at: where each ends. */
enum { HONEST_MESSAGES = 5, HONEST_PAGES = 3 };

static void honest(struct stream *stream, size_t *ends_at)
{
    static uint8_t payload[8 + 8 + 8 + 4096];
    const uint64_t run = run_of(2, 1, false);
    stream->size = 0;
    stream->sum = 0;
    add_message(stream, TYPE, "first", 5);
    ends_at[0] = stream->size;
    add_message(stream, PYHV_MESSAGE_HEARTBEAT, NULL, 0);
    ends_at[1] = stream->size;
    add_message(stream, TYPE + 1, NULL, 0);
    ends_at[2] = stream->size;
    add_pages(stream, payload, make_pages(payload, &run, 1, 1), 1);
    ends_at[HONEST_PAGES] = stream->size;
    add_message(stream, TYPE + 2, "the last one", 12);
    ends_at[4] = stream->size;
}

/* Receives until it fails; returns how many messages came, pages and heartbeats included. */
static uint64_t receive_until_error(struct pyhv_link *link, struct target *target)
{
    struct pyhv_message message;
    int result;
    do {
        result = pyhv_link_receive(link, &target->landing, LONG_MS, &message, &error);
        CHECK(result != 0);
    } while (result == 1);
    CHECK(error.detail[0]);
    return pyhv_link_counters(link)->messages_received;
}

static void end_of_file_at_each_byte(struct stream *stream)
{
    size_t ends_at[HONEST_MESSAGES];
    honest(stream, ends_at);
    size_t content_at = ends_at[HONEST_PAGES] - PAGE;
    for (size_t size = 0; size <= stream->size; size++) {
        struct ends ends;
        struct target target;
        uint64_t whole = 0;
        bool between = size == 0;
        if (size > content_at + 40 && size < content_at + PAGE - 240)
            size += 199;
        target_create(&target, 4);
        struct pyhv_link *link = told(&ends, stream->bytes, size);
        for (int i = 0; i < HONEST_MESSAGES; i++) {
            whole += (i == HONEST_PAGES ? content_at : ends_at[i]) <= size; /* then it counts, its content or not */
            between |= ends_at[i] == size;
        }
        CHECK_EQUAL(receive_until_error(link, &target), whole);
        CHECK_EQUAL(error.errnum, EPIPE);
        CHECK_EQUAL(strstr(error.detail, "within") != NULL, !between);
        CHECK_EQUAL(target.landing.pages, size >= ends_at[HONEST_PAGES]);
        CHECK_EQUAL(allocated_pages(&target.ram), size > content_at);
        pyhv_memory_destroy(&target.ram);
        finish(link, &ends);
    }
}

static void one_bit_flipped_anywhere(struct stream *stream)
{
    size_t ends_at[HONEST_MESSAGES];
    honest(stream, ends_at);
    size_t content_at = ends_at[HONEST_PAGES] - PAGE;
    for (size_t bit = 0; bit < stream->size * 8; bit++) {
        struct ends ends;
        struct target target;
        uint64_t before = 0;
        if (bit / 8 > content_at + 40 && bit / 8 < content_at + PAGE - 240)
            bit += 1001;
        bool in_content = bit / 8 >= content_at && bit / 8 < ends_at[HONEST_PAGES];
        target_create(&target, 4);
        stream->bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        struct pyhv_link *link = told(&ends, stream->bytes, stream->size);
        stream->bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        while (ends_at[before] <= bit / 8)
            before++;
        uint64_t whole = in_content ? HONEST_MESSAGES : before; /* content may still come again */
        CHECK_EQUAL(receive_until_error(link, &target), whole);
        /* A length that has grown is missed at the end of the stream. */
        size_t in_header = bit / 8 - (before ? ends_at[before - 1] : 0);
        CHECK(in_content ? error.errnum == EPIPE
                         : error.errnum == EBADMSG || (error.errnum == EPIPE && in_header >= 4 && in_header < 8));
        CHECK_EQUAL(allocated_pages(&target.ram), before > HONEST_PAGES || in_content);
        CHECK_EQUAL(target.landing.pages, before > HONEST_PAGES || in_content);
        /* And it stays an error. */
        CHECK_FAILS(receive_until_error(link, &target) > whole ? 0 : -1, error.errnum);
        CHECK_EQUAL(pyhv_landing_check(&target.landing, &error), in_content ? -1 : 0);
        CHECK(!in_content || error.errnum == EBADMSG);
        CHECK(!in_content || strcmp(error.detail, "page 2 was changed on the way, and did not come again") == 0);
        pyhv_memory_destroy(&target.ram);
        finish(link, &ends);
    }
}

/* One message missing, one twice, two exchanged. */
static void lost_repeated_and_exchanged(struct stream *stream)
{
    size_t ends_at[HONEST_MESSAGES];
    honest(stream, ends_at);
    static uint8_t bytes[3 * 8192];
    for (int i = 0; i < HONEST_MESSAGES; i++)
        for (int how = 0; how < 3; how++) {
            struct ends ends;
            struct target target;
            size_t size = 0;
            if (i == HONEST_MESSAGES - 1 && how != 1)
                continue; /* a missing end is not seen but by whoever waits for it */
            for (int j = 0; j < HONEST_MESSAGES; j++) {
                int take = how == 2 && (j == i || j == i + 1) ? 2 * i + 1 - j : j;
                size_t from = take ? ends_at[take - 1] : 0;
                for (int times = how == 0 && j == i ? 0 : how == 1 && j == i ? 2 : 1; times > 0; times--) {
                    memcpy(bytes + size, stream->bytes + from, ends_at[take] - from);
                    size += ends_at[take] - from;
                }
            }
            target_create(&target, 4);
            struct pyhv_link *link = told(&ends, bytes, size);
            CHECK_EQUAL(receive_until_error(link, &target), how == 1 ? i + 1 : i);
            CHECK_EQUAL(error.errnum, EBADMSG);
            pyhv_memory_destroy(&target.ram);
            finish(link, &ends);
        }
}

/* Refused by their headers alone: the rest need not come. */
static void headers_that_are_refused(void)
{
    static const uint32_t heads[][2] = {
        {0, 0},
        {0, 5},
        {PYHV_MESSAGE_HEARTBEAT, 1},
        {PYHV_MESSAGE_PAGES, LINK_PAGES_MAX + 1},
        {PYHV_MESSAGE_PAGES_ZSTD, LINK_ZSTD_MAX + 1},
        {4, PYHV_MESSAGE_MAX + 1},
        {TYPE, PYHV_MESSAGE_MAX + 1},
        {TYPE, UINT32_MAX},
        {UINT32_MAX, UINT32_MAX},
    };
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++)
        for (int after_another = 0; after_another < 2; after_another++) {
            uint8_t bytes[64];
            struct stream stream = {.bytes = bytes};
            struct ends ends = connect_ends(true);
            struct pyhv_link *link = open_link(&ends, 0, 0, LONG_MS);
            struct pyhv_message message;
            if (after_another) /* then the header comes in together with it */
                add_message(&stream, TYPE, "x", 1);
            memcpy(bytes + stream.size, heads[i], 8);
            memset(bytes + stream.size + 8, 0, 8);
            CHECK_EQUAL(write(ends.out[1], bytes, stream.size + 16), stream.size + 16);
            if (after_another)
                CHECK_EQUAL(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), 1);
            for (int times = 0; times < 3; times++)
                CHECK_FAILS(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), EBADMSG);
            finish(link, &ends);
        }
}

static void runs_that_are_refused(void)
{
    enum { RAM = 300 }; /* pages */
    static const struct {
        const char *name;
        uint64_t runs[4];
        uint32_t count, zero;
        size_t content; /* pages of it that come, with a sum each */
        int extra;      /* bytes of the payload more than there should be */
    } cases[] = {
        {"no runs", {0}, 0, 0, 0, 0},
        {"more runs than come", {1}, 5, 0, 0, -32},
        {"more runs than allowed", {1}, PYHV_RUNS_MAX + 1, 0, 0, 0},
        {"reserved bits", {UINT64_C(1) << 40}, 1, 1, 1, 0},
        {"a run of no pages", {5}, 1, 0, 0, 0},
        {"zeros, no pages", {5 | UINT64_C(1) << 63}, 1, 0, 0, 0},
        {"behind the RAM", {RAM | UINT64_C(1) << 40}, 1, 0, 1, 0},
        {"beyond the RAM", {(RAM - 1) | UINT64_C(2) << 40}, 1, 0, 2, 0},
        {"zeros beyond the RAM", {UINT64_C(301) << 40 | UINT64_C(1) << 63}, 1, 0, 0, 0},
        {"zeros, all of them", {0 | UINT64_C(0x7fffff) << 40 | UINT64_C(1) << 63}, 1, 0, 0, 0},
        {"the last page there is", {UINT64_C(0xffffffffff) | UINT64_C(1) << 40}, 1, 0, 1, 0},
        {"overlapping", {3 | UINT64_C(2) << 40, 4 | UINT64_C(1) << 40}, 2, 0, 3, 0},
        {"descending", {3 | UINT64_C(1) << 40, 2 | UINT64_C(1) << 40}, 2, 0, 2, 0},
        {"less sums", {3 | UINT64_C(2) << 40}, 1, 0, 1, 0},
        {"more sums", {3 | UINT64_C(2) << 40}, 1, 0, 3, 0},
        {"a byte less", {3 | UINT64_C(2) << 40}, 1, 0, 2, -1},
        {"a byte more", {3 | UINT64_C(2) << 40}, 1, 0, 2, 1},
        {"sums for zeros", {3 | UINT64_C(2) << 40 | UINT64_C(1) << 63}, 1, 0, 2, 0},
        {"too many pages", {0 | UINT64_C(65) << 40}, 1, 0, 65, 0},
    };
    static uint8_t payload[LINK_PAGES_MAX + 66 * 4096], bytes[2 * sizeof payload];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct stream stream = {.bytes = bytes};
        struct target target;
        struct ends ends;
        static const uint64_t none[64];
        uint64_t many[PYHV_RUNS_MAX + 1] = {0};
        memcpy(many, cases[i].runs, sizeof cases[i].runs);
        size_t length = make_pages(payload, many, cases[i].count, cases[i].content);
        memcpy(payload + 4, &cases[i].zero, 4);
        length = (size_t)((int64_t)length + cases[i].extra);
        add_pages(&stream, payload, length, cases[i].content);
        target_create(&target, RAM);
        struct pyhv_link *link = told(&ends, bytes, stream.size);
        receive_until_error(link, &target);
        if (error.errnum != EBADMSG || strncmp(error.detail, "pages: ", 7) != 0)
            fprintf(stderr, "%s: %s\n", cases[i].name, error.detail);
        CHECK_EQUAL(error.errnum, EBADMSG);
        CHECK_EQUAL(allocated_pages(&target.ram), 0);
        CHECK(memcmp(target.written, none, sizeof none) == 0);
        CHECK(target.landing.pages == 0 && target.landing.zero_pages == 0);
        pyhv_memory_destroy(&target.ram);
        finish(link, &ends);
    }
    for (size_t length = 0; length < 8; length++) { /* no head */
        struct stream stream = {.bytes = bytes};
        struct target target;
        struct ends ends;
        memset(payload, 0, 8);
        payload[0] = 1;
        add_message(&stream, PYHV_MESSAGE_PAGES, payload, length);
        target_create(&target, RAM);
        struct pyhv_link *link = told(&ends, bytes, stream.size);
        receive_until_error(link, &target);
        CHECK_EQUAL(error.errnum, EBADMSG);
        pyhv_memory_destroy(&target.ram);
        finish(link, &ends);
    }
}

/* Content that comes in pieces of any size, and stands still at any place: what else the link does meanwhile does not
 * disturb it, and each byte comes to its place. */
static void content_in_pieces(struct stream *stream)
{
    enum { RAM = 40 };
    const uint64_t runs[] = {run_of(1, 2, false), run_of(5, 3, true), run_of(8, 1, false), run_of(30, 3, false)};
    static uint8_t payload[LINK_PAGES_MAX + 6 * 4096], expected[RAM * 4096];
    for (int round = 0; round < 60; round++) {
        struct target target;
        struct ends ends = connect_ends(round % 2);
        struct pyhv_link *link = open_link(&ends, 0, 0, LONG_MS);
        struct pyhv_message message;
        stream->size = stream->sum = 0;
        memset(expected, 0, sizeof expected);
        target_create(&target, RAM);
        for (int i = 0; i < 3; i++) { /* the same pages with other content */
            size_t length = make_pages(payload, runs, 4, 6);
            add_pages(stream, payload, length, 6);
            memcpy(expected + PAGE, payload + length, 2 * PAGE);
            memcpy(expected + 8 * PAGE, payload + length + 2 * PAGE, PAGE);
            memcpy(expected + 30 * PAGE, payload + length + 3 * PAGE, 3 * PAGE);
            if (i < 2)
                add_message(stream, PYHV_MESSAGE_HEARTBEAT, NULL, 0);
        }
        add_message(stream, TYPE, "end", 3);
        for (size_t at = 0; at < stream->size;) {
            size_t most = random64() % 3 ? 20000 : 40, part = 1 + random64() % most;
            part = part < stream->size - at ? part : stream->size - at;
            CHECK_EQUAL(write(ends.out[1], stream->bytes + at, part), part);
            at += part;
            int found = pyhv_link_receive(link, &target.landing, 0, &message, &error);
            CHECK_EQUAL(found, at == stream->size);
            if (found < 0)
                break;
            CHECK_EQUAL(pyhv_link_send(link, TYPE, "aside", 5, 0, &error), 0);
            CHECK_EQUAL(read(ends.in[1], payload, sizeof payload), LINK_HEADER + 5);
        }
        CHECK(message.type == TYPE && message.length == 3 && memcmp(message.payload, "end", 3) == 0);
        CHECK(memcmp(target.ram.host, expected, sizeof expected) == 0);
        CHECK_EQUAL(target.landing.pages, 3 * 6);
        CHECK_EQUAL(target.landing.zero_pages, 3 * 3);
        CHECK_EQUAL(pyhv_link_counters(link)->messages_received, 6);
        CHECK_EQUAL(pyhv_link_counters(link)->bytes_received, stream->size);
        pyhv_memory_destroy(&target.ram);
        finish(link, &ends);
    }
}

static void pages_that_were_not_expected(struct stream *stream)
{
    const uint64_t run = run_of(0, 3, true);
    uint8_t payload[64];
    struct ends ends;
    struct pyhv_message message;
    stream->size = stream->sum = 0;
    add_pages(stream, payload, make_pages(payload, &run, 1, 0), 0);
    struct pyhv_link *link = told(&ends, stream->bytes, stream->size);
    CHECK_FAILS(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), EBADMSG);
    CHECK(strstr(error.detail, "not expected"));
    finish(link, &ends);
}

/* --------------------------------------------------------------------------------------------------- closing -- */

static unsigned signals;

static void on_signal(int number)
{
    (void)number;
    signals++;
}

/* Sending to nobody is an error and no signal; and what the other side said before it closed can still be read. */
static void sending_to_nobody(bool pipes)
{
    static uint8_t data[PYHV_MESSAGE_MAX];
    uint8_t bytes[64];
    struct stream stream = {.bytes = bytes};
    struct pyhv_message message;
    struct ends ends = connect_ends(pipes);
    signal(SIGPIPE, on_signal);
    signals = 0;
    struct pyhv_link *link = open_link(&ends, 0, 0, LONG_MS);
    add_message(&stream, TYPE, "no memory", 9);
    CHECK_EQUAL(write(ends.out[1], bytes, stream.size), stream.size);
    close_side(&ends, 1);
    for (int times = 0; times < 2; times++)
        CHECK_FAILS(pyhv_link_send(link, TYPE, data, sizeof data, 0, &error), EPIPE);
    CHECK_EQUAL(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), 1);
    CHECK(message.length == 9 && memcmp(message.payload, "no memory", 9) == 0);
    CHECK_FAILS(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), EPIPE);
    CHECK_EQUAL(signals, 0);
    signal(SIGPIPE, SIG_IGN);
    finish(link, &ends);
}

/* A socket whose other side left our bytes unread is reset; a terminal's says EIO: both mean closed. */
static void other_ways_to_close(void)
{
    struct pyhv_message message;
    struct ends ends = connect_ends(false);
    struct pyhv_link *link = open_link(&ends, 0, 0, LONG_MS);
    CHECK_EQUAL(pyhv_link_send(link, TYPE, "unread", 6, 0, &error), 0);
    close_side(&ends, 1);
    CHECK_FAILS(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), EPIPE);
    finish(link, &ends);

    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal < 0 || grantpt(terminal) < 0 || unlockpt(terminal) < 0) {
        printf("test_link: not tested: a terminal that hangs up: %s\n", strerror(errno));
        return;
    }
    close(open(ptsname(terminal), O_RDWR | O_NOCTTY));
    ends = (struct ends){{terminal, -1}, {terminal, -1}};
    link = open_link(&ends, 0, 0, LONG_MS);
    CHECK_FAILS(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), EPIPE);
    finish(link, &ends);
}

static void descriptors_that_are_none(void)
{
    struct ends ends = connect_ends(false);
    struct pyhv_link_config config = {.in_fd = ends.in[0], .out_fd = 999};
    CHECK(!pyhv_link_create(&config, &error));
    CHECK_EQUAL(error.errnum, EBADF);
    config = (struct pyhv_link_config){.in_fd = -1, .out_fd = ends.out[0]};
    CHECK(!pyhv_link_create(&config, &error));
    pyhv_link_destroy(NULL);
    close_side(&ends, 0);
    close_side(&ends, 1);
}

/* ------------------------------------------------------------------------------------- time and cancellation -- */

enum { SILENCE = 60 };

/* Runs in one of the places where a link waits. */
enum place { RECEIVING, SENDING, SENDING_PAGES, PLACES };

static int wait_in(enum place place, struct pyhv_link *link, struct pyhv_error *failure)
{
    static uint8_t data[PYHV_MESSAGE_MAX];
    struct pyhv_message message;
    if (place == RECEIVING)
        return pyhv_link_receive(link, NULL, LONG_MS, &message, failure);
    if (place == SENDING) {
        int result = 0;
        for (int i = 0; i < 64 && result == 0; i++)
            result = pyhv_link_send(link, TYPE, data, sizeof data, 0, failure);
        return result;
    }
    struct pyhv_memory ram;
    uint64_t bitmap[64];
    memset(bitmap, 0xff, sizeof bitmap);
    CHECK_EQUAL(pyhv_memory_create(&ram, 64 * 64 * PAGE, failure), 0);
    memset(ram.host, 1, ram.size);
    struct pyhv_sending sending = {.ram = &ram, .bitmap = bitmap};
    int result = pyhv_link_send_pages(link, &sending, failure);
    pyhv_memory_destroy(&ram);
    return result;
}

static void silence(bool pipes)
{
    for (enum place place = RECEIVING; place < PLACES; place++) {
        struct ends ends = connect_ends(pipes);
        struct pyhv_link *link = open_link(&ends, 0, 10, SILENCE);
        uint64_t start = now_ms();
        CHECK_FAILS(wait_in(place, link, &error), ETIMEDOUT);
        uint64_t took = now_ms() - start;
        CHECK(took >= SILENCE && took < LONG_MS);
        finish(link, &ends);
    }
}

struct canceller {
    struct pyhv_link *link;
    unsigned after_ms;
};

static void *cancel_later(void *opaque)
{
    struct canceller *canceller = opaque;
    sleep_ms(canceller->after_ms);
    pyhv_link_cancel(canceller->link);
    return NULL;
}

static void cancelling(bool pipes)
{
    for (enum place place = RECEIVING; place < PLACES; place++)
        for (unsigned after_ms = 0; after_ms < 40; after_ms += 20) {
            struct ends ends = connect_ends(pipes);
            struct canceller canceller = {open_link(&ends, 0, 5, LONG_MS), after_ms};
            pthread_t thread;
            uint64_t start = now_ms();
            CHECK_EQUAL(pthread_create(&thread, NULL, cancel_later, &canceller), 0);
            CHECK_FAILS(wait_in(place, canceller.link, &error), ECANCELED);
            CHECK(now_ms() - start < LONG_MS / 2);
            pthread_join(thread, NULL);
            for (enum place again = RECEIVING; again < PLACES; again++)
                CHECK_FAILS(wait_in(again, canceller.link, &error), ECANCELED);
            finish(canceller.link, &ends);
        }
}

/* The other side of a link, which takes a byte and gives a heartbeat every few milliseconds: never silent. */
struct trickler {
    int in, out;
    atomic_bool over;
};

static void *trickle(void *opaque)
{
    struct trickler *trickler = opaque;
    struct stream stream = {.bytes = malloc(64)};
    while (!atomic_load(&trickler->over)) {
        uint8_t byte;
        CHECK(read(trickler->in, &byte, 1) <= 1);
        stream.size = 0;
        add_message(&stream, PYHV_MESSAGE_HEARTBEAT, NULL, 0);
        CHECK(write(trickler->out, stream.bytes, stream.size) == (ssize_t)stream.size);
        sleep_ms(2);
    }
    free(stream.bytes);
    return NULL;
}

/* Each call ends when the link's time is over, though the other side is never silent; without a limit it would not. */
static void limits(bool pipes)
{
    enum { LIMIT = 80 };
    for (enum place place = RECEIVING; place < PLACES; place++) {
        struct ends ends = connect_ends(pipes);
        struct pyhv_link *link = open_link(&ends, 0, 10, 2000);
        CHECK_EQUAL(fcntl(ends.in[1], F_SETFL, O_NONBLOCK), 0);
        struct trickler trickler = {.in = ends.in[1], .out = ends.out[1]};
        pthread_t thread;
        CHECK_EQUAL(pthread_create(&thread, NULL, trickle, &trickler), 0);
        pyhv_link_set_limit(link, LIMIT);
        uint64_t start = now_ms();
        CHECK_FAILS(wait_in(place, link, &error), ETIME);
        uint64_t took = now_ms() - start;
        CHECK(took >= LIMIT && took < LONG_MS / 2);
        struct pyhv_message message;
        pyhv_link_set_limit(link, 0);
        CHECK_EQUAL(pyhv_link_receive(link, NULL, LIMIT, &message, &error), 0);
        atomic_store(&trickler.over, true);
        pthread_join(thread, NULL);
        finish(link, &ends);
    }
}

/* After a cancel the link has a last word. */
static void last_words(bool pipes)
{
    struct ends ends = connect_ends(pipes);
    struct pyhv_link *links[2] = {open_link(&ends, 0, 0, LONG_MS), open_link(&ends, 1, 0, LONG_MS)};
    struct pyhv_message message;
    pyhv_link_cancel(links[0]);
    CHECK_FAILS(pyhv_link_receive(links[0], NULL, LONG_MS, &message, &error), ECANCELED);
    pyhv_link_revive(links[0]);
    CHECK_EQUAL(pyhv_link_receive(links[0], NULL, 10, &message, &error), 0);
    CHECK_EQUAL(pyhv_link_send(links[0], TYPE, "bye", 3, 0, &error), 0);
    CHECK_EQUAL(pyhv_link_receive(links[1], NULL, LONG_MS, &message, &error), 1);
    CHECK_EQUAL(message.length, 3);
    pyhv_link_cancel(links[0]);
    CHECK_FAILS(pyhv_link_receive(links[0], NULL, LONG_MS, &message, &error), ECANCELED);
    pyhv_link_destroy(links[1]);
    finish(links[0], &ends);
}

struct waiter {
    struct pyhv_link *link;
    uint32_t ms;
    int result;
    struct pyhv_error error;
};

static void *wait_for_nothing(void *opaque)
{
    struct waiter *waiter = opaque;
    struct pyhv_message message;
    waiter->result = pyhv_link_receive(waiter->link, NULL, waiter->ms, &message, &waiter->error);
    return NULL;
}

/* Two sides that only wait keep each other alive. */
static void heartbeats_of_two_that_wait(bool pipes)
{
    struct ends ends = connect_ends(pipes);
    struct waiter waiters[2];
    pthread_t threads[2];
    for (int side = 0; side < 2; side++) {
        waiters[side] = (struct waiter){.link = open_link(&ends, side, 10, 200), .ms = 500};
        CHECK_EQUAL(pthread_create(&threads[side], NULL, wait_for_nothing, &waiters[side]), 0);
    }
    for (int side = 0; side < 2; side++) {
        pthread_join(threads[side], NULL);
        CHECK_EQUAL(waiters[side].result, 0);
        uint64_t beats = pyhv_link_counters(waiters[side].link)->messages_sent;
        CHECK(beats >= 5 && beats <= 51);
    }
    pyhv_link_destroy(waiters[0].link);
    finish(waiters[1].link, &ends);
}

struct reader {
    int in, out;
    unsigned beats_before; /* sends so many heartbeats, one in 20 ms, before it reads anything */
    size_t at_once;        /* and then reads so many bytes a ms */
    uint64_t bytes;
};

static void *read_slowly(void *opaque)
{
    struct reader *reader = opaque;
    uint8_t bytes[16 * 64];
    static uint8_t sink[1 << 20];
    struct stream stream = {.bytes = bytes};
    for (unsigned i = 0; i < reader->beats_before; i++) {
        add_message(&stream, PYHV_MESSAGE_HEARTBEAT, NULL, 0);
        CHECK_EQUAL(write(reader->out, bytes + stream.size - 16, 16), 16);
        sleep_ms(20);
    }
    ssize_t got;
    while ((got = read(reader->in, sink, reader->at_once)) > 0) {
        reader->bytes += (uint64_t)got;
        sleep_ms(1);
    }
    return NULL;
}

/* A side that is kept from sending hears the other's heartbeats, and its own bytes arrive however slowly they are read:
 * 16 messages of 256 KiB, more than any buffer holds. */
static void slow_reader(bool pipes)
{
    size_t sizes[16];
    static uint8_t data[256 * 1024];
    for (int i = 0; i < 16; i++)
        sizes[i] = sizeof data;
    struct ends ends = connect_ends(pipes);
    struct reader reader = {.in = ends.in[1], .out = ends.out[1], .beats_before = 20, .at_once = 100000};
    struct sender sender = {.link = open_link(&ends, 0, 10, 200), .data = data, .count = 16, .sizes = sizes};
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, read_slowly, &reader), 0);
    pyhv_link_set_times(sender.link, 10, 150);
    /* For the 400 ms in which nothing is read it lives on heartbeats; then 4 MiB take 40 ms, and no heartbeats come. */
    send_all(&sender);
    CHECK_EQUAL(sender.result, 0);
    pyhv_link_destroy(sender.link);
    close_side(&ends, 0);
    pthread_join(thread, NULL);
    CHECK_EQUAL(reader.bytes, 16 * (LINK_HEADER + sizeof data));
    close_side(&ends, 1);
}

/* A deadline holds though there is always more to read: heartbeats, made beforehand, for longer than any deadline. */
enum { BEATS = 2000000 };

struct chatter {
    int fd;
    struct stream stream;
};

static void *chat(void *opaque)
{
    struct chatter *chatter = opaque;
    for (size_t at = 0; at < chatter->stream.size;) {
        ssize_t put = send(chatter->fd, chatter->stream.bytes + at, chatter->stream.size - at, MSG_NOSIGNAL);
        if (put <= 0)
            break;
        at += (size_t)put;
    }
    return NULL;
}

static void endless_talk(void)
{
    struct stream stream = {.bytes = malloc((size_t)BEATS * LINK_HEADER)};
    for (int i = 0; i < BEATS; i++)
        add_message(&stream, PYHV_MESSAGE_HEARTBEAT, NULL, 0);
    for (uint32_t timeout = 0; timeout <= 50; timeout += 50) {
        struct ends ends = connect_ends(false);
        struct chatter chatter = {ends.out[1], stream};
        pthread_t thread;
        struct pyhv_message message;
        struct pyhv_link *link = open_link(&ends, 0, 0, LONG_MS);
        CHECK_EQUAL(pthread_create(&thread, NULL, chat, &chatter), 0);
        sleep_ms(5);
        uint64_t start = now_ms();
        CHECK_EQUAL(pyhv_link_receive(link, NULL, timeout, &message, &error), 0);
        CHECK(now_ms() - start >= timeout);
        CHECK(pyhv_link_counters(link)->messages_received < BEATS);
        pyhv_link_destroy(link);
        close_side(&ends, 0);
        pthread_join(thread, NULL);
        close_side(&ends, 1);
    }
    free(stream.bytes);
}

/* Time between calls is not silence. */
static void time_between_calls(void)
{
    struct ends ends = connect_ends(false);
    struct pyhv_link *link = open_link(&ends, 0, 0, 100);
    struct pyhv_message message;
    CHECK_EQUAL(pyhv_link_receive(link, NULL, 1, &message, &error), 0);
    sleep_ms(200);
    CHECK_EQUAL(pyhv_link_receive(link, NULL, 1, &message, &error), 0);
    CHECK_FAILS(pyhv_link_receive(link, NULL, LONG_MS, &message, &error), ETIMEDOUT);
    finish(link, &ends);
}

/* ----------------------------------------------------------------------------------------------------- pages -- */

struct transfer {
    struct ends ends;
    struct pyhv_link *links[2];
    struct pyhv_memory from;
    struct target to;
    uint64_t bitmap[64];
    struct pyhv_sending sending;
    pthread_t thread;
    int received;
    struct pyhv_message message;
    struct pyhv_error error;
};

static void *receive_pages(void *opaque)
{
    struct transfer *transfer = opaque;
    transfer->received =
        pyhv_link_receive(transfer->links[1], &transfer->to.landing, LONG_MS, &transfer->message, &transfer->error);
    return NULL;
}

static void transfer_begin(struct transfer *transfer, bool pipes, size_t pages)
{
    *transfer = (struct transfer){.ends = connect_ends(pipes)};
    for (int side = 0; side < 2; side++)
        transfer->links[side] = open_link(&transfer->ends, side, 100, LONG_MS);
    CHECK_EQUAL(pyhv_memory_create(&transfer->from, pages * PAGE, &error), 0);
    target_create(&transfer->to, pages);
    transfer->sending = (struct pyhv_sending){.ram = &transfer->from, .bitmap = transfer->bitmap};
}

/* Sends what is in the bitmap, and a message to say that it was all. */
static void transfer_round(struct transfer *transfer)
{
    CHECK_EQUAL(pthread_create(&transfer->thread, NULL, receive_pages, transfer), 0);
    error.detail[0] = '\0';
    CHECK_EQUAL(pyhv_link_send_pages(transfer->links[0], &transfer->sending, &error), 0);
    CHECK_EQUAL(pyhv_link_send(transfer->links[0], TYPE, "end", 3, 0, &error), 0);
    pthread_join(transfer->thread, NULL);
    CHECK_EQUAL(transfer->received, 1);
    if (transfer->received != 1)
        fprintf(stderr, "%s %s\n", transfer->error.what, transfer->error.detail);
    CHECK_EQUAL(transfer->sending.next, 0);
    CHECK_EQUAL(pyhv_pages_count(transfer->bitmap, transfer->from.size / PAGE), 0);
}

static void transfer_end(struct transfer *transfer)
{
    CHECK(memcmp(transfer->from.host, transfer->to.ram.host, transfer->from.size) == 0);
    CHECK_EQUAL(pyhv_landing_check(&transfer->to.landing, &error), 0);
    CHECK_EQUAL(transfer->sending.pages, transfer->to.landing.pages);
    CHECK_EQUAL(transfer->sending.zero_pages, transfer->to.landing.zero_pages);
    CHECK_EQUAL(pyhv_link_counters(transfer->links[0])->bytes_sent,
                pyhv_link_counters(transfer->links[1])->bytes_received);
    pyhv_link_destroy(transfer->links[0]);
    finish(transfer->links[1], &transfer->ends);
    pyhv_memory_destroy(&transfer->from);
    pyhv_memory_destroy(&transfer->to.ram);
}

/* Random memory, random bitmaps, pages that become zero again, in rounds. */
static void random_rounds(bool pipes, int zstd_level)
{
    enum { PAGES = 4096 - 7 };
    for (int density = 0; density < 4; density++) {
        struct transfer transfer;
        static const uint64_t masks[] = {UINT64_MAX, 0xffff, 0, 0x8001000180000001u};
        transfer_begin(&transfer, pipes, PAGES);
        transfer.sending.zstd_level = zstd_level;
        for (size_t page = 0; page < PAGES; page++)
            if (random64() >> 8 & 3)
                fill_random(transfer.from.host + page * PAGE, random64() % 2 ? PAGE : 8);
        for (int round = 0; round < 3; round++) {
            for (size_t page = 0; page < PAGES; page++) /* all of round 0: its bits must be complete */
                if (round == 0 || (masks[density] ? masks[density] >> page % 64 & 1 : random64() >> 20 & 1)) {
                    transfer.bitmap[page / 64] |= UINT64_C(1) << page % 64;
                    if (round == 0)
                        continue;
                    memset(transfer.from.host + page * PAGE, 0, PAGE);
                    if (random64() >> 30 & 1)
                        transfer.from.host[page * PAGE + random64() % PAGE] = 1; /* a byte anywhere is content */
                }
            transfer_round(&transfer);
        }
        /* Zeros take no memory at the receiver. */
        uint64_t content = 0;
        for (size_t page = 0; page < PAGES; page++) {
            bool is_zero = pyhv_is_zero(transfer.from.host + page * PAGE, PAGE);
            content += !is_zero;
            CHECK_EQUAL(transfer.to.written[page / 64] >> page % 64 & 1, !is_zero);
        }
        CHECK_EQUAL(allocated_pages(&transfer.to.ram), content);
        transfer_end(&transfer);
    }
}

static void zeros_are_elided(void)
{
    struct transfer transfer;
    transfer_begin(&transfer, false, 4096);
    pyhv_link_set_times(transfer.links[0], 0, LONG_MS); /* messages are counted below: no heartbeats */
    set_bits(transfer.bitmap, 0, 4096);
    transfer.from.host[4095 * PAGE + 4095] = 1;
    transfer_round(&transfer);
    CHECK_EQUAL(transfer.sending.pages, 1);
    CHECK_EQUAL(transfer.sending.zero_pages, 4095);
    CHECK(transfer.sending.bytes < PAGE + 200);
    /* Each a run of its own: more than one message takes. */
    memset(transfer.bitmap, 0x55, sizeof transfer.bitmap);
    transfer_round(&transfer);
    CHECK_EQUAL(transfer.sending.zero_pages, 4095 + 2048);
    CHECK_EQUAL(pyhv_link_counters(transfer.links[0])->messages_sent, 2 + 2048 / PYHV_RUNS_MAX + 1);
    transfer_end(&transfer);
}

struct writer {
    struct pyhv_memory *ram;
    _Atomic bool stop;
};

static void *write_all_the_time(void *opaque)
{
    struct writer *writer = opaque;
    uint64_t state = 1;
    while (!writer->stop) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint64_t *at = (uint64_t *)(void *)(writer->ram->host + (state >> 20) % writer->ram->size / 8 * 8);
        __atomic_store_n(at, state >> 60 ? state : 0, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* A guest that writes while its pages are sent is no checksum error, and when it stops its last round is complete. */
static void a_guest_that_writes(void)
{
    struct transfer transfer;
    pthread_t thread;
    transfer_begin(&transfer, false, 512);
    struct writer writer = {.ram = &transfer.from};
    CHECK_EQUAL(pthread_create(&thread, NULL, write_all_the_time, &writer), 0);
    for (int round = 0; round < 40; round++) {
        set_bits(transfer.bitmap, 0, 512);
        transfer.sending.zstd_level = round % 4 == 3 && pyhv_zstd_open(NULL) == 0;
        if (round == 39) {
            writer.stop = true;
            pthread_join(thread, NULL);
        }
        transfer_round(&transfer);
    }
    transfer_end(&transfer);
}

/* A page that the guest changes after it was summed, and before it is sent. */
static void a_page_that_is_changed_on_the_way(bool pipes)
{
    enum { AGAIN, AGAIN_AS_ZEROS, AGAIN_COMPRESSED, COPIED, HOWS };
    for (int how = 0; how < HOWS; how++) {
        struct transfer transfer;
        char expected[64];
        transfer_begin(&transfer, pipes, 4096);
        fill_random(transfer.from.host, transfer.from.size);
        transfer.from.of_a_file = how == COPIED; /* as if: a private mapping would do as well */
        set_bits(transfer.bitmap, 0, 4096);
        transfer.sending.max_ms = 30; /* nobody reads: a message gets stuck */
        CHECK_EQUAL(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), 1);
        const struct link_pieces *stuck = &transfer.links[0]->out.pieces;
        CHECK(stuck->next < stuck->count);
        size_t page = transfer.sending.next - 1; /* its last */
        const struct iovec *last = &stuck->at[stuck->count - 1];
        CHECK(how == COPIED || (uint8_t *)last->iov_base + last->iov_len == transfer.from.host + (page + 1) * PAGE);
        transfer.from.host[page * PAGE + 7] ^= 1;
        transfer.sending.max_ms = 0;
        transfer_round(&transfer);
        CHECK_EQUAL(pyhv_pages_count(transfer.to.unsettled, 4096), how != COPIED);
        if (how != COPIED) {
            CHECK_FAILS(pyhv_landing_check(&transfer.to.landing, &error), EBADMSG);
            snprintf(expected, sizeof expected, "page %zu was changed on the way, and did not come again", page);
            CHECK(strcmp(error.detail, expected) == 0);
        }
        if (how == AGAIN_AS_ZEROS)
            memset(transfer.from.host + page * PAGE, 0, PAGE);
        if (how == AGAIN_COMPRESSED && pyhv_zstd_open(NULL) == 0) {
            memset(transfer.from.host + page * PAGE, 'x', PAGE);
            transfer.sending.zstd_level = 1;
        }
        set_bits(transfer.bitmap, page, 1);
        transfer_round(&transfer);
        transfer_end(&transfer);
    }
}

/* The other side closes while content is on its way to it: an error and no signal. */
static void closed_within_content(bool pipes)
{
    struct transfer transfer;
    signal(SIGPIPE, on_signal);
    signals = 0;
    transfer_begin(&transfer, pipes, 4096);
    fill_random(transfer.from.host, transfer.from.size);
    set_bits(transfer.bitmap, 0, 4096);
    transfer.sending.max_ms = 30;
    do { /* until it is content that is stuck */
        static uint8_t some[100000];
        CHECK_EQUAL(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), 1);
        CHECK(read(transfer.ends.in[1], some, sizeof some) > 0);
        CHECK_EQUAL(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), 1);
    } while (transfer.links[0]->out.pieces.next == 0);
    pyhv_link_destroy(transfer.links[1]);
    close_side(&transfer.ends, 1);
    CHECK_FAILS(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), EPIPE);
    CHECK_EQUAL(signals, 0);
    signal(SIGPIPE, SIG_IGN);
    finish(transfer.links[0], &transfer.ends);
    pyhv_memory_destroy(&transfer.from);
    pyhv_memory_destroy(&transfer.to.ram);
}

/* Where pages cannot be sent by reference they are copied. */
static void no_references(void)
{
    struct transfer transfer;
    transfer_begin(&transfer, false, 1024);
    fill_random(transfer.from.host, transfer.from.size);
    set_bits(transfer.bitmap, 0, 512);
    transfer_round(&transfer);
    CHECK(transfer.links[0]->out.pipe[1] >= 0);
    int none = open("/dev/null", O_WRONLY);
    CHECK_EQUAL(dup2(none, transfer.links[0]->out.pipe[1]), transfer.links[0]->out.pipe[1]);
    close(none);
    set_bits(transfer.bitmap, 0, 1024);
    transfer_round(&transfer);
    CHECK_EQUAL(transfer.links[0]->out.pipe[1], -1);
    transfer_end(&transfer);
}

/* Limits of bytes and time, and a message from the other side, end the call; the next one goes on. */
static void limits_of_sending(bool pipes)
{
    struct transfer transfer;
    struct pyhv_message message;
    transfer_begin(&transfer, pipes, 4096);
    fill_random(transfer.from.host, transfer.from.size);
    set_bits(transfer.bitmap, 0, 4096);

    /* Nobody reads: the buffers fill up, and time runs out. */
    transfer.sending.max_ms = 30;
    uint64_t start = now_ms();
    CHECK_EQUAL(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), 1);
    CHECK(now_ms() - start >= 30 && now_ms() - start < LONG_MS / 2);
    uint64_t left = pyhv_pages_count(transfer.bitmap, 4096);
    CHECK(left < 4096 && left > 0);
    CHECK_EQUAL(left + transfer.sending.pages, 4096);

    /* Nor now, but it says something. */
    transfer.sending.max_ms = 0;
    CHECK_EQUAL(pyhv_link_send(transfer.links[1], TYPE + 7, "stop", 4, 0, &error), 0);
    for (int times = 0; times < 2; times++)
        CHECK_EQUAL(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), 1);
    CHECK_EQUAL(pyhv_link_receive(transfer.links[0], NULL, 0, &message, &error), 1);
    CHECK_EQUAL(message.type, TYPE + 7);
    CHECK_EQUAL(pyhv_link_receive(transfer.links[0], NULL, 0, &message, &error), 0);

    /* By pieces, of which each is about so large. */
    CHECK_EQUAL(pthread_create(&transfer.thread, NULL, receive_pages, &transfer), 0);
    transfer.sending.max_bytes = 2 << 20;
    int calls = 0;
    for (;; calls++) {
        uint64_t before = transfer.sending.bytes;
        int result = pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error);
        uint64_t sent = transfer.sending.bytes - before;
        CHECK(result >= 0 && sent <= (2 << 20) + LINK_HEADER + LINK_PAGES_MAX + PYHV_PAGES_MAX * PAGE);
        if (result <= 0)
            break;
        CHECK(sent >= 2 << 20);
    }
    CHECK(calls >= 1 && calls <= 8);
    CHECK_EQUAL(pyhv_link_send(transfer.links[0], TYPE, "end", 3, 0, &error), 0);
    pthread_join(transfer.thread, NULL);
    CHECK_EQUAL(transfer.received, 1);
    transfer_end(&transfer);
}

static void arguments_of_sending(void)
{
    struct transfer transfer;
    transfer_begin(&transfer, false, 64);
    transfer.sending.next = 65;
    CHECK_FAILS(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), EINVAL);
    transfer.sending.next = 0;
    transfer_round(&transfer); /* nothing to send is no error */
    CHECK_EQUAL(transfer.sending.bytes, 0);
    /* What the other side has to say comes before any page. */
    struct pyhv_message message;
    CHECK_EQUAL(pyhv_link_send(transfer.links[1], TYPE, "wait", 4, 0, &error), 0);
    set_bits(transfer.bitmap, 0, 64);
    CHECK_EQUAL(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), 1);
    CHECK_EQUAL(pyhv_pages_count(transfer.bitmap, 64), 64);
    CHECK_EQUAL(pyhv_link_receive(transfer.links[0], NULL, 0, &message, &error), 1);
    transfer_round(&transfer);
    transfer_end(&transfer);
}

/* RAM that is a private mapping of a file: all of it arrives; and a file that is cut short is an error, no signal. */
static void a_file_behind_the_memory(void)
{
    struct transfer transfer;
    int file = memfd_create("file", MFD_CLOEXEC);
    uint8_t data[64 * 4096];
    fill_random(data, sizeof data);
    CHECK_EQUAL(pwrite(file, data, sizeof data, 4096), sizeof data);
    transfer_begin(&transfer, false, 64);
    pyhv_memory_destroy(&transfer.from);
    CHECK_EQUAL(pyhv_memory_map_file(&transfer.from, file, 4096, sizeof data, &error), 0);
    transfer.from.host[0] ^= 1; /* its own page */
    set_bits(transfer.bitmap, 0, 64);
    transfer_round(&transfer);
    CHECK(memcmp(transfer.from.host, transfer.to.ram.host, sizeof data) == 0);

    CHECK_EQUAL(ftruncate(file, 33 * 4096), 0);
    set_bits(transfer.bitmap, 0, 64);
    CHECK_FAILS(pyhv_link_send_pages(transfer.links[0], &transfer.sending, &error), EFAULT);
    close(file);
    pyhv_memory_destroy(&transfer.from);
    CHECK_EQUAL(pyhv_memory_create(&transfer.from, sizeof data, &error), 0);
    memcpy(transfer.from.host, transfer.to.ram.host, sizeof data);
    transfer_end(&transfer);
}

/* ------------------------------------------------------------------------------------- a host without memory -- */

static void zeros_that_cannot_be_made(struct stream *stream)
{
    struct target target;
    struct ends ends;
    target_create(&target, 4);
    const uint64_t run = run_of(0, 4, true);
    uint8_t payload[64];
    stream->size = stream->sum = 0;
    add_pages(stream, payload, make_pages(payload, &run, 1, 0), 0);
    struct pyhv_link *link = told(&ends, stream->bytes, stream->size);
    target.written[0] = 6;
    madvise_errnum = EPERM;
    receive_until_error(link, &target);
    madvise_errnum = 0;
    CHECK_EQUAL(error.errnum, EPERM);
    CHECK(strcmp(error.what, "madvise") == 0 && strstr(error.detail, "pages 1 to 2"));
    pyhv_memory_destroy(&target.ram);
    finish(link, &ends);
}

/* Pages land in anonymous memory only: what a file holds is not ours to write. */
static void landing_in_a_file(struct stream *stream)
{
    size_t ends_at[HONEST_MESSAGES];
    struct target target;
    struct ends ends;
    honest(stream, ends_at);
    target_create(&target, 4);
    target.ram.anonymous = 0;
    struct pyhv_link *link = told(&ends, stream->bytes, stream->size);
    receive_until_error(link, &target);
    CHECK_EQUAL(error.errnum, EINVAL);
    CHECK_EQUAL(allocated_pages(&target.ram), 0);
    pyhv_memory_destroy(&target.ram);
    finish(link, &ends);
}

/* ----------------------------------------------------------------------------------------------- compression -- */

static void compressed_pages(struct stream *stream)
{
    struct transfer transfer;
    if (pyhv_zstd_open(&error) < 0) {
        printf("test_link: not tested: compression: %s: %s\n", error.what, error.detail);
        return;
    }
    transfer_begin(&transfer, false, 1024);
    transfer.sending.zstd_level = 1;
    memset(transfer.from.host, 'x', 512 * PAGE);                   /* shrinks to nothing */
    fill_random(transfer.from.host + 512 * PAGE, 512 * PAGE - 77); /* does not shrink: goes as it is */
    set_bits(transfer.bitmap, 0, 1024);
    transfer_round(&transfer);
    CHECK(transfer.sending.bytes > 512 * PAGE && transfer.sending.bytes < 520 * PAGE);
    transfer_end(&transfer);
    random_rounds(true, 3);

    /* What is no frame, and one that holds more than any message: zeros shrink to a few bytes. */
    static uint8_t zeros[LINK_ZSTD_MAX + 1], frame[LINK_ZSTD_MAX];
    void *compressor = zstd.create_cctx();
    size_t sizes[] = {0, 1, 100, zstd.compress(compressor, frame, sizeof frame, zeros, sizeof zeros, 1)};
    zstd.free_cctx(compressor);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        struct target target;
        struct ends ends;
        stream->size = stream->sum = 0;
        add_message(stream, PYHV_MESSAGE_PAGES_ZSTD, i < 3 ? zeros : frame, sizes[i]);
        target_create(&target, 4);
        struct pyhv_link *link = told(&ends, stream->bytes, stream->size);
        receive_until_error(link, &target);
        CHECK_EQUAL(error.errnum, EBADMSG);
        CHECK_EQUAL(allocated_pages(&target.ram), 0);
        pyhv_memory_destroy(&target.ram);
        finish(link, &ends);
    }
}

int main(void)
{
    struct stream stream = {.bytes = malloc(STREAM_MAX)};
    alarm(110); /* a link that waits for ever must not hang the tests */
    signal(SIGPIPE, SIG_IGN);
    for (int pipes = 0; pipes < 2; pipes++) {
        round_trips(pipes);
        sending_to_nobody(pipes);
        silence(pipes);
        cancelling(pipes);
        limits(pipes);
        last_words(pipes);
        heartbeats_of_two_that_wait(pipes);
        slow_reader(pipes);
        random_rounds(pipes, 0);
        a_page_that_is_changed_on_the_way(pipes);
        closed_within_content(pipes);
        limits_of_sending(pipes);
    }
    both_send_at_once();
    other_ways_to_close();
    descriptors_that_are_none();
    endless_talk();
    time_between_calls();
    end_of_file_at_each_byte(&stream);
    one_bit_flipped_anywhere(&stream);
    lost_repeated_and_exchanged(&stream);
    headers_that_are_refused();
    runs_that_are_refused();
    content_in_pieces(&stream);
    pages_that_were_not_expected(&stream);
    no_references();
    zeros_are_elided();
    a_guest_that_writes();
    arguments_of_sending();
    a_file_behind_the_memory();
    zeros_that_cannot_be_made(&stream);
    landing_in_a_file(&stream);
    compressed_pages(&stream);
    free(stream.bytes);
    return check_report("test_link");
}

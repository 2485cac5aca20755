/* SPDX-License-Identifier: MIT
 *
 * Fuzzes what the other side of a migration can send: bytes that a link receives, with memory for pages to land in.
 *
 * An input is: 1 byte, whose lowest bit says whether the rest is sent as it is. Otherwise it is a list of messages, to
 * which the right headers are given, as a side that lies would: 1 byte type; 1 byte pages, of which so many are
 * appended, to a message of pages with their sums; 2 bytes, little-endian, the length of the rest of the payload; that.
 * What must hold, besides that nothing crashes:
 *  - a message that is delivered is one that was sent, no longer than allowed, and no pages or heartbeat;
 *  - what is refused says why;
 *  - memory has content only where the landing's bitmap says so, and grows no further than the RAM;
 *  - a page that is not what was summed is one of these, and the check at the end tells of it.
 *
 * How it is built and run is in fuzz.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"
#include "pyhv.h"

enum { RAM_PAGES = 200, WIRE_MAX = 256 * 1024, MESSAGES_MAX = 64, FILLING = 0x5a };

static uint8_t wire[WIRE_MAX];
static size_t wire_size, ends_at[MESSAGES_MAX];
static unsigned message_count;

/* Puts the input's messages on the wire, as far as there is room. */
static void compose(const uint8_t *data, size_t size)
{
    static uint64_t page_sum;
    uint64_t sum = 0;
    if (!page_sum) {
        uint8_t page[PYHV_PAGE_SIZE];
        memset(page, FILLING, sizeof page);
        pyhv_page_sums(page, 1, &page_sum);
    }
    wire_size = message_count = 0;
    while (size >= 4 && message_count < MESSAGES_MAX) {
        uint32_t type = data[0];
        size_t pages = data[1], length = data[2] | (size_t)data[3] << 8;
        data += 4;
        size -= 4;
        length = length < size ? length : size;
        if (WIRE_MAX - wire_size < 16 + length + pages * (8 + PYHV_PAGE_SIZE))
            return;
        uint8_t *at = wire + wire_size;
        memcpy(at + 16, data, length);
        size_t payload = length;
        if (type == PYHV_MESSAGE_PAGES)
            for (size_t i = 0; i < pages; i++, payload += 8)
                memcpy(at + 16 + payload, &page_sum, 8);
        size_t whole = payload + pages * PYHV_PAGE_SIZE;
        memset(at + 16 + payload, FILLING, whole - payload);
        const uint32_t head[2] = {type, (uint32_t)(type == PYHV_MESSAGE_PAGES ? payload : whole)};
        memcpy(at, head, 8);
        sum = pyhv_xxh64(at + 16, head[1], pyhv_xxh64(at, 8, sum));
        memcpy(at + 8, &sum, 8);
        wire_size += 16 + whole;
        ends_at[message_count++] = wire_size;
        data += length;
        size -= length;
    }
}

/* Whether a message on the wire is this one. */
static int was_sent(const struct pyhv_message *message)
{
    for (unsigned i = 0; i < message_count; i++) {
        const uint8_t *at = wire + (i ? ends_at[i - 1] : 0);
        if (memcmp(at, &message->type, 4) == 0 && memcmp(at + 4, &message->length, 4) == 0 &&
            memcmp(at + 16, message->payload, message->length) == 0)
            return 1;
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct pyhv_memory ram;
    uint64_t written[RAM_PAGES / 64 + 1] = {0}, content[RAM_PAGES / 64 + 1] = {0}, unsettled[RAM_PAGES / 64 + 1] = {0};
    struct pyhv_landing landing = {.ram = &ram, .written = written, .unsettled = unsettled};
    struct pyhv_error error = {0};
    struct pyhv_message message;
    struct stat file;
    int fds[2], result, room = 2 * WIRE_MAX, raw = size && (data[0] & 1);
    if (size == 0)
        return 0;
    if (raw) {
        wire_size = size - 1 < WIRE_MAX ? size - 1 : WIRE_MAX;
        memcpy(wire, data + 1, wire_size);
    } else {
        compose(data + 1, size - 1);
    }
    if (!ram.size)
        REQUIRE(pyhv_memory_create_anonymous(&ram, RAM_PAGES * PYHV_PAGE_SIZE, &error) == 0);
    REQUIRE(madvise(ram.host, ram.size, MADV_DONTNEED) == 0);

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) == 0);
    (void)setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    REQUIRE(write(fds[1], wire, wire_size) == (ssize_t)wire_size);
    shutdown(fds[1], SHUT_WR);
    const struct pyhv_link_config config = {.in_fd = fds[0], .out_fd = fds[0], .silence_ms = 10000};
    struct pyhv_link *link = pyhv_link_create(&config, &error);
    REQUIRE(link);
    while ((result = pyhv_link_receive(link, &landing, 10000, &message, &error)) == 1) {
        REQUIRE(message.type > PYHV_MESSAGE_PAGES_ZSTD && message.length <= PYHV_MESSAGE_MAX);
        REQUIRE(raw || was_sent(&message));
    }
    REQUIRE(result == -1 && (error.errnum == EBADMSG || error.errnum == EPIPE) && error.what[0] && error.detail[0]);
    int errnum = error.errnum;
    REQUIRE(pyhv_link_receive(link, &landing, 10000, &message, &error) == -1 && error.errnum == errnum);
    REQUIRE(pyhv_link_counters(link)->bytes_received <= wire_size);
    pyhv_link_destroy(link);
    close(fds[0]);
    close(fds[1]);

    REQUIRE(fstat(ram.fd, &file) == 0 && (uint64_t)file.st_size == ram.size);
    REQUIRE(pyhv_pages_find(&ram, content, &error) == 0);
    for (size_t i = 0; i < sizeof content / sizeof content[0]; i++)
        REQUIRE((content[i] & ~written[i]) == 0 && (unsettled[i] & ~written[i]) == 0);
    REQUIRE(pyhv_landing_check(&landing, &error) == (pyhv_pages_count(unsettled, RAM_PAGES) ? -1 : 0));
    return 0;
}

#ifdef PYHV_FUZZ_MAIN
/* The runs of a PAGES message, valid or nearly so. Returns their length, and in *pages how much content they need. */
static size_t make_runs(uint8_t *at, uint8_t *pages)
{
    uint32_t head[2] = {random32() % 8 + 1, 0};
    uint64_t page = 0;
    unsigned content = 0;
    for (uint32_t i = 0; i < head[0]; i++) {
        uint64_t count = random32() % 12 + 1, zero = random32() & 1;
        page += random32() % 20;
        if (content + count > 24) /* the wire must not fill up with pages alone */
            zero = 1;
        content += zero ? 0 : (unsigned)count;
        uint64_t run = page | count << 40 | zero << 63;
        if (random32() % 64 == 0)
            run ^= UINT64_C(1) << random32() % 64;
        memcpy(at + 8 + i * 8, &run, 8);
        page += count;
    }
    *pages = (uint8_t)content;
    size_t length = 8 + head[0] * 8;
    if (random32() % 32 == 0)
        head[random32() % 2] ^= 1u << random32() % 32;
    memcpy(at, head, 8);
    if (random32() % 64 == 0)
        *pages ^= (uint8_t)(1 << random32() % 4);
    return length;
}

/* A list of messages. */
static size_t make_messages(uint8_t *at)
{
    size_t size = 0;
    for (uint32_t count = random32() % 8; count > 0; count--) {
        uint8_t *head = at + size;
        size_t length = random32() % 100;
        head[0] = (uint8_t)(random32() % 8 ? random32() % 6 + 1 : random32());
        head[1] = 0;
        if (head[0] == PYHV_MESSAGE_PAGES || random32() % 2) {
            head[0] = PYHV_MESSAGE_PAGES;
            length = make_runs(head + 4, &head[1]);
        } else {
            for (size_t i = 0; i < length; i++)
                head[4 + i] = (uint8_t)random32();
            if (head[0] == PYHV_MESSAGE_HEARTBEAT && random32() % 8)
                length = 0;
            if (head[0] == PYHV_MESSAGE_PAGES_ZSTD && length >= 4)
                memcpy(head + 4, "\x28\xb5\x2f\xfd", 4); /* how a frame begins */
        }
        head[2] = (uint8_t)length;
        head[3] = (uint8_t)(length >> 8);
        size += 4 + length;
    }
    return size;
}

/* One in four are bytes as they are: mostly right, cut or changed somewhere. */
static size_t make_input(uint8_t *input)
{
    size_t size = make_messages(input + 1);
    input[0] = 0;
    if (random32() % 4 == 0) {
        compose(input + 1, size);
        size = wire_size;
        memcpy(input + 1, wire, size);
        input[0] = 1;
        for (uint32_t changes = random32() % 3; changes > 0 && size; changes--)
            input[1 + random32() % size] ^= (uint8_t)(1 << random32() % 8);
        if (size && random32() % 2)
            size = random32() % size;
    }
    return 1 + size;
}

int main(int argc, char **argv)
{
    static uint8_t input[1 + WIRE_MAX];
    return fuzz(argc, argv, input, make_input);
}
#endif

/* SPDX-License-Identifier: MIT
 *
 * Messages over a pair of descriptors: framing, sums, heartbeats, limits of time. What comes in is not trusted.
 *
 * One function, link_wait(), moves all bytes. It never blocks on one direction alone: two sides that both send would
 * wait for each other for ever, and a side that is kept from sending would miss that the other one is gone, or has
 * said why it does not read any more. So bytes that cannot be sent yet stay in the buffer, also across calls, and one
 * message that comes in meanwhile is kept for pyhv_link_receive(). While it lies there nothing more is read; the limit
 * of silence then counts from the last byte that moved either way. Only what a message says of pages is sent and
 * received so: their content goes between the descriptor and the places that transfer.c names.
 *
 * A UNIX socket need not even copy content when it is sent: it can refer to the pages, and the other side's read copies
 * out of them. What is sent so is what stands there then; transfer.c says where that is good enough.
 */
#include "migration/link.h"
#include "sigpipe.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S UINT64_C(1000000000)

/* Wanted for pipes and UNIX sockets, which begin with 64 and 208 KiB: what fits is moved without changing threads. */
#define SOCKET_BUFFER (1 << 20)
#define PIPE_SIZE     (1 << 20)

uint64_t link_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

int link_bad(struct pyhv_error *error, const char *format, ...)
{
    char detail[sizeof error->detail];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    return pyhv_fail(error, EBADMSG, "link", "%s", detail);
}

static void store32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof value); /* little-endian: x86-64 is all that pyhv runs on */
}

static uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* The sum of the message whose header is at `header`, after one with the sum `before`. */
static uint64_t sum_of(const uint8_t *header, const uint8_t *payload, uint64_t before)
{
    return pyhv_xxh64(payload, load32(header + 4), pyhv_xxh64(header, 8, before));
}

/* ------------------------------------------------------------------------------------- beginning and end -- */

static int domain_of(int fd)
{
    int domain;
    socklen_t length = sizeof domain;
    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 ? domain : AF_UNSPEC;
}

static int prepare(int fd, struct pyhv_error *error)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || (!(flags & O_NONBLOCK) && fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0))
        return pyhv_fail(error, errno, "fcntl", "making descriptor %d of the link non-blocking", fd);
    /* Larger buffers are worth having, no more: each of these may fail. TCP sizes its own. */
    int domain = domain_of(fd), size = SOCKET_BUFFER;
    if (domain == AF_UNSPEC)
        (void)fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE);
    else if (domain == AF_UNIX)
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    return 0;
}

struct pyhv_link *pyhv_link_create(const struct pyhv_link_config *config, struct pyhv_error *error)
{
    struct pyhv_link *link = calloc(1, sizeof *link);
    if (!link) {
        pyhv_fail(error, ENOMEM, "pyhv_link_create", NULL);
        return NULL;
    }
    link->in_fd = config->in_fd;
    link->out_fd = config->out_fd;
    link->wake = link->out.pipe[0] = link->out.pipe[1] = -1;
    link->in.buffer = malloc(LINK_HEADER + PYHV_MESSAGE_MAX + LINK_HEADER);
    link->out.buffer = aligned_alloc(PYHV_PAGE_SIZE, LINK_FRONT + PYHV_MESSAGE_MAX);
    if (!link->in.buffer || !link->out.buffer) {
        pyhv_fail(error, ENOMEM, "pyhv_link_create", NULL);
        goto fail;
    }
    if (prepare(link->in_fd, error) < 0 || prepare(link->out_fd, error) < 0)
        goto fail;
    link->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (link->wake < 0) {
        pyhv_fail_errno(error, "eventfd");
        goto fail;
    }
    link->out_is_socket = domain_of(link->out_fd) != AF_UNSPEC;
    /* A pipe that cannot be had, or not so large, is none that is needed. */
    if (domain_of(link->out_fd) == AF_UNIX && pipe2(link->out.pipe, O_CLOEXEC | O_NONBLOCK) == 0)
        (void)fcntl(link->out.pipe[1], F_SETPIPE_SZ, PIPE_SIZE);
    link->guard_sigpipe = pyhv_sigpipe_matters();
    link->left = link_now();
    pyhv_link_set_times(link, config->heartbeat_ms, config->silence_ms);
    return link;

fail:
    pyhv_link_destroy(link);
    return NULL;
}

static void close_pipe(struct link_out *out)
{
    if (out->pipe[0] >= 0) {
        close(out->pipe[0]);
        close(out->pipe[1]);
    }
    out->pipe[0] = out->pipe[1] = -1;
    out->piped = 0;
}

void pyhv_link_destroy(struct pyhv_link *link)
{
    if (!link)
        return;
    if (link->wake >= 0)
        close(link->wake);
    close_pipe(&link->out);
    link_zstd_destroy(link->zstd);
    free(link->in.buffer);
    free(link->out.buffer);
    free(link);
}

void pyhv_link_cancel(struct pyhv_link *link)
{
    const uint64_t one = 1;
    atomic_store(&link->cancelled, true);
    /* Nobody reads it, so that it stays readable. It fails only when it has been written to for 2^64 - 2 times. */
    while (write(link->wake, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void pyhv_link_revive(struct pyhv_link *link)
{
    uint64_t count;
    atomic_store(&link->cancelled, false);
    while (read(link->wake, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

void pyhv_link_set_limit(struct pyhv_link *link, uint64_t ms)
{
    link->limit = ms ? link_now() + ms * LINK_NS_PER_MS : 0;
}

void pyhv_link_set_times(struct pyhv_link *link, uint32_t heartbeat_ms, uint32_t silence_ms)
{
    link->heartbeat_ns = heartbeat_ms * LINK_NS_PER_MS;
    link->silence_ns = silence_ms * LINK_NS_PER_MS;
    link->said = link->heard = link->left;
}

const struct pyhv_link_counters *pyhv_link_counters(const struct pyhv_link *link)
{
    return &link->counters;
}

void link_enter(struct pyhv_link *link)
{
    link->heard += link_now() - link->left;
    if (link->in.used) { /* the message that the caller had */
        link_consume(link);
    }
}

int link_leave(struct pyhv_link *link, int result)
{
    link->left = link_now();
    return result;
}

/* --------------------------------------------------------------------------------------------- bytes out -- */

void link_seal(struct pyhv_link *link, uint32_t type, size_t at, size_t length, size_t pieces)
{
    struct link_out *out = &link->out;
    uint8_t *header = out->buffer + at - LINK_HEADER;
    store32(header, type);
    store32(header + 4, (uint32_t)length);
    out->sum = sum_of(header, header + LINK_HEADER, out->sum);
    memcpy(header + 8, &out->sum, sizeof out->sum);
    out->pieces.at[0] = (struct iovec){header, LINK_HEADER + length};
    out->pieces.next = 0;
    out->pieces.count = 1 + pieces;
    link->counters.messages_sent++;
}

/* What of the pieces has been moved. */
static void advance(struct link_pieces *pieces, size_t size)
{
    while (size) {
        struct iovec *piece = &pieces->at[pieces->next];
        size_t part = size < piece->iov_len ? size : piece->iov_len;
        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part;
        size -= part;
        if (piece->iov_len == 0)
            pieces->next++;
    }
}

static bool would_block(int errnum)
{
    return errnum == EAGAIN || errnum == EWOULDBLOCK;
}

/* Whether that is how a descriptor says that the other side has closed: a socket resets, a tty hangs up with EIO. */
static bool means_closed(int errnum)
{
    return errnum == EPIPE || errnum == ECONNRESET || errnum == EIO;
}

/* Sends content by reference, through the pipe: that saves the sender a third of its work. What was put into the pipe
 * and not taken by the socket begins where the pieces do. */
static ssize_t refer(struct pyhv_link *link)
{
    struct link_out *out = &link->out;
    const struct link_pieces *pieces = &out->pieces;
    if (!out->piped) {
        ssize_t put = vmsplice(out->pipe[1], pieces->at + pieces->next, pieces->count - pieces->next, 0);
        if (put <= 0)
            return put;
        out->piped = (size_t)put;
    }
    ssize_t taken = splice(out->pipe[0], NULL, link->out_fd, NULL, out->piped, SPLICE_F_NONBLOCK);
    out->piped -= taken > 0 ? (size_t)taken : 0;
    return taken;
}

static ssize_t write_pieces(struct pyhv_link *link)
{
    struct link_out *out = &link->out;
    struct link_pieces *pieces = &out->pieces;
    bool by_reference = out->by_reference && out->pipe[0] >= 0;
    if (by_reference && pieces->next > 0) {
        ssize_t taken = refer(link);
        if (taken > 0 || would_block(errno) || errno == EINTR || means_closed(errno))
            return taken;
        close_pipe(out); /* not here: then as everywhere */
        by_reference = false;
    }
    size_t count = by_reference ? 1 : pieces->count - pieces->next;
    struct msghdr message = {.msg_iov = pieces->at + pieces->next, .msg_iovlen = count};
    int flags = MSG_NOSIGNAL | (out->more ? MSG_MORE : 0);
    return link->out_is_socket ? sendmsg(link->out_fd, &message, flags)
                               : writev(link->out_fd, message.msg_iov, (int)count);
}

static ssize_t write_some(struct pyhv_link *link)
{
    struct pyhv_sigpipe guard;
    if (!link->guard_sigpipe)
        return write_pieces(link);
    pyhv_sigpipe_block(&guard);
    ssize_t written = write_pieces(link);
    pyhv_sigpipe_restore(&guard, written < 0 && errno == EPIPE);
    return written;
}

/* Whether something is to be sent still. */
static bool is_sending(const struct link_out *out)
{
    return out->pieces.next < out->pieces.count;
}

/* Sends what can be sent at once. Returns whether anything was. What fails is left in out_errnum: the other side may
 * have said why, and that must still be read. */
static bool push(struct pyhv_link *link, uint64_t now)
{
    struct link_pieces *pieces = &link->out.pieces;
    uint64_t before = link->counters.bytes_sent;
    while (is_sending(&link->out)) {
        ssize_t put = write_some(link);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && !would_block(errno)) {
            link->out_errnum = means_closed(errno) ? EPIPE : errno;
            pieces->next = pieces->count;
            return false;
        }
        if (put <= 0)
            break;
        advance(pieces, (size_t)put);
        link->counters.bytes_sent += (size_t)put;
    }
    if (link->counters.bytes_sent == before)
        return false;
    link->said = now;
    return true;
}

/* ---------------------------------------------------------------------------------------------- bytes in -- */

/* The longest payload of a message of this type; no type is 0. */
static size_t longest(uint32_t type)
{
    switch (type) {
    case PYHV_MESSAGE_HEARTBEAT:
        return 0;
    case PYHV_MESSAGE_PAGES:
        return LINK_PAGES_MAX;
    case PYHV_MESSAGE_PAGES_ZSTD:
        return LINK_ZSTD_MAX;
    default:
        return PYHV_MESSAGE_MAX;
    }
}

struct pyhv_message link_message(const struct pyhv_link *link)
{
    const uint8_t *at = link->in.buffer;
    return (struct pyhv_message){.type = load32(at), .length = load32(at + 4), .payload = at + LINK_HEADER};
}

void link_consume(struct pyhv_link *link)
{
    struct link_in *in = &link->in;
    size_t size = LINK_HEADER + link_message(link).length;
    memmove(in->buffer, in->buffer + size, in->end - size); /* of the next message's header */
    in->end -= size;
    in->used = in->landed = 0;
    in->ready = false;
}

/* Looks at what has come in: takes heartbeats away, and says when a message is there. */
static int check(struct pyhv_link *link, struct pyhv_error *error)
{
    struct link_in *in = &link->in;
    while (!in->ready && in->end >= LINK_HEADER) {
        struct pyhv_message message = link_message(link);
        uint64_t sum;
        if (message.type == 0)
            return link_bad(error, "message %llu is none", (unsigned long long)link->counters.messages_received);
        if (message.length > longest(message.type))
            return link_bad(error, "%u bytes are too long for a message of type %u", message.length, message.type);
        if (in->end < LINK_HEADER + (size_t)message.length)
            return 0;
        memcpy(&sum, in->buffer + 8, sizeof sum);
        in->sum = sum_of(in->buffer, message.payload, in->sum);
        if (sum != in->sum)
            return link_bad(error, "message %llu, of type %u, was changed on the way, or one before it is missing",
                            (unsigned long long)link->counters.messages_received, message.type);
        link->counters.messages_received++;
        in->ready = true;
        if (message.type == PYHV_MESSAGE_HEARTBEAT)
            link_consume(link);
    }
    return 0;
}

/* What a read has brought. Returns 1 if there was anything, 0, or -1. */
static int came(struct pyhv_link *link, ssize_t got, uint64_t now, struct pyhv_error *error)
{
    if (got < 0 && (errno == EINTR || would_block(errno)))
        return errno == EINTR;
    if (got < 0 && !means_closed(errno))
        return pyhv_fail(error, errno, "read", "from the link");
    if (got <= 0) {
        link->in.closed = true;
        return 0;
    }
    link->counters.bytes_received += (size_t)got;
    link->heard = now;
    return 1;
}

/* Reads some of the content that is wanted. Returns as came() does. */
static int pull_content(struct pyhv_link *link, uint64_t now, struct pyhv_error *error)
{
    struct link_in *in = &link->in;
    struct link_pieces *pieces = &in->pieces;
    const struct iovec *header = &pieces->at[pieces->count - 1]; /* of the next message */
    size_t room = header->iov_len;
    ssize_t got = readv(link->in_fd, pieces->at + pieces->next, (int)(pieces->count - pieces->next));
    int result = came(link, got, now, error);
    if (got <= 0)
        return result;
    advance(pieces, (size_t)got);
    in->end += room - header->iov_len;
    in->landed += (size_t)got - (room - header->iov_len);
    return result;
}

/* Whether something is wanted from the other side now. */
static bool is_reading(const struct link_in *in)
{
    return !in->closed && (!in->ready || in->pieces.count);
}

static bool has_content(const struct link_in *in)
{
    return in->pieces.next + 1 >= in->pieces.count;
}

/* Reads some of what is there, unless a message is ready. Returns as came() does. */
static int pull(struct pyhv_link *link, uint64_t now, struct pyhv_error *error)
{
    struct link_in *in = &link->in;
    if (in->bad)
        return link_bad(error, "an earlier message was bad");
    /* First a look at what is here, for its length says how much room the rest may take: to the end of the message, and
     * the next one's header. */
    in->bad = check(link, error) < 0;
    if (in->bad)
        return -1;
    if (!is_reading(in))
        return 0;
    if (in->ready)
        return has_content(in) ? 0 : pull_content(link, now, error);
    size_t size = LINK_HEADER;
    if (in->end >= LINK_HEADER) {
        struct pyhv_message message = link_message(link);
        size += message.length;
        if (message.type != PYHV_MESSAGE_PAGES) /* whose content comes first */
            size += LINK_HEADER;
    }
    ssize_t got = read(link->in_fd, in->buffer + in->end, size - in->end);
    int result = came(link, got, now, error);
    if (got <= 0)
        return result;
    in->end += (size_t)got;
    in->bad = check(link, error) < 0;
    return in->bad ? -1 : 1;
}

/* ----------------------------------------------------------------------------------------------- waiting -- */

/* The sooner of `when` and `start` + `after`, where 0 is never. */
static uint64_t sooner(uint64_t when, uint64_t start, uint64_t after)
{
    return after && start + after < when ? start + after : when;
}

/* Sleeps until bytes can be moved, the link is cancelled, or `until`. */
static int sleep_until(struct pyhv_link *link, uint64_t now, uint64_t until, struct pyhv_error *error)
{
    struct pollfd fds[3] = {{.fd = link->wake, .events = POLLIN},
                            {.fd = is_reading(&link->in) ? link->in_fd : -1, .events = POLLIN},
                            {.fd = is_sending(&link->out) ? link->out_fd : -1, .events = POLLOUT}};
    uint64_t left = until > now ? until - now : 0;
    struct timespec timeout = {.tv_sec = (time_t)(left / NS_PER_S), .tv_nsec = (long)(left % NS_PER_S)};
    if (ppoll(fds, 3, until == UINT64_MAX ? NULL : &timeout, NULL) < 0 && errno != EINTR)
        return pyhv_fail_errno(error, "poll");
    return 0;
}

int link_wait(struct pyhv_link *link, int what, uint64_t deadline, struct pyhv_error *error)
{
    struct link_out *out = &link->out;
    struct link_in *in = &link->in;
    for (;;) {
        if (atomic_load_explicit(&link->cancelled, memory_order_relaxed))
            return pyhv_fail(error, ECANCELED, "link", "it was cancelled");
        uint64_t now = link_now();
        bool moved = push(link, now);
        if ((what & LINK_SENT) && link->out_errnum)
            return pyhv_fail(error, link->out_errnum, "write",
                             link->out_errnum == EPIPE ? "the other side has closed the link" : "to the link");
        bool sent = !is_sending(out);
        int pulled = (what & (LINK_MESSAGE | LINK_CONTENT)) || !sent ? pull(link, now, error) : 0;
        if (pulled < 0)
            return -1;
        moved |= pulled > 0;
        int found =
            what & ((sent ? LINK_SENT : 0) | (in->ready ? LINK_MESSAGE : 0) | (has_content(in) ? LINK_CONTENT : 0));
        /* While bytes come in, a message may be about to be there. */
        if (found && !((what & LINK_MESSAGE) && pulled > 0 && !in->ready))
            return found;
        if (in->closed)
            return pyhv_fail(error, EPIPE, "read", "the other side has closed the link%s",
                             in->end ? " within a message" : "");
        if (link->limit && now >= link->limit)
            return pyhv_fail(error, ETIME, "link", "it took too long");
        if (sent && !link->out_errnum && link->heartbeat_ns && now - link->said >= link->heartbeat_ns) {
            link_seal(link, PYHV_MESSAGE_HEARTBEAT, LINK_HEADER, 0, 0);
            continue;
        }
        if (moved && (now < deadline || now - deadline < LINK_GRACE))
            continue;
        /* While a message lies here nothing is read, and only what the other side takes is a sign of its life. */
        uint64_t life = !is_reading(in) && link->said > link->heard ? link->said : link->heard;
        if (link->silence_ns && now > life && now - life >= link->silence_ns)
            return pyhv_fail(error, ETIMEDOUT, "link", "nothing came from the other side for %llu ms",
                             (unsigned long long)((now - life) / LINK_NS_PER_MS));
        if (now >= deadline)
            return 0;
        uint64_t until = sooner(deadline, life, link->silence_ns);
        if (link->limit && link->limit < until)
            until = link->limit;
        if (sent && !link->out_errnum)
            until = sooner(until, link->said, link->heartbeat_ns);
        if (sleep_until(link, now, until, error) < 0)
            return -1;
    }
}

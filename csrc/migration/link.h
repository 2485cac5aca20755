/* SPDX-License-Identifier: MIT
 *
 * What link.c (messages) offers to transfer.c (pages).
 */
#ifndef PYHV_LINK_H
#define PYHV_LINK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/uio.h>

#include "error.h"
#include "migration/zstd.h"
#include "pyhv.h"

enum {
    LINK_HEADER = 16,      /* type, length, sum */
    LINK_PAGES_HEADER = 8, /* number of runs, zero */
    LINK_RUNS_MAX = LINK_PAGES_HEADER + PYHV_RUNS_MAX * 8,
    LINK_PAGES_MAX = LINK_RUNS_MAX + PYHV_PAGES_MAX * 8,             /* payload of a PAGES message */
    LINK_ZSTD_MAX = LINK_RUNS_MAX + PYHV_PAGES_MAX * PYHV_PAGE_SIZE, /* that of a PAGES_ZSTD message, decompressed */
    /* What a buffer for outgoing messages has in front of the content of pages: all that can come before it, so that
     * content begins on a page's boundary however many runs there turn out to be. */
    LINK_FRONT = 2 * PYHV_PAGE_SIZE,
};

/* Where bytes on their way are, or go: pieces from `next` on, of `count`. */
struct link_pieces {
    struct iovec at[PYHV_PAGES_MAX + 1];
    size_t next, count;
};

/* Bytes on their way out. */
struct link_out {
    uint8_t *buffer;           /* LINK_FRONT + PYHV_MESSAGE_MAX bytes */
    struct link_pieces pieces; /* what is to be sent: a message in the buffer, and behind it content of pages */
    bool more;                 /* another message follows at once: TCP may wait for it */
    bool by_reference;         /* the content may be read as late as the other side reads it */
    int pipe[2];               /* for that; -1 where it is not possible */
    size_t piped;              /* so much of the content is in it */
    uint64_t sum;              /* of the message before */
};

/* Bytes that have come in. */
struct link_in {
    uint8_t *buffer; /* LINK_HEADER + PYHV_MESSAGE_MAX + LINK_HEADER bytes: a message and the header of the next */
    size_t end;      /* so many are there; a message begins at 0 */
    size_t used;     /* those of the message that was delivered: gone at the next call */
    bool ready;      /* a whole message is there, but for content of pages: it is the caller's turn */
    bool closed;     /* no more will come */
    bool bad;        /* what came was no message: where the next one begins cannot be known */
    uint64_t sum;
    size_t landed; /* bytes of the ready message's content that are where they belong */
    /* Where the rest of it goes, and behind it the next header, for link_wait(); else there is none. */
    struct link_pieces pieces;
};

struct pyhv_link {
    int in_fd, out_fd;
    int wake; /* an eventfd: readable for good after pyhv_link_cancel() */
    atomic_bool cancelled;
    bool out_is_socket;
    bool guard_sigpipe;
    int out_errnum;                    /* sending is over: why */
    uint64_t heartbeat_ns, silence_ns; /* 0: never */
    uint64_t limit;                    /* when waiting is over, whatever moves; 0: never */
    uint64_t said, heard;              /* when a byte last went out, and came in; CLOCK_MONOTONIC in ns */
    uint64_t left;                     /* when the last call returned */
    struct link_out out;
    struct link_in in;
    struct pyhv_link_counters counters;
    struct link_zstd *zstd; /* NULL until pages are compressed */
};

#define LINK_NS_PER_MS UINT64_C(1000000)

/* How much later than it should a wait may end while bytes keep moving. */
#define LINK_GRACE (100 * LINK_NS_PER_MS)

/* What link_wait() waits for. */
enum {
    LINK_SENT = 1,    /* all that was to be sent is */
    LINK_MESSAGE = 2, /* in.ready */
    LINK_CONTENT = 4, /* all of in.pieces but the last are full */
};

uint64_t link_now(void); /* CLOCK_MONOTONIC in ns */

/* Begins a call of the API: the time since the last one is not held against the other side. */
void link_enter(struct pyhv_link *link);
/* Ends it; hands `result` through. */
int link_leave(struct pyhv_link *link, int result);

/* Moves bytes both ways, heartbeats among them, until one of the things in `what` is there; returns those that are. Or
 * until `deadline` (UINT64_MAX: none), which is looked at when bytes would have to be waited for: 0. Or -1. */
int link_wait(struct pyhv_link *link, int what, uint64_t deadline, struct pyhv_error *error);

/* Makes a message of the payload that is in out.buffer from `at` on, behind LINK_HEADER bytes of room; the one before
 * must have been sent. It goes out with the next link_wait(), and behind it the content in the `pieces` pieces from
 * out.pieces.at[1] on. */
void link_seal(struct pyhv_link *link, uint32_t type, size_t at, size_t length, size_t pieces);

/* The message that is ready. */
struct pyhv_message link_message(const struct pyhv_link *link);
/* Takes it away. */
void link_consume(struct pyhv_link *link);

/* An EBADMSG. */
int link_bad(struct pyhv_error *error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Has the pages of the PAGES or PAGES_ZSTD message that is ready where they belong. Returns 1; or 0 if `deadline` comes
 * before their content: then once more. Or -1. */
int link_land(struct pyhv_link *link, struct pyhv_landing *landing, uint64_t deadline, struct pyhv_error *error);

#endif

/* SPDX-License-Identifier: MIT
 *
 * Writing to a pipe that nobody reads any more is an error here, and not a signal that ends the process.
 *
 * Python ignores SIGPIPE. Where it is not ignored, whoever writes to what may be a pipe blocks it around the write, and
 * takes the signal back if the write brought it about. The process's setting is not touched.
 */
#ifndef PYHV_SIGPIPE_H
#define PYHV_SIGPIPE_H

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <time.h>

struct pyhv_sigpipe {
    sigset_t before; /* what the thread blocks */
    bool pending;    /* one was waiting already, that is not ours */
};

/* Whether writes need this. To be asked once: a process does not change its mind. */
static inline bool pyhv_sigpipe_matters(void)
{
    struct sigaction action;
    return sigaction(SIGPIPE, NULL, &action) < 0 || action.sa_handler != SIG_IGN;
}

static inline void pyhv_sigpipe_block(struct pyhv_sigpipe *guard)
{
    sigset_t sigpipe, pending;
    sigemptyset(&sigpipe);
    sigaddset(&sigpipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &sigpipe, &guard->before);
    sigemptyset(&pending);
    if (sigismember(&guard->before, SIGPIPE)) /* only then can one be waiting */
        sigpending(&pending);
    guard->pending = sigismember(&pending, SIGPIPE);
}

/* closed: the write failed with EPIPE. Leaves errno as it is. */
static inline void pyhv_sigpipe_restore(const struct pyhv_sigpipe *guard, bool closed)
{
    int errnum = errno;
    if (closed && !guard->pending) {
        const struct timespec now = {0};
        sigset_t sigpipe;
        sigemptyset(&sigpipe);
        sigaddset(&sigpipe, SIGPIPE);
        while (sigtimedwait(&sigpipe, NULL, &now) < 0 && errno == EINTR)
            ;
    }
    pthread_sigmask(SIG_SETMASK, &guard->before, NULL);
    errno = errnum;
}

#endif

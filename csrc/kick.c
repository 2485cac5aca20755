/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

#include "kick.h"

/* What the calling thread runs. */
static _Thread_local struct {
    void (*hook)(void *opaque);
    void *opaque;
    bool runs;
    bool chains; /* is in the other handler: that may call this one in turn, if it was installed on top of it */
} here;

/* The handler that was found. In two places that take turns, for the handler may be reading one. */
static struct sigaction found[2];
static _Atomic(const struct sigaction *) chained;

static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER; /* covers found, users and the installing */
static unsigned users;

static void call_other(int signal, siginfo_t *info, void *context)
{
    const struct sigaction *other = atomic_load(&chained);
    if (other->sa_flags & SA_SIGINFO)
        other->sa_sigaction(signal, info, context);
    else if (other->sa_handler != SIG_DFL && other->sa_handler != SIG_IGN) /* the default is to ignore it */
        other->sa_handler(signal);
}

static void on_signal(int signal, siginfo_t *info, void *context)
{
    int errnum = errno;
    /* A signal that found the queue full says that nobody sent it. */
    bool lost = info->si_code == SI_USER && info->si_pid == 0;
    bool is_timer = info->si_code == SI_TIMER;
    bool mine = (lost || is_timer || (info->si_code == SI_TKILL && info->si_pid == getpid())) && here.runs;
    if (here.runs && here.hook &&
        !here.chains) /* also for another's: where two wait, the second, which may be pyhv's, is dropped */
        here.hook(here.opaque);
    if (!mine && !here.chains) {
        here.chains = true;
        call_other(signal, info, context);
        here.chains = false;
    }
    errno = errnum;
}

static bool is_installed(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO && action->sa_sigaction == on_signal;
}

/* Puts the handler in front of what is there. With install_lock held; cannot fail for a valid signal. */
static void install(void)
{
    struct sigaction now;
    sigaction(PYHV_KICK_SIGNAL, NULL, &now);
    if (is_installed(&now))
        return;
    struct sigaction *place = &found[atomic_load(&chained) == &found[0]];
    *place = now;
    atomic_store(&chained, place);
    /* No SA_RESTART: blocked calls must return. SA_ONSTACK: for threads with a small stack, that have another for it. */
    struct sigaction own = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK, .sa_mask = now.sa_mask};
    sigaction(PYHV_KICK_SIGNAL, &own, NULL);
}

void pyhv_kick_init(struct pyhv_kick *kick)
{
    pthread_mutex_init(&kick->lock, NULL);
    pthread_mutex_lock(&install_lock);
    users++;
    install();
    pthread_mutex_unlock(&install_lock);
}

void pyhv_kick_destroy(struct pyhv_kick *kick)
{
    struct sigaction now;
    pthread_mutex_lock(&install_lock);
    if (--users == 0) {
        sigaction(PYHV_KICK_SIGNAL, NULL, &now);
        if (is_installed(&now)) /* else somebody's is in front of it, who may call it */
            sigaction(PYHV_KICK_SIGNAL, atomic_load(&chained), NULL);
    }
    pthread_mutex_unlock(&install_lock);
    pthread_mutex_destroy(&kick->lock);
}

void pyhv_kick_enter(struct pyhv_kick *kick, void (*hook)(void *opaque), void *opaque)
{
    sigset_t own;
    here.hook = hook;
    here.opaque = opaque;
    here.runs = true;
    sigemptyset(&own);
    sigaddset(&own, PYHV_KICK_SIGNAL);
    pthread_sigmask(SIG_UNBLOCK, &own, &kick->mask);
    pthread_mutex_lock(&kick->lock);
    kick->thread = pthread_self();
    kick->running = true;
    pthread_mutex_unlock(&kick->lock);
}

void pyhv_kick_leave(struct pyhv_kick *kick)
{
    pthread_mutex_lock(&kick->lock);
    kick->running = false;
    pthread_mutex_unlock(&kick->lock);
    if (sigismember(&kick->mask,
                    PYHV_KICK_SIGNAL)) /* one that is on its way arrives now, and not when it is unblocked */
        pthread_sigmask(SIG_BLOCK, NULL, NULL);
    pthread_sigmask(SIG_SETMASK, &kick->mask, NULL);
    here.runs = false;
    here.hook = NULL;
}

int pyhv_kick_send(struct pyhv_kick *kick)
{
    if (!kick->running)
        return 0;
    pthread_mutex_lock(&install_lock);
    install();
    pthread_mutex_unlock(&install_lock);
    return pthread_kill(kick->thread, PYHV_KICK_SIGNAL);
}

/* SPDX-License-Identifier: MIT */
#include <pthread.h>

#include "fault.h"

static bool is_layer(const struct pyhv_fault *fault, int layer, const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO && action->sa_sigaction == fault->layers[layer];
}

void pyhv_fault_install(struct pyhv_fault *fault)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct sigaction now;
    pthread_mutex_lock(&lock);
    sigaction(fault->signal, NULL, &now);
    int front = PYHV_FAULT_LAYERS;
    while (front > 0 && !is_layer(fault, front - 1, &now))
        front--;
    if (front > 0) {
        fault->used = front; /* what was above has gone */
    } else {
        /* More than so many, one on top of the other, share the last. */
        int layer = fault->used < PYHV_FAULT_LAYERS ? fault->used++ : PYHV_FAULT_LAYERS - 1;
        fault->found[layer] = now;
        /* SA_NODEFER: it may be left by a jump that does not bring the signals' mask back. */
        struct sigaction own = {.sa_sigaction = fault->layers[layer], .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
        sigemptyset(&own.sa_mask);
        sigaction(fault->signal, &own, NULL);
    }
    pthread_mutex_unlock(&lock);
}

void pyhv_fault_pass_on(const struct pyhv_fault *fault, int layer, siginfo_t *info, void *context)
{
    const struct sigaction *below = &fault->found[layer];
    const bool sent = info->si_code <= 0; /* by kill() or its like; else the instruction is about to fault again */
    if (below->sa_handler == SIG_DFL || (below->sa_handler == SIG_IGN && !sent)) {
        signal(fault->signal, SIG_DFL);
        if (sent)
            raise(fault->signal);
    } else if (below->sa_flags & SA_SIGINFO) {
        below->sa_sigaction(fault->signal, info, context);
    } else if (below->sa_handler != SIG_IGN) {
        below->sa_handler(fault->signal);
    }
}

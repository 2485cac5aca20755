/* SPDX-License-Identifier: MIT
 *
 * The signal that reaches a thread inside the engine, and its handler.
 *
 * It is SIGURG. An ordinary signal cannot be lost: where the queue of signals is full (RLIMIT_SIGPENDING), a real-time
 * signal is refused, an ordinary one only comes without its siginfo. And of the ordinary ones SIGURG disturbs least: what
 * else sends it (out-of-band data of a socket with an owner) is rare, its default is to be ignored, and debuggers pass
 * it on.
 *
 * The program that pyhv is a part of may use it as well. A handler that is found is called for every SIGURG that is not
 * pyhv's own, also one that is installed while a VM exists, which pyhv puts itself in front of when it next sends the
 * signal. Until then the timer of an emulated guest, which the kernel sends by the same signal, is lost if the guest is
 * computing: a program should install its handler before it runs one. After the last vCPU the handler that was found is
 * back. One thing differs for such a program meanwhile: no SA_RESTART.
 */
#ifndef PYHV_KICK_H
#define PYHV_KICK_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>

#define PYHV_KICK_SIGNAL SIGURG

/* A vCPU's thread, as others reach it. */
struct pyhv_kick {
    pthread_mutex_t lock; /* covers thread and running, so that no signal goes to a thread that has ended */
    pthread_t thread;
    bool running;
    sigset_t mask; /* what the thread blocked before it ran the vCPU */
};

/* Makes it, and installs the handler if this is the first; gives both back. */
void pyhv_kick_init(struct pyhv_kick *kick);
void pyhv_kick_destroy(struct pyhv_kick *kick);

/* The calling thread runs the vCPU from here to pyhv_kick_leave(): the signal gets through, whatever the thread blocks,
 * and interrupts system calls. `hook`, unless NULL, is called with `opaque` by the signal's handler on this thread, whoever sent it. */
void pyhv_kick_enter(struct pyhv_kick *kick, void (*hook)(void *opaque), void *opaque);
void pyhv_kick_leave(struct pyhv_kick *kick);

/* Sends the signal, if a thread runs the vCPU. With kick->lock held. Returns 0 or an errno, which only a sandbox's filter
 * of system calls can cause. */
int pyhv_kick_send(struct pyhv_kick *kick);

#endif

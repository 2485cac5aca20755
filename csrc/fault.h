/* SPDX-License-Identifier: MIT
 *
 * Handlers of the signals that a fault is (SIGBUS, SIGSEGV), which share the signal with the program that pyhv is a part of.
 *
 * What is not pyhv's goes to the handler that was found. A program may install its own later (Python's faulthandler does,
 * when it is enabled): pyhv puts itself in front of that when it next needs the signal. Such a handler may call the one
 * that it found, which was pyhv's. So each time pyhv is another function, that has its own handler below it.
 */
#ifndef PYHV_FAULT_H
#define PYHV_FAULT_H

#include <signal.h>
#include <stdbool.h>

enum { PYHV_FAULT_LAYERS = 4 };

struct pyhv_fault {
    int signal;
    void (*layers[PYHV_FAULT_LAYERS])(int signal, siginfo_t *info, void *context);
    struct sigaction found[PYHV_FAULT_LAYERS]; /* the handler below each */
    int used;                                  /* so many of them have one */
};

/* Defines the struct pyhv_fault `name` of signal `number`. `mine` is a function that does what there is to do if the signal
 * is pyhv's, and returns whether it was: bool mine(const siginfo_t *). It may leave by a jump. */
#define PYHV_FAULT(name, number, mine) \
    static struct pyhv_fault name;     \
    PYHV_FAULT_LAYER(name, mine, 0)    \
    PYHV_FAULT_LAYER(name, mine, 1)    \
    PYHV_FAULT_LAYER(name, mine, 2)    \
    PYHV_FAULT_LAYER(name, mine, 3)    \
    static struct pyhv_fault name = {.signal = number, .layers = {name##_0, name##_1, name##_2, name##_3}}
#define PYHV_FAULT_LAYER(name, mine, n)                                \
    static void name##_##n(int signal, siginfo_t *info, void *context) \
    {                                                                  \
        (void)signal;                                                  \
        if (!mine(info))                                               \
            pyhv_fault_pass_on(&name, n, info, context);               \
    }

/* Puts pyhv in front of what is there. Any thread. */
void pyhv_fault_install(struct pyhv_fault *fault);

/* To the handler that is below; where there is none the signal has its usual end. */
void pyhv_fault_pass_on(const struct pyhv_fault *fault, int layer, siginfo_t *info, void *context);

#endif

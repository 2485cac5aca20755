/* SPDX-License-Identifier: MIT
 *
 * The signal that reaches vCPUs' threads, and what a program that uses the same one sees.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "kick.h"

static atomic_int others, hooks;
static struct sigaction below;

static void count_other(int signal)
{
    CHECK_EQUAL(signal, SIGURG);
    atomic_fetch_add(&others, 1);
}

/* A program's handler that calls the one that it found, as faulthandler does. */
static void count_and_chain(int signal, siginfo_t *info, void *context)
{
    count_other(signal);
    below.sa_sigaction(signal, info, context);
}

static void count_hook(void *opaque)
{
    CHECK(opaque == &hooks);
    atomic_fetch_add(&hooks, 1);
}

static void set_handler(void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler};
    sigaction(SIGURG, &action, NULL);
}

static struct sigaction handler_now(void)
{
    struct sigaction action;
    sigaction(SIGURG, NULL, &action);
    return action;
}

struct sleeper {
    struct pyhv_kick kick;
    atomic_bool runs, over;
};

/* A vCPU's thread: sleeps in system calls until it is over. Blocks all signals, as a program's thread may. */
static void *sleep_on(void *opaque)
{
    struct sleeper *sleeper = opaque;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    pyhv_kick_enter(&sleeper->kick, count_hook, &hooks);
    atomic_store(&sleeper->runs, true);
    while (!atomic_load(&sleeper->over))
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    pyhv_kick_leave(&sleeper->kick);
    return NULL;
}

static int send_kick(struct sleeper *sleeper)
{
    pthread_mutex_lock(&sleeper->kick.lock);
    int errnum = pyhv_kick_send(&sleeper->kick);
    pthread_mutex_unlock(&sleeper->kick.lock);
    return errnum;
}

/* Sends `count` kicks, each of which must arrive. */
static void kick_times(struct sleeper *sleeper, int count)
{
    for (int i = 0; i < count; i++) {
        int before = atomic_load(&hooks);
        CHECK_EQUAL(send_kick(sleeper), 0);
        while (atomic_load(&hooks) == before)
            sched_yield();
    }
}

static pthread_t start(struct sleeper *sleeper)
{
    pthread_t thread;
    *sleeper = (struct sleeper){.over = false};
    atomic_store(&hooks, 0);
    atomic_store(&others, 0);
    pyhv_kick_init(&sleeper->kick);
    CHECK_EQUAL(send_kick(sleeper), 0); /* to nobody */
    if (pthread_create(&thread, NULL, sleep_on, sleeper))
        abort();
    while (!atomic_load(&sleeper->runs))
        sched_yield();
    return thread;
}

static void finish(struct sleeper *sleeper, pthread_t thread)
{
    atomic_store(&sleeper->over, true);
    pthread_join(thread, NULL);
    pyhv_kick_destroy(&sleeper->kick);
}

static void another_handler_gets_its_own(void)
{
    struct sleeper sleeper;
    set_handler(count_other);
    pthread_t thread = start(&sleeper);
    kick_times(&sleeper, 20);
    CHECK_EQUAL(atomic_load(&others), 0); /* ours are none of its business */
    for (int i = 0; i < 20; i++)
        raise(SIGURG);
    kill(getpid(), SIGURG);
    CHECK_EQUAL(atomic_load(&others), 21);
    CHECK_EQUAL(atomic_load(&hooks), 20); /* and the other way round */
    finish(&sleeper, thread);
    CHECK(handler_now().sa_handler == count_other);
}

static void a_handler_that_comes_later(void)
{
    struct sleeper sleeper;
    set_handler(SIG_DFL);
    pthread_t thread = start(&sleeper);
    set_handler(count_other);
    kick_times(&sleeper, 20);
    raise(SIGURG);
    CHECK_EQUAL(atomic_load(&others), 1);
    set_handler(SIG_IGN);
    kick_times(&sleeper, 20);
    raise(SIGURG);
    CHECK_EQUAL(atomic_load(&others), 1);
    set_handler(SIG_DFL);
    kick_times(&sleeper, 20);
    finish(&sleeper, thread);
    CHECK(handler_now().sa_handler == SIG_DFL);
}

static void a_handler_on_top_that_calls_ours(void)
{
    struct sleeper sleeper;
    struct sigaction chaining = {.sa_sigaction = count_and_chain, .sa_flags = SA_SIGINFO};
    set_handler(SIG_DFL);
    pthread_t thread = start(&sleeper);
    sigaction(SIGURG, &chaining, &below);
    kick_times(&sleeper, 20);
    int before = atomic_load(&others);
    raise(SIGURG);
    CHECK_EQUAL(atomic_load(&others), before + 1);
    finish(&sleeper, thread);
    CHECK(handler_now().sa_sigaction == count_and_chain);
    set_handler(SIG_DFL);
}

/* Several vCPUs: the handler stays until the last has gone. */
static void the_last_gives_it_back(void)
{
    struct pyhv_kick first, second;
    set_handler(count_other);
    pyhv_kick_init(&first);
    pyhv_kick_init(&second);
    pyhv_kick_destroy(&first);
    CHECK(handler_now().sa_handler != count_other);
    pyhv_kick_destroy(&second);
    CHECK(handler_now().sa_handler == count_other);
    set_handler(SIG_DFL);
}

static void no_room_in_the_queue(void)
{
    struct sleeper sleeper;
    struct rlimit before, none;
    getrlimit(RLIMIT_SIGPENDING, &before);
    none = (struct rlimit){.rlim_cur = 0, .rlim_max = before.rlim_max};
    setrlimit(RLIMIT_SIGPENDING, &none);
    set_handler(count_other);
    pthread_t thread = start(&sleeper);
    kick_times(&sleeper, 200);
    CHECK_EQUAL(atomic_load(&others), 0);
    finish(&sleeper, thread);
    set_handler(SIG_DFL);
    setrlimit(RLIMIT_SIGPENDING, &before);
}

int main(void)
{
    alarm(60); /* a lost kick must not hang the tests */
    another_handler_gets_its_own();
    a_handler_that_comes_later();
    a_handler_on_top_that_calls_ours();
    the_last_gives_it_back();
    no_room_in_the_queue();
    return check_report("test_kick");
}

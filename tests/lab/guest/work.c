/* The first process of a Linux guest that checks its own work, for an emulator of processors: what it says ("work: KEY
 * VALUE", a line each) depends on nothing but its command line (rounds=N), so that two who run it can be compared.
 * Children compute with integers and with floats that a wrong switch of tasks would mix up, send each other through pipes
 * what they check by its sum, write and read files, and are interrupted by signals, all at once on one processor. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WORKERS = 8, BLOCK = 4096 };

static void fail(const char *what, long expected, long got)
{
    printf("work: wrong %s: expected %ld, got %ld\n", what, expected, got);
    fflush(stdout);
    _exit(1);
}

static void need(const char *what, long expected, long got)
{
    if (expected != got)
        fail(what, expected, got);
}

static uint64_t next(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static uint64_t sum(const uint8_t *bytes, size_t size, uint64_t so_far)
{
    for (size_t i = 0; i < size; i++)
        so_far = (so_far ^ bytes[i]) * UINT64_C(0x100000001b3);
    return so_far;
}

static volatile sig_atomic_t alarms, hits;

static void on_alarm(int signal)
{
    /* Floats of its own, in the middle of the others'. */
    volatile double x = signal;
    for (int i = 0; i < 20; i++)
        x = x * 1.5 + 1;
    alarms++;
}

static void on_hit(int signal)
{
    (void)signal;
    hits++;
}

/* SSE and x87, which give the same number each time if nobody disturbs them. */
static double floats(int steps)
{
    double x = 0.5;
    long double y = 1;
    for (int i = 1; i <= steps; i++) {
        x = x * 3.7 * (1 - x);
        y = (y + 2 / y) / 2 + (long double)x / i;
    }
    return x + (double)y;
}

/* A child that gives back what it gets, its sum behind it. */
static void echo(int from, int to)
{
    uint8_t block[BLOCK];
    uint64_t total = 1;
    size_t have = 0;
    for (ssize_t part; (part = read(from, block + have, sizeof block - have)) > 0;) {
        have += (size_t)part;
        if (have < sizeof block)
            continue;
        total = sum(block, have, total);
        for (size_t done = 0; done < have; done += (size_t)part)
            if ((part = write(to, block + done, have - done)) <= 0)
                _exit(2);
        have = 0;
    }
    if (write(to, &total, sizeof total) != sizeof total)
        _exit(3);
    _exit(0);
}

static uint64_t through_pipes(uint64_t *seed, int blocks)
{
    int there[2], back[2], status;
    need("pipe", 0, pipe(there) | pipe(back));
    pid_t child = fork();
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        echo(there[0], back[1]);
    }
    close(there[0]);
    close(back[1]);
    uint8_t sent[BLOCK], got[BLOCK];
    uint64_t total = 1, theirs;
    for (int i = 0; i < blocks; i++) {
        for (size_t at = 0; at < sizeof sent; at += 8)
            memcpy(sent + at, (uint64_t[]){next(seed)}, 8);
        total = sum(sent, sizeof sent, total);
        for (size_t done = 0; done < sizeof sent;) { /* in odd pieces */
            size_t piece = 1 + next(seed) % 700;
            ssize_t part = write(there[1], sent + done, piece < sizeof sent - done ? piece : sizeof sent - done);
            if (part > 0)
                done += (size_t)part;
        }
        for (size_t done = 0; done < sizeof got;) {
            ssize_t part = read(back[0], got + done, sizeof got - done);
            if (part > 0)
                done += (size_t)part;
        }
        need("block through pipes", 0, memcmp(sent, got, sizeof sent));
    }
    close(there[1]);
    while (read(back[0], &theirs, sizeof theirs) != sizeof theirs)
        ;
    need("sum of what went through", (long)total, (long)theirs);
    close(back[0]);
    while (waitpid(child, &status, 0) != child)
        ;
    need("the child's status", 0, status);
    return total;
}

static uint64_t through_files(int worker, uint64_t *seed)
{
    char name[32], line[64], *read_back = malloc(1 << 16);
    snprintf(name, sizeof name, "/tmp/%d", worker);
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    size_t size = 0;
    uint64_t total = 1;
    while (size < 30000) {
        int length = snprintf(line, sizeof line, "%zu %016llx\n", size, (unsigned long long)next(seed));
        need("bytes written", length, write(fd, line, (size_t)length));
        total = sum((uint8_t *)line, (size_t)length, total);
        size += (size_t)length;
    }
    need("the file's size", (long)size, lseek(fd, 0, SEEK_CUR));
    for (int i = 0; i < 12; i++) { /* the same each time */
        need("bytes read", (long)size, pread(fd, read_back, 1 << 16, 0));
        need("the file's sum", (long)total, (long)sum((uint8_t *)read_back, size, 1));
    }
    close(fd);
    unlink(name);
    free(read_back);
    return total;
}

static uint64_t through_signals(int count)
{
    sigset_t usr1, before;
    int status;
    hits = 0;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr1, &before);
    pid_t parent = getpid(), child = fork();
    for (int i = 0; i < count; i++) {
        if (child == 0)
            kill(parent, SIGUSR1);
        while (hits == i)
            sigsuspend(&before); /* the alarms wake it too */
        if (child != 0)
            kill(child, SIGUSR1);
    }
    if (child == 0)
        _exit(0);
    while (waitpid(child, &status, 0) != child)
        ;
    need("the child's status", 0, status);
    sigprocmask(SIG_SETMASK, &before, NULL);
    return (uint64_t)hits;
}

static void work(int worker, int rounds, int to)
{
    struct sigaction action = {.sa_handler = on_alarm}, hit = {.sa_handler = on_hit};
    struct itimerval often = {{0, 3000 + worker * 170}, {0, 1000}};
    uint64_t seed = 88172645463325252u + (uint64_t)worker, result = 1;
    const double right = floats(20000);
    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGUSR1, &hit, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    for (int round = 0; round < rounds; round++) {
        result = result * 31 + through_pipes(&seed, 8);
        result = result * 31 + through_files(worker, &seed);
        result = result * 31 + through_signals(50);
        double now = floats(20000);
        need("floats", 0, memcmp(&right, &now, sizeof now));
        for (int i = 0; i < 3000; i++)
            need("system call", -1, syscall(SYS_close, -1));
    }
    setitimer(ITIMER_REAL, &(struct itimerval){0}, NULL);
    need("alarms", 1, alarms > 0);
    need("the result's bytes", sizeof result, write(to, &result, sizeof result));
    _exit(0);
}

int main(void)
{
    int results[WORKERS][2], status, wrong = 0;
    char *wanted = getenv("rounds"); /* Linux hands over what of its command line it does not know */
    int rounds = wanted ? atoi(wanted) : 1;
    mkdir("/tmp", 0777);
    mount("tmpfs", "/tmp", "tmpfs", 0, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int worker = 0; worker < WORKERS; worker++) {
        need("pipe", 0, pipe(results[worker]));
        if (fork() == 0)
            work(worker, rounds, results[worker][1]);
    }
    while (wait(&status) > 0)
        wrong += status != 0;
    for (int worker = 0; worker < WORKERS && !wrong; worker++) {
        uint64_t result = 0;
        need("a result", sizeof result, read(results[worker][0], &result, sizeof result));
        printf("work: worker%d %016llx\n", worker, (unsigned long long)result);
    }
    /* Whole lines, one after the other, through a serial port with interrupts. */
    for (int i = 0; i < 300 * rounds; i++)
        printf("work: line%d abcdefghijklmnopqrstuvwxyz\n", i);
    printf("work: end %s\n", wrong ? "wrong" : "right");
    fflush(stdout);
    usleep(300000);
    reboot(RB_AUTOBOOT);
    return 0;
}

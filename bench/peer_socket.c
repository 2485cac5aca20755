/* SPDX-License-Identifier: MIT
 *
 * The peer of the migration rows: BYTES of memory through a UNIX socket by write and read, from one process to another,
 * and nothing else.
 *
 *   peer_socket BYTES
 *
 * A request is "read": the bytes are read into one small buffer again and again; or "keep": into new anonymous memory in
 * huge pages, the quickest that there is, as they must wherever somebody wants to have them. The writer has touched its
 * memory before time counts.
 */
#include <sys/socket.h>
#include <sys/wait.h>

#include "peer.h"

/* The best of 64, 128, 256 KiB and 1 MiB, and of the kernel's own and larger socket buffers, tried on Linux 6.18. */
enum { BUFFER = 256 * 1024, SOCKET_BUFFER = 1024 * 1024 };

static uint8_t buffer[BUFFER];

static _Noreturn void writer(int fd, const uint8_t *memory, size_t size, int ready)
{
    volatile uint8_t touched = 0;
    for (size_t at = 0; at < size; at += 4096)
        touched ^= memory[at];
    if (write(ready, "", 1) != 1)
        _exit(1);
    while (size) {
        ssize_t put = write(fd, memory, size < BUFFER ? size : BUFFER);
        if (put <= 0)
            _exit(1);
        memory += put;
        size -= (size_t)put;
    }
    _exit(0);
}

static double sample(const uint8_t *memory, size_t size, int keep)
{
    int fds[2], ready[2], room = SOCKET_BUFFER;
    uint8_t byte, *target = NULL;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0 || pipe(ready) < 0)
        fatal("socketpair");
    (void)setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    if (keep) {
        target = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (target == MAP_FAILED)
            fatal("mmap");
        (void)madvise(target, size, MADV_HUGEPAGE);
    }
    pid_t child = fork();
    if (child < 0)
        fatal("fork");
    if (child == 0) {
        close(fds[1]);
        writer(fds[0], memory, size, ready[1]);
    }
    close(fds[0]);
    if (read(ready[0], &byte, 1) != 1)
        fatal("the writer");
    double start = now_ns();
    for (size_t got = 0; got < size;) {
        ssize_t part = read(fds[1], keep ? target + got : buffer, keep && size - got < BUFFER ? size - got : BUFFER);
        if (part <= 0)
            fatal("read");
        got += (size_t)part;
    }
    double took = now_ns() - start;
    waitpid(child, NULL, 0);
    close(fds[1]);
    close(ready[0]);
    close(ready[1]);
    if (keep)
        munmap(target, size);
    return took;
}

int main(int argc, char **argv)
{
    char request[16];
    size_t size = argc > 1 ? strtoull(argv[1], NULL, 0) : 0;
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fatal("mmap");
    for (size_t at = 0; at + 8 <= size; at += 8) {
        uint64_t value = (at + 1) * UINT64_C(0x9E3779B185EBCA87);
        memcpy(memory + at, &value, sizeof value);
    }
    while (fgets(request, sizeof request, stdin)) {
        printf("%.0f\n", sample(memory, size, strncmp(request, "keep", 4) == 0));
        fflush(stdout);
    }
    return 0;
}

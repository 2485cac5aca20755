/* The first process of the Linux guests in ../bench.py: says that it is there, in one line, and waits for ever; with
 * write=N on the command line it writes to N pages a second meanwhile, one after the other of 16 MiB. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 4096, TIMES = 100 }; /* it wakes up so many times a second */

static char memory[PAGES * PAGE];

int main(void)
{
    char line[4096] = "";
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    int fd = open("/proc/cmdline", O_RDONLY);
    if (fd < 0 || read(fd, line, sizeof line - 1) < 0)
        printf("bench: no command line: %m\n");
    const char *option = strstr(line, "write=");
    int pages = option ? atoi(option + strlen("write=")) / TIMES : 0;
    for (size_t i = 0; pages && i < sizeof memory; i++)
        memory[i] = (char)(i * 2654435761u >> 24);
    printf("bench: up\n");
    fflush(stdout);
    for (size_t at = 0;;) {
        if (!pages)
            pause();
        for (int i = 0; i < pages; i++, at = (at + PAGE) % sizeof memory)
            memory[at]++;
        nanosleep(&(struct timespec){.tv_nsec = 1000000000 / TIMES}, NULL);
    }
}

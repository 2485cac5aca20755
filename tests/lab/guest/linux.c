/* The first process of a Linux guest that pyhv boots inside a host: it says what it finds, a line each ("linux: KEY
 * VALUE"), and ends the machine as its command line says: do=off (the default), reboot, halt, panic, sleep; with do=read
 * it tells a line of its console's input first; with do=work it computes for ever, and says so each second; with do=ride
 * it goes on in ride.c. Modules in /modules that the command line names (load=A,B) are loaded first. */
#define _GNU_SOURCE
#include "ride.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char *read_file(const char *path)
{
    static char text[16384];
    int fd = open(path, O_RDONLY);
    ssize_t size = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[size > 0 ? size : 0] = '\0';
    return text;
}

static void tell_file(const char *key, const char *path)
{
    char *text = read_file(path);
    text[strcspn(text, "\n")] = '\0';
    printf("linux: %s %s\n", key, text);
}

/* The line of a file that has this word, its blanks squeezed. */
static void tell_line(const char *key, const char *path, const char *word)
{
    for (char *line = strtok(read_file(path), "\n"); line; line = strtok(NULL, "\n")) {
        if (!strstr(line, word))
            continue;
        printf("linux: %s", key);
        for (char *rest = line, *part; (part = strsep(&rest, " \t"));)
            if (*part)
                printf(" %s", part);
        printf("\n");
        return;
    }
    printf("linux: %s\n", key);
}

static void load(const char *name)
{
    char path[300];
    snprintf(path, sizeof path, "/modules/%s.ko", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
        printf("linux: %s cannot be loaded: %m\n", name);
    if (fd >= 0)
        close(fd);
}

/* The value of a word KEY=VALUE of the command line, or "". */
static const char *option(const char *key, char *line)
{
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n"))
        if (!strncmp(word, key, strlen(key)) && word[strlen(key)] == '=')
            return word + strlen(key) + 1;
    return "";
}

int main(void)
{
    char line[4096];
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);

    snprintf(line, sizeof line, "%s", read_file("/proc/cmdline"));
    char names[256];
    snprintf(names, sizeof names, "%s", option("load", line));
    for (char *rest = names, *name; (name = strsep(&rest, ",")) && *name;)
        load(name);

    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("linux: up %lld.%03ld\n", (long long)now.tv_sec, now.tv_nsec / 1000000);
    printf("linux: date %lld\n", (long long)time(NULL));
    printf("linux: cpus %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
    printf("linux: pages %ld\n", sysconf(_SC_PHYS_PAGES));
    tell_file("clocksource", "/sys/devices/system/clocksource/clocksource0/current_clocksource");
    tell_file("serial", "/sys/class/tty/ttyS0/irq");
    tell_file("rtc", "/sys/class/rtc/rtc0/name");
    tell_file("maker", "/sys/class/dmi/id/sys_vendor");
    tell_file("uuid", "/sys/class/dmi/id/product_uuid");
    tell_line("acpi", "/proc/interrupts", " acpi");
    tell_line("flags", "/proc/cpuinfo", "flags");
    tell_file("cmdline", "/proc/cmdline");

    snprintf(line, sizeof line, "%s", read_file("/proc/cmdline"));
    const char *act = option("do", line);
    if (!strcmp(act, "ride"))
        ride();
    if (!strcmp(act, "reboot"))
        reboot(RB_AUTOBOOT);
    if (!strcmp(act, "halt"))
        reboot(RB_HALT_SYSTEM);
    if (!strcmp(act, "panic")) {
        int fd = open("/proc/sysrq-trigger", O_WRONLY);
        if (write(fd, "c", 1) < 0)
            printf("linux: no panic: %m\n");
    }
    while (!strcmp(act, "sleep"))
        pause();
    if (!strcmp(act, "read") && fgets(line, sizeof line, stdin))
        printf("linux: read %s", line);
    for (time_t last = 0; !strcmp(act, "work");) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec != last)
            printf("linux: works %lld\n", (long long)now.tv_sec);
        last = now.tv_sec;
    }
    reboot(RB_POWER_OFF);
    return 1;
}

/* What a Linux guest does that is moved from host to host (do=ride): it works, tells the time, answers, and notices.
 *
 * A worker on each processor verifies its own results, with the instructions that CPUID showed it when it began; what it
 * had in memory; that CPUID stays what it was; that CLOCK_MONOTONIC goes back for nobody; and sleeps now and then. The
 * first process prints numbered lines ("ride: NUMBER WORDS"), so that none can be lost or doubled:
 *
 *   ifunc RESOLVER=CHOSEN ...     what the C library chose, as addresses in this program
 *   flags ...                     of /proc/cpuinfo, of each processor
 *   uses WORKER ...               the instructions that a worker found
 *   ready
 *   timer CLOCK DUE NOW           a timer has fired; another is armed. Nanoseconds
 *   kernel PRIORITY TEXT          what the kernel had to say since "ready"
 *   fault WORKER TEXT             what a worker noticed, the first time
 *
 * It takes orders, a line each, on its terminal:
 *
 *   ask WORD    answer WORD MONOTONIC REALTIME RTC CLOCKSOURCE CPUINFO ROUNDS FAULTS LATEST: ns, ns, s, name, checksum
 *               (without the MHz), and of each worker, with commas: rounds, faults, by how many ns it slept too long
 *   set         set the time by the RTC, and print "set"
 *   off         print "off" and switch the machine off */
#define _GNU_SOURCE
#include "ride.h"

#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define SECOND       1000000000LL
#define WORKERS_MAX  64
#define PAGES        16 /* that a worker writes in each round */
#define PAGE_WORDS   512
#define SIZE         4096
#define REPEAT       4
#define SLEEP_NS     (20 * 1000000LL)
#define MONOTONIC_NS (SECOND / 2)
#define REALTIME_NS  (SECOND * 7 / 10)

/* Of SIZE bytes of the sequence that fill() makes: tests/unit/test_lab_linux.py counts them again. */
#define KNOWN_CRC32C 0x0879fa7aU
#define KNOWN_ONES   16369U
#define KNOWN_PAIRS  33491112U
#define KNOWN_SUM    0x401df11f45f4e618ULL /* 1 + 1/2 + ... + 1/1000 in doubles, from the left */

struct worker {
    _Atomic uint64_t rounds, faults;
    _Atomic int64_t latest;
    char fault[200];
    char uses[100];
    bool told;
};

static struct shared {
    _Atomic int64_t newest; /* CLOCK_MONOTONIC, as late as anybody has seen it */
    struct worker workers[WORKERS_MAX];
} * shared;

static int workers;

static int64_t now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * SECOND + time.tv_nsec;
}

static struct timespec timespec_of(int64_t ns)
{
    return (struct timespec){ns / SECOND, ns % SECOND};
}

/* -- what is counted ------------------------------------------------------------------------------------------- */

static void fill(uint8_t *bytes, size_t size)
{
    uint64_t x = 1;
    for (size_t i = 0; i < size; i++) {
        x = x * 6364136223846793005ULL + 1442695040888963407ULL;
        bytes[i] = (uint8_t)(x >> 56);
    }
}

static uint32_t crc32c_plain(const uint8_t *bytes, size_t size)
{
    uint32_t crc = ~0U;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78U : 0);
    }
    return ~crc;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(const uint8_t *bytes, size_t size)
{
    uint32_t crc = ~0U;
    for (size_t i = 0; i < size; i++)
        crc = _mm_crc32_u8(crc, bytes[i]);
    return ~crc;
}

static uint32_t ones_plain(const uint8_t *bytes, size_t size)
{
    uint32_t ones = 0;
    for (size_t i = 0; i < size; i++)
        for (uint8_t byte = bytes[i]; byte; byte &= (uint8_t)(byte - 1))
            ones++;
    return ones;
}

__attribute__((target("popcnt"))) static uint32_t ones_popcnt(const uint8_t *bytes, size_t size)
{
    uint32_t ones = 0;
    for (size_t i = 0; i < size; i++)
        ones += (uint32_t)__builtin_popcount(bytes[i]);
    return ones;
}

/* The sum of each byte of even place times the next. */
static uint32_t pairs_plain(const uint8_t *bytes, size_t size)
{
    uint32_t sum = 0;
    for (size_t i = 0; i < size; i += 2)
        sum += bytes[i] * bytes[i + 1];
    return sum;
}

__attribute__((target("sse2"))) static uint32_t pairs_sse2(const uint8_t *bytes, size_t size)
{
    __m128i sums = _mm_setzero_si128(), low = _mm_set1_epi32(0xff);
    for (size_t i = 0; i < size; i += 16) {
        __m128i some = _mm_loadu_si128((const __m128i *)(bytes + i));
        for (int half = 0; half < 2; half++, some = _mm_srli_epi32(some, 16)) {
            __m128i even = _mm_and_si128(some, low), odd = _mm_and_si128(_mm_srli_epi32(some, 8), low);
            sums = _mm_add_epi32(sums, _mm_madd_epi16(even, odd));
        }
    }
    uint32_t sum[4];
    _mm_storeu_si128((__m128i *)sum, sums);
    return sum[0] + sum[1] + sum[2] + sum[3];
}

__attribute__((target("avx2"))) static uint32_t pairs_avx2(const uint8_t *bytes, size_t size)
{
    __m256i sums = _mm256_setzero_si256();
    for (size_t i = 0; i < size; i += 16) {
        __m256i some = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(bytes + i)));
        __m256i odd = _mm256_srli_epi32(some, 16), even = _mm256_and_si256(some, _mm256_set1_epi32(0xffff));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, odd));
    }
    uint32_t sum[8];
    _mm256_storeu_si256((__m256i *)sum, sums);
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

static uint64_t harmonic(void)
{
    volatile double sum = 0;
    for (int i = 1; i <= 1000; i++)
        sum += 1.0 / i;
    double last = sum;
    uint64_t bits;
    memcpy(&bits, &last, sizeof bits);
    return bits;
}

/* -- a worker -------------------------------------------------------------------------------------------------- */

static void fault(struct worker *self, const char *format, ...)
{
    if (atomic_load(&self->faults) == 0) {
        va_list words;
        va_start(words, format);
        vsnprintf(self->fault, sizeof self->fault, format, words);
        va_end(words);
    }
    atomic_fetch_add(&self->faults, 1);
}

static void check_clock(struct worker *self)
{
    int64_t newest = atomic_load(&shared->newest), time = now(CLOCK_MONOTONIC);
    if (time < newest)
        fault(self, "CLOCK_MONOTONIC went back by %lld ns", (long long)(newest - time));
    while (newest < time && !atomic_compare_exchange_weak(&shared->newest, &newest, time))
        ;
}

struct words {
    uint32_t leaf, eax, ebx, ecx, edx;
};

static void read_cpuid(struct words words[3])
{
    static const uint32_t leaves[] = {1, 7, 0x80000001};
    for (int i = 0; i < 3; i++) {
        words[i].leaf = leaves[i];
        __cpuid_count(leaves[i], 0, words[i].eax, words[i].ebx, words[i].ecx, words[i].edx);
    }
}

static void sleep_a_while(struct worker *self)
{
    int64_t due = now(CLOCK_MONOTONIC) + SLEEP_NS;
    struct timespec time = timespec_of(SLEEP_NS);
    clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL);
    int64_t late = now(CLOCK_MONOTONIC) - due;
    if (late < 0)
        fault(self, "woke %lld ns too early", (long long)-late);
    if (late > atomic_load(&self->latest))
        atomic_store(&self->latest, late);
}

static void work(int number)
{
    struct worker *self = &shared->workers[number];
    cpu_set_t mine;
    CPU_ZERO(&mine);
    CPU_SET(number, &mine);
    if (sched_setaffinity(0, sizeof mine, &mine) < 0)
        fault(self, "cannot be bound to its processor: %s", strerror(errno));

    __builtin_cpu_init();
    bool sse42 = __builtin_cpu_supports("sse4.2"), popcnt = __builtin_cpu_supports("popcnt");
    bool avx2 = __builtin_cpu_supports("avx2");
    snprintf(self->uses, sizeof self->uses, "%s%s%s", sse42 ? "sse4.2 " : "", popcnt ? "popcnt " : "",
             avx2 ? "avx2" : "sse2");

    static uint64_t pages[PAGES][PAGE_WORDS];
    static uint8_t bytes[SIZE];
    struct words first[3], again[3];
    read_cpuid(first);
    for (uint64_t round = 1;; round++) {
        fill(bytes, SIZE);
        for (int i = 0; i < REPEAT; i++) {
            uint32_t crc = (sse42 ? crc32c_sse42 : crc32c_plain)(bytes, SIZE);
            uint32_t ones = (popcnt ? ones_popcnt : ones_plain)(bytes, SIZE);
            uint32_t pairs = (avx2 ? pairs_avx2 : pairs_sse2)(bytes, SIZE), plain = pairs_plain(bytes, SIZE);
            uint64_t sum = harmonic();
            if (crc != KNOWN_CRC32C || ones != KNOWN_ONES || pairs != KNOWN_PAIRS || plain != KNOWN_PAIRS ||
                sum != KNOWN_SUM)
                fault(self, "round %llu: counted %x %u %u %u %llx", (unsigned long long)round, crc, ones, pairs, plain,
                      (unsigned long long)sum);
            check_clock(self);
        }
        for (int page = 0; page < PAGES; page++) {
            for (int word = page % 8; word < PAGE_WORDS; word += 64) {
                uint64_t stamp = (uint64_t)number << 56 | (uint64_t)page << 48 | round;
                if (round > 1 && pages[page][word] != stamp - 1)
                    fault(self, "page %d word %d holds %llx in round %llu", page, word,
                          (unsigned long long)pages[page][word], (unsigned long long)round);
                pages[page][word] = stamp;
            }
        }
        read_cpuid(again);
        for (int i = 0; i < 3; i++)
            if (memcmp(&first[i], &again[i], sizeof first[i]))
                fault(self, "CPUID leaf %x was %x %x %x %x and is %x %x %x %x", first[i].leaf, first[i].eax,
                      first[i].ebx, first[i].ecx, first[i].edx, again[i].eax, again[i].ebx, again[i].ecx, again[i].edx);
        atomic_store(&self->rounds, round);
        sleep_a_while(self);
    }
}

/* -- the first process ----------------------------------------------------------------------------------------- */

static void say(const char *format, ...)
{
    static unsigned number;
    static char line[8192];
    int size = snprintf(line, sizeof line, "ride: %u ", ++number);
    va_list words;
    va_start(words, format);
    size += vsnprintf(line + size, sizeof line - (size_t)size - 1, format, words);
    va_end(words);
    if (size > (int)sizeof line - 2)
        size = sizeof line - 2;
    line[size++] = '\n';
    for (int done = 0; done < size;) {
        ssize_t written = write(STDOUT_FILENO, line + done, (size_t)(size - done));
        if (written > 0)
            done += (int)written;
    }
}

static char *contents(const char *path)
{
    static char text[65536];
    size_t size = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    for (ssize_t got; fd >= 0 && (got = read(fd, text + size, sizeof text - 1 - size)) > 0;)
        size += (size_t)got;
    if (fd >= 0)
        close(fd);
    text[size] = '\0';
    return text;
}

static void tell_ifuncs(void)
{
    extern const Elf64_Rela __rela_iplt_start[] __attribute__((weak)), __rela_iplt_end[] __attribute__((weak));
    static char text[4096];
    size_t size = 0;
    for (const Elf64_Rela *one = __rela_iplt_start; one < __rela_iplt_end && size + 64 < sizeof text; one++)
        size += (size_t)snprintf(text + size, sizeof text - size, " %llx=%llx", (unsigned long long)one->r_addend,
                                 *(unsigned long long *)one->r_offset);
    say("ifunc%s", text);
}

static void tell_flags(void)
{
    for (char *line = strtok(contents("/proc/cpuinfo"), "\n"); line; line = strtok(NULL, "\n"))
        if (!strncmp(line, "flags", 5) && strchr(line, ':'))
            say("flags %s", strchr(line, ':') + 2);
}

/* A checksum of /proc/cpuinfo without what is measured again each time. */
static uint32_t cpuinfo(void)
{
    uint32_t sum = 0;
    for (char *line = strtok(contents("/proc/cpuinfo"), "\n"); line; line = strtok(NULL, "\n"))
        if (strncmp(line, "cpu MHz", 7))
            sum = sum * 31 + crc32c_plain((const uint8_t *)line, strlen(line));
    return sum;
}

static long long rtc(void)
{
    return atoll(contents("/sys/class/rtc/rtc0/since_epoch"));
}

static void arm(int fd, clockid_t clock, int64_t in, int64_t *due)
{
    *due = now(clock) + in;
    struct itimerspec spec = {.it_value = timespec_of(*due)};
    timerfd_settime(fd, TFD_TIMER_ABSTIME, &spec, NULL);
}

static void set_time(void)
{
    long long before = rtc();
    while (rtc() == before)
        usleep(2000);
    struct timespec time = {rtc(), 0};
    clock_settime(CLOCK_REALTIME, &time);
    say("set");
}

static void answer(const char *word)
{
    static char text[3][WORKERS_MAX * 24];
    size_t size[3] = {0};
    int64_t monotonic = now(CLOCK_MONOTONIC), realtime = now(CLOCK_REALTIME);
    long long second = rtc();
    for (int i = 0; i < workers; i++) {
        struct worker *one = &shared->workers[i];
        if (atomic_load(&one->faults) && !one->told) {
            one->told = true;
            say("fault %d %s", i, one->fault);
        }
        const long long values[] = {(long long)atomic_load(&one->rounds), (long long)atomic_load(&one->faults),
                                    (long long)atomic_exchange(&one->latest, 0)};
        for (int what = 0; what < 3; what++)
            size[what] += (size_t)snprintf(text[what] + size[what], sizeof text[what] - size[what], "%s%lld",
                                           i ? "," : "", values[what]);
    }
    uint32_t sum = cpuinfo();
    char *source = contents("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    source[strcspn(source, "\n")] = '\0';
    say("answer %s %lld %lld %lld %s %08x %s %s %s", word, (long long)monotonic, (long long)realtime, second, source,
        sum, text[0], text[1], text[2]);
}

static void tell_kernel(int fd)
{
    char record[2048];
    for (ssize_t size; (size = read(fd, record, sizeof record - 1)) > 0 || errno == EPIPE;) {
        if (size <= 0) {
            say("kernel 0 some of its messages are lost");
            errno = 0;
            continue;
        }
        record[size] = '\0';
        char *text = strchr(record, ';');
        record[strcspn(record, "\n")] = '\0';
        say("kernel %d %s", atoi(record) & 7, text ? text + 1 : record);
    }
}

static void obey(char *line, int timer, int64_t *due)
{
    if (!strncmp(line, "ask ", 4)) {
        answer(line + 4);
    } else if (!strcmp(line, "set")) {
        set_time();
        arm(timer, CLOCK_REALTIME, REALTIME_NS, due);
    } else if (!strcmp(line, "off")) {
        say("off");
        tcdrain(STDOUT_FILENO);
        reboot(RB_POWER_OFF);
    } else {
        say("order %s", line);
    }
}

void ride(void)
{
    struct termios terminal;
    if (tcgetattr(STDIN_FILENO, &terminal) == 0) {
        terminal.c_lflag &= ~(tcflag_t)ECHO;
        terminal.c_oflag &= ~(tcflag_t)OPOST;
        tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
    }
    mknod("/kmsg", S_IFCHR | 0600, makedev(1, 11));
    int messages = open("/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    lseek(messages, 0, SEEK_END);

    workers = (int)sysconf(_SC_NPROCESSORS_ONLN);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    tell_ifuncs();
    tell_flags();
    for (int i = 0; i < workers; i++)
        if (fork() == 0) {
            work(i);
            _exit(1);
        }
    for (int i = 0; i < workers; i++) {
        while (!atomic_load(&shared->workers[i].rounds))
            usleep(1000);
        say("uses %d %s", i, shared->workers[i].uses);
    }
    say("ready");

    int timers[2] = {timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC), timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC)};
    static const clockid_t clocks[2] = {CLOCK_MONOTONIC, CLOCK_REALTIME};
    static const int64_t spans[2] = {MONOTONIC_NS, REALTIME_NS};
    static const char *const names[2] = {"monotonic", "realtime"};
    int64_t due[2];
    for (int i = 0; i < 2; i++)
        arm(timers[i], clocks[i], spans[i], &due[i]);

    static char typed[256];
    size_t size = 0;
    for (;;) {
        struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN},
                               {.fd = messages, .events = POLLIN},
                               {.fd = timers[0], .events = POLLIN},
                               {.fd = timers[1], .events = POLLIN}};
        poll(fds, 4, -1);
        if (fds[1].revents)
            tell_kernel(messages);
        for (int i = 0; i < 2; i++) {
            uint64_t times;
            if (!fds[2 + i].revents || read(timers[i], &times, sizeof times) < 0)
                continue;
            say("timer %s %lld %lld", names[i], (long long)due[i], (long long)now(clocks[i]));
            arm(timers[i], clocks[i], spans[i], &due[i]);
        }
        if (fds[0].revents) {
            ssize_t got = read(STDIN_FILENO, typed + size, sizeof typed - 1 - size);
            size += got > 0 ? (size_t)got : 0;
            for (char *end; (end = memchr(typed, '\n', size));) {
                *end = '\0';
                obey(typed, timers[1], &due[1]);
                size -= (size_t)(end + 1 - typed);
                memmove(typed, end + 1, size);
            }
            if (size == sizeof typed - 1)
                size = 0;
        }
    }
}

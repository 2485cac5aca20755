/* SPDX-License-Identifier: MIT
 *
 * The first process of a lab host: loads the modules, mounts the root file system, then runs the commands that the
 * lab sends, several at a time, and hands back their output and exit status.
 *
 * It is static C and not a script because it starts every host: under an emulated processor a shell's forks cost
 * more than the whole of what is done here. The frames are described in wire.py, its twin.
 *
 * The kernel's command line tells it what to do; what the kernel does not know of it comes as environment:
 *
 *   lab_channel=virtio   a virtio-serial port, both directions (QEMU)
 *   lab_channel=bochs    in by the third UART; out by port 0xe9, which Bochs prints at one instruction a byte where its
 *                        UART would take 87 microseconds of guest time
 *   lab_root=DEVICE      has the root file system, a squashfs
 *   lab_modules=A,B,C    loaded after the root is mounted; those needed to mount it are in the initramfs's /modules/order
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
    HELLO = 1,
    RUN = 2,
    STDIN = 3,
    STDIN_DISK = 4,
    KILL = 5,
    READY = 64,
    STDOUT = 65,
    STDERR = 66,
    EXIT = 67,
};

enum { RUN_STDIN = 1, RUN_TERMINAL = 2 };

#define MAX_PAYLOAD  65536
#define MAX_COMMANDS 32
#define MAX_STRINGS  1024

struct header {
    char magic[4];
    uint8_t type;
    uint8_t zero[3];
    uint32_t id;
    uint32_t length;
    uint32_t crc;
} __attribute__((packed));

struct command {
    uint32_t id; /* 0: free */
    pid_t pid;
    int exited;
    int status;
    int in, out, err; /* -1: closed */
    int ends;         /* the lab has sent the end of standard input */
    char *pending;    /* standard input that the command has not taken yet: [taken, filled) */
    size_t taken, filled, size;
};

static struct command commands[MAX_COMMANDS];
static int channel_in = -1, channel_out = -1; /* channel_out -1: port 0xe9 */
static int children = -1;                     /* signalfd of SIGCHLD */

static void die(const char *format, ...)
{
    va_list arguments;
    int error = errno;

    va_start(arguments, format);
    printf("lab agent: ");
    vprintf(format, arguments);
    printf(": %s\n", strerror(error));
    va_end(arguments);
    fflush(stdout);
    sleep(1); /* the UART's last bytes */
    reboot(RB_POWER_OFF);
    _exit(1);
}

static void *grow(void *old, size_t size)
{
    void *p = realloc(old, size);

    if (!p)
        die("%zu bytes of memory", size);
    return p;
}

/* ----------------------------------------------------------------------------------------------- frames -- */

static uint32_t crc_table[256];

static void crc_prepare(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;

        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        crc_table[i] = c;
    }
}

static uint32_t crc_add(uint32_t crc, const void *data, size_t length)
{
    const uint8_t *p = data;

    crc = ~crc;
    while (length--)
        crc = crc_table[(crc ^ *p++) & 255] ^ crc >> 8;
    return ~crc;
}

static void channel_write(const void *data, size_t length)
{
    const char *p = data;

    if (channel_out < 0) {
        __asm__ volatile("rep outsb" : "+S"(p), "+c"(length) : "d"(0xe9) : "memory");
        return;
    }
    while (length) {
        ssize_t n = write(channel_out, p, length);

        if (n > 0) {
            p += n;
            length -= n;
        } else if (n < 0 && errno != EINTR && errno != EAGAIN) {
            die("writing to the lab");
        } else {
            poll(NULL, 0, 10); /* the other end is away: between a snapshot and its restore */
        }
    }
}

static void send_frame(uint8_t type, uint32_t id, const void *payload, uint32_t length)
{
    static char buffer[sizeof(struct header) + MAX_PAYLOAD];
    struct header h = {.magic = {'P', 'y', 'L', 'b'}, .type = type, .id = id, .length = length};

    h.crc = crc_add(crc_add(0, &h, offsetof(struct header, crc)), payload, length);
    /* One write a frame: on the virtio port each write is a request of its own. */
    memcpy(buffer, &h, sizeof h);
    memcpy(buffer + sizeof h, payload, length);
    channel_write(buffer, sizeof h + length);
}

/* --------------------------------------------------------------------------------------------- commands -- */

static struct command *find(uint32_t id)
{
    for (int i = 0; i < MAX_COMMANDS; i++)
        if (commands[i].id == id)
            return &commands[i];
    return NULL;
}

static void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void refuse(uint32_t id, int error)
{
    int32_t status = -error;

    send_frame(EXIT, id, &status, sizeof status);
}

static void run(uint32_t id, char *payload, uint32_t length)
{
    char *strings[MAX_STRINGS + 2], *p = payload + 12, *end = payload + length, **argv, **envp;
    uint32_t head[3];
    size_t count = 0;
    struct command *c;
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1}, terminal = -1, error[2];

    if (length < sizeof head || !id || find(id)) {
        refuse(id, EINVAL);
        return;
    }
    memcpy(head, payload, sizeof head);
    if (head[1] < 1 || head[1] > MAX_STRINGS / 2 || head[2] > MAX_STRINGS / 2) {
        refuse(id, E2BIG);
        return;
    }
    /* Working directory, arguments, NULL, environment, NULL. */
    for (size_t want = 1 + head[1] + head[2]; want; want--) {
        char *nul = memchr(p, 0, end - p);

        if (!nul) {
            refuse(id, EINVAL);
            return;
        }
        if (count == 1 + head[1])
            strings[count++] = NULL;
        strings[count++] = p;
        p = nul + 1;
    }
    if (count == 1 + head[1])
        strings[count++] = NULL;
    strings[count] = NULL;
    argv = strings + 1;
    envp = strings + 2 + head[1];

    c = find(0);
    if (!c || pipe2(error, O_CLOEXEC)) {
        refuse(id, EAGAIN);
        return;
    }
    if (head[0] & RUN_TERMINAL) {
        int unlock = 0, number = 0;
        char name[32];

        terminal = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
        if (terminal >= 0 && !ioctl(terminal, TIOCSPTLCK, &unlock) && !ioctl(terminal, TIOCGPTN, &number)) {
            snprintf(name, sizeof name, "/dev/pts/%d", number);
            in[0] = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
            out[1] = err[1] = dup(in[0]);
            in[1] = fcntl(terminal, F_DUPFD_CLOEXEC, 0);
            out[0] = terminal;
        }
    } else {
        if (head[0] & RUN_STDIN) {
            if (pipe2(in, O_CLOEXEC))
                in[0] = in[1] = -1;
        } else {
            in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        }
        if (pipe2(out, O_CLOEXEC))
            out[0] = out[1] = -1;
        if (pipe2(err, O_CLOEXEC))
            err[0] = err[1] = -1;
    }
    if (in[0] < 0 || out[1] < 0 || err[1] < 0) {
        shut(&in[0]), shut(&in[1]), shut(&out[0]), shut(&out[1]), shut(&err[0]);
        shut(&error[0]), shut(&error[1]);
        refuse(id, EMFILE);
        return;
    }

    c->pid = fork();
    if (c->pid == 0) {
        sigset_t none;
        int saved;

        setsid();
        signal(SIGPIPE, SIG_DFL);
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        dup2(in[0], 0);
        dup2(out[1], 1);
        dup2(err[1], 2);
        if (terminal >= 0)
            ioctl(0, TIOCSCTTY, 0);
        environ = envp; /* execvp looks for the command by this PATH */
        if (!chdir(strings[0]))
            execvp(argv[0], argv);
        saved = errno;
        if (write(error[1], &saved, sizeof saved) < 0)
            _exit(126);
        _exit(127);
    }
    shut(&in[0]);
    shut(&out[1]);
    if (terminal < 0)
        shut(&err[1]);
    shut(&error[1]);
    if (c->pid > 0) {
        int saved;

        if (read(error[0], &saved, sizeof saved) == sizeof saved) {
            waitpid(c->pid, NULL, 0);
            c->pid = -1;
            errno = saved;
        }
    }
    shut(&error[0]);
    if (c->pid < 0) {
        shut(&in[1]), shut(&out[0]), shut(&err[0]);
        refuse(id, errno);
        return;
    }
    c->id = id;
    c->exited = 0;
    c->in = in[1];
    c->out = out[0];
    c->err = err[0];
    c->ends = 0;
    c->taken = c->filled = 0;
    if (c->in >= 0)
        fcntl(c->in, F_SETFL, O_NONBLOCK);
    fcntl(c->out, F_SETFL, O_NONBLOCK);
    if (c->err >= 0)
        fcntl(c->err, F_SETFL, O_NONBLOCK);
}

/* Gives the command what it will take of its standard input. */
static void feed(struct command *c)
{
    while (c->in >= 0 && c->taken < c->filled) {
        ssize_t n = write(c->in, c->pending + c->taken, c->filled - c->taken);

        if (n > 0)
            c->taken += n;
        else if (n < 0 && errno == EAGAIN)
            return;
        else if (n < 0 && errno != EINTR)
            shut(&c->in); /* it does not want more; nor is that our affair */
    }
    c->taken = c->filled = 0;
    if (c->ends) {
        shut(&c->in);
        free(c->pending);
        c->pending = NULL;
        c->size = 0;
    }
}

static char *room(struct command *c, size_t length)
{
    if (c->filled + length > c->size) {
        c->size = (c->filled + length) * 2;
        c->pending = grow(c->pending, c->size);
    }
    return c->pending + c->filled;
}

static void stdin_disk(struct command *c, const char *payload, uint32_t length)
{
    static int disk = -1;
    static char *block;
    uint64_t where[2];

    if (length != sizeof where)
        return;
    memcpy(where, payload, sizeof where);
    if (disk < 0) {
        /* O_DIRECT: the lab changes the drive behind the kernel's back, and the page cache would not know. */
        disk = open("/dev/sdb", O_RDONLY | O_DIRECT | O_CLOEXEC);
        if (disk < 0 || posix_memalign((void **)&block, 4096, 1 << 20))
            die("/dev/sdb, the inbox");
    }
    while (where[1]) {
        size_t part = where[1] < 1 << 20 ? where[1] : 1 << 20;
        ssize_t n = pread(disk, block, (part + 4095) & ~4095ul, where[0]);

        if (n <= 0)
            die("reading %zu bytes of the inbox at %llu", part, (unsigned long long)where[0]);
        if ((size_t)n > part)
            n = part;
        memcpy(room(c, n), block, n);
        c->filled += n;
        where[0] += n;
        where[1] -= n;
    }
}

/* Sends on what the command has written, `limit` bytes at most: other commands wait for their turn, and a process
 * that outlives its command must not hold up the end. */
static void forward(struct command *c, int *fd, uint8_t type, size_t limit)
{
    static char buffer[MAX_PAYLOAD];

    for (size_t sent = 0; *fd >= 0 && sent < limit;) {
        ssize_t n = read(*fd, buffer, sizeof buffer);

        if (n > 0) {
            send_frame(type, c->id, buffer, n);
            sent += n;
        } else if (n < 0 && errno == EAGAIN) {
            return;
        } else if (n == 0 || errno != EINTR) {
            shut(fd); /* end of file, or EIO: the terminal has no user any more */
        }
    }
}

static void reap(void)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (int i = 0; i < MAX_COMMANDS; i++) {
            if (commands[i].id && !commands[i].exited && commands[i].pid == pid) {
                commands[i].exited = 1;
                commands[i].status = status;
                /* What it left running goes with it. */
                kill(-pid, SIGKILL);
            }
        }
    }
}

static void finish(struct command *c)
{
    int32_t status = c->status;

    forward(c, &c->out, STDOUT, 1 << 22);
    forward(c, &c->err, STDERR, 1 << 22);
    shut(&c->in);
    shut(&c->out);
    shut(&c->err);
    free(c->pending);
    c->pending = NULL;
    c->size = 0;
    send_frame(EXIT, c->id, &status, sizeof status);
    c->id = 0;
}

/* ------------------------------------------------------------------------------------------- the host -- */

static void network(uint32_t address, const char *name)
{
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq r;
    struct sockaddr_in *in = (struct sockaddr_in *)&r.ifr_addr;

    memset(&r, 0, sizeof r);
    strcpy(r.ifr_name, "lo");
    ioctl(s, SIOCGIFFLAGS, &r);
    r.ifr_flags |= IFF_UP;
    ioctl(s, SIOCSIFFLAGS, &r);
    sethostname(name, strlen(name));
    if (address) {
        memset(&r, 0, sizeof r);
        strcpy(r.ifr_name, "eth0");
        /* A restored host has the hardware address of its snapshot, as all its brothers have. */
        r.ifr_hwaddr.sa_family = 1; /* ARPHRD_ETHER */
        memcpy(r.ifr_hwaddr.sa_data, "\x52\x54\x00\x00\x00", 5);
        r.ifr_hwaddr.sa_data[5] = address;
        if (ioctl(s, SIOCSIFHWADDR, &r))
            printf("lab agent: eth0's hardware address: %s\n", strerror(errno));
        r.ifr_mtu = 9000;
        if (ioctl(s, SIOCSIFMTU, &r))
            printf("lab agent: eth0's MTU: %s\n", strerror(errno));
        memset(&r.ifr_addr, 0, sizeof r.ifr_addr);
        in->sin_family = AF_INET;
        in->sin_addr.s_addr = htonl(0x0a4d0000 | address); /* 10.77.0.ADDRESS */
        if (ioctl(s, SIOCSIFADDR, &r))
            printf("lab agent: eth0's address: %s\n", strerror(errno));
        in->sin_addr.s_addr = htonl(0xffffff00);
        ioctl(s, SIOCSIFNETMASK, &r);
        ioctl(s, SIOCGIFFLAGS, &r);
        r.ifr_flags |= IFF_UP;
        ioctl(s, SIOCSIFFLAGS, &r);
    }
    close(s);
}

static void ready(void)
{
    struct utsname u;
    char text[512];

    uname(&u);
    snprintf(text, sizeof text, "%s %s kvm=%s", u.sysname, u.release, access("/dev/kvm", R_OK | W_OK) ? "no" : "yes");
    send_frame(READY, 0, text, strlen(text));
}

static void hello(char *payload, uint32_t length)
{
    struct {
        int entropy_count;
        int size;
        uint8_t seed[32];
    } pool = {.entropy_count = 256, .size = 32};
    struct timespec now;
    uint64_t time_ns;
    uint32_t address;
    int fd;

    if (length < 45 || payload[length - 1])
        return;
    memcpy(&time_ns, payload, 8);
    memcpy(pool.seed, payload + 8, 32);
    memcpy(&address, payload + 40, 4);
    now.tv_sec = time_ns / 1000000000;
    now.tv_nsec = time_ns % 1000000000;
    clock_settime(CLOCK_REALTIME, &now);
    fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (ioctl(fd, RNDADDENTROPY, &pool) || ioctl(fd, RNDRESEEDCRNG))
        printf("lab agent: the random number generator's seed: %s\n", strerror(errno));
    close(fd);
    network(address, payload + 44);
    ready();
}

static void handle(struct header *h, char *payload)
{
    struct command *c;
    uint32_t number;

    switch (h->type) {
    case HELLO:
        hello(payload, h->length);
        return;
    case RUN:
        run(h->id, payload, h->length);
        return;
    }
    c = h->id ? find(h->id) : NULL;
    if (!c)
        return; /* it has ended meanwhile */
    switch (h->type) {
    case STDIN:
        if (c->in < 0)
            return;
        if (h->length) {
            memcpy(room(c, h->length), payload, h->length);
            c->filled += h->length;
        } else {
            c->ends = 1;
        }
        feed(c);
        return;
    case STDIN_DISK:
        if (c->in < 0)
            return;
        stdin_disk(c, payload, h->length);
        feed(c);
        return;
    case KILL:
        if (h->length == sizeof number && !c->exited) {
            memcpy(&number, payload, sizeof number);
            kill(-c->pid, number);
        }
        return;
    }
}

/* Takes what has come from the lab, and what of it makes whole frames. */
static void receive(void)
{
    static char buffer[2 * (sizeof(struct header) + MAX_PAYLOAD)];
    static size_t filled;
    size_t start = 0;
    ssize_t n = read(channel_in, buffer + filled, sizeof buffer - filled);

    if (n <= 0) {
        poll(NULL, 0, 20); /* nobody there: between a snapshot and its restore */
        return;
    }
    filled += n;
    while (filled - start >= sizeof(struct header)) {
        struct header h;

        memcpy(&h, buffer + start, sizeof h);
        if (memcmp(h.magic, "PyLb", 4) || h.length > MAX_PAYLOAD) {
            start++;
            continue;
        }
        if (filled - start < sizeof h + h.length)
            break;
        if (h.crc != crc_add(crc_add(0, &h, offsetof(struct header, crc)), buffer + start + sizeof h, h.length)) {
            start++;
            continue;
        }
        handle(&h, buffer + start + sizeof h);
        start += sizeof h + h.length;
    }
    memmove(buffer, buffer + start, filled - start);
    filled -= start;
}

static void serve(void)
{
    struct pollfd fds[2 + 3 * MAX_COMMANDS];
    struct signalfd_siginfo siginfo;

    for (;;) {
        int n = 0;

        fds[n++] = (struct pollfd){.fd = channel_in, .events = POLLIN};
        fds[n++] = (struct pollfd){.fd = children, .events = POLLIN};
        for (int i = 0; i < MAX_COMMANDS; i++) {
            struct command *c = &commands[i];

            if (!c->id)
                continue;
            fds[n++] = (struct pollfd){.fd = c->out, .events = POLLIN};
            fds[n++] = (struct pollfd){.fd = c->err, .events = POLLIN};
            fds[n++] = (struct pollfd){.fd = c->filled ? c->in : -1, .events = POLLOUT};
        }
        if (poll(fds, n, -1) < 0)
            continue;
        if (fds[1].revents) {
            while (read(children, &siginfo, sizeof siginfo) > 0)
                ;
            reap();
        }
        for (int i = 0; i < MAX_COMMANDS; i++) {
            struct command *c = &commands[i];

            if (!c->id)
                continue;
            forward(c, &c->out, STDOUT, MAX_PAYLOAD);
            forward(c, &c->err, STDERR, MAX_PAYLOAD);
            if (c->filled)
                feed(c);
            if (c->exited)
                finish(c);
        }
        if (fds[0].revents)
            receive();
    }
}

/* ----------------------------------------------------------------------------------------------- start -- */

static void load(const char *name)
{
    char path[128];
    int fd;

    snprintf(path, sizeof path, "/modules/%s.ko", name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
        die("module %s", name);
    close(fd);
}

static void attach(const char *what, const char *where, const char *type, const char *options)
{
    if (mount(what, where, type, 0, options))
        die("mounting %s", where);
}

static int wait_for(const char *path, int flags)
{
    for (int i = 0; i < 3000; i++) {
        int fd = open(path, flags | O_CLOEXEC);

        if (fd >= 0)
            return fd;
        poll(NULL, 0, 5);
    }
    die("%s has not appeared", path);
    return -1;
}

static char *setting(const char *name)
{
    char *value = getenv(name);

    errno = EINVAL;
    if (!value)
        die("%s is not on the kernel's command line", name);
    return value;
}

/* The first virtio-serial port: /dev/vportNp1, N being the device's place among all virtio devices. */
static int port(void)
{
    char path[32];

    for (int i = 0; i < 3000; i++) {
        for (int n = 0; n < 8; n++) {
            int fd;

            snprintf(path, sizeof path, "/dev/vport%dp1", n);
            fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd >= 0)
                return fd;
        }
        poll(NULL, 0, 5);
    }
    die("/dev/vportNp1 has not appeared");
    return -1;
}

int main(void)
{
    char *channel, *root, *modules;
    struct rlimit files = {65536, 65536};
    struct termios raw;
    sigset_t set;
    char line[64];
    FILE *order;

    setvbuf(stdout, NULL, _IOLBF, 0);
    channel = setting("lab_channel");
    root = setting("lab_root");
    modules = setting("lab_modules");
    crc_prepare();
    umask(022);
    /* The kernel mounts no devtmpfs for an initramfs, and 0, 1, 2 are /dev/console of the archive. */
    attach("devtmpfs", "/dev", "devtmpfs", NULL);
    order = fopen("/modules/order", "re");
    if (!order)
        die("/modules/order");
    while (fgets(line, sizeof line, order)) {
        line[strcspn(line, "\n")] = 0;
        load(line);
    }
    fclose(order);
    close(wait_for(root, O_RDONLY));
    if (mount(root, "/root", "squashfs", MS_RDONLY, NULL))
        die("mounting %s", root);
    for (char *name = strtok(modules, ","); name; name = strtok(NULL, ","))
        load(name);
    if (mount("/dev", "/root/dev", NULL, MS_MOVE, NULL) || chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) ||
        chroot(".") || chdir("/"))
        die("changing to the root file system");
    attach("proc", "/proc", "proc", NULL);
    attach("sysfs", "/sys", "sysfs", NULL);
    attach("tracefs", "/sys/kernel/tracing", "tracefs", NULL);
    attach("tmpfs", "/tmp", "tmpfs", "mode=1777,size=75%");
    attach("tmpfs", "/run", "tmpfs", "mode=755");
    mkdir("/dev/pts", 0755);
    mkdir("/dev/shm", 01777);
    attach("devpts", "/dev/pts", "devpts", "mode=620,ptmxmode=666");
    attach("tmpfs", "/dev/shm", "tmpfs", "mode=1777");
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);

    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    children = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);

    if (!strcmp(channel, "virtio")) {
        channel_in = channel_out = port();
    } else {
        channel_in = wait_for("/dev/ttyS2", O_RDWR | O_NOCTTY);
        tcgetattr(channel_in, &raw);
        cfmakeraw(&raw);
        cfsetspeed(&raw, B115200);
        raw.c_cflag |= CLOCAL | CREAD;
        tcsetattr(channel_in, TCSANOW, &raw);
        if (ioperm(0xe9, 1, 1))
            die("port 0xe9");
    }
    network(0, "host");
    ready();
    serve();
}

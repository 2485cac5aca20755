/* SPDX-License-Identifier: MIT
 *
 * The bus and the devices, driven as guests drive them: sequences of port accesses with what each must read and where
 * the interrupt line must stand after it. No KVM.
 *
 * Nothing here asserts how long something takes; a test that hangs is ended by an alarm and named.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "cancel.h"
#include "check.h"
#include "devices/device.h"
#include "error.h"
#include "pyhv.h"
#include "random.h"

#define COM1 0x3f8

/* ------------------------------------------------------------------------------------------------ helpers -- */

static struct pyhv_error error;

/* What the interrupt line did: its level, and how often it rose. */
struct line {
    _Atomic int level, rises, falls;
    _Atomic int faults; /* calls that were no change; CHECK is not for other threads */
    _Atomic unsigned gsi;
    sem_t *on_rise;
};

static void line_raise(void *opaque, uint32_t gsi, int32_t level)
{
    struct line *line = opaque;
    if ((level != 0 && level != 1) || level == atomic_load(&line->level))
        atomic_fetch_add(&line->faults, 1);
    atomic_store(&line->level, level);
    atomic_store(&line->gsi, gsi);
    atomic_fetch_add(level ? &line->rises : &line->falls, 1);
    if (level && line->on_rise)
        sem_post(line->on_rise);
}

/* A bus with one device on it, its line observed. */
struct rig {
    struct pyhv_bus *bus;
    struct pyhv_device *device;
    struct line line;
};

static void rig_up(struct rig *rig, struct pyhv_device *device)
{
    memset(rig, 0, sizeof *rig);
    CHECK(device != NULL);
    rig->bus = pyhv_bus_create(&error);
    rig->device = device;
    pyhv_bus_set_irq_sink(rig->bus, (struct pyhv_irq_sink){.raise = line_raise, .opaque = &rig->line});
    CHECK_EQUAL(pyhv_bus_attach(rig->bus, device, &error), 0);
}

static void rig_down(struct rig *rig)
{
    CHECK_EQUAL(atomic_load(&rig->line.faults), 0);
    pyhv_bus_destroy(rig->bus);
}

static void uart_rig(struct rig *rig, int in_fd, int out_fd)
{
    rig_up(rig, pyhv_uart16550_create(COM1, 4, in_fd, out_fd, &error));
}

static uint8_t in(struct pyhv_bus *bus, uint16_t port)
{
    uint8_t value = 0x5a;
    CHECK_EQUAL(pyhv_bus_port_io(bus, port, 0, 1, 1, &value), PYHV_ACTION_NONE);
    return value;
}

static int out(struct pyhv_bus *bus, uint16_t port, uint8_t value)
{
    return pyhv_bus_port_io(bus, port, 1, 1, 1, &value);
}

/* One access of a sequence. `irq`: the line afterwards, -1 where it does not matter. */
struct step {
    char kind; /* 'r': read, must give value; 'w': write; '&': read, must have the bits of value in `mask` */
    uint16_t port;
    uint8_t value;
    int irq;
    int action;
    uint8_t mask;
};
#define R(port, value, irq)            \
    {                                  \
        'r', port, value, irq, 0, 0xff \
    }
#define RM(port, mask, value, irq)     \
    {                                  \
        'r', port, value, irq, 0, mask \
    }
#define W(port, value, irq)         \
    {                               \
        'w', port, value, irq, 0, 0 \
    }
#define WA(port, value, action)         \
    {                                   \
        'w', port, value, -1, action, 0 \
    }

static void play(const char *name, struct rig *rig, uint16_t base, const struct step *steps, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const struct step *step = &steps[i];
        unsigned before = check_failures;
        if (step->kind == 'r')
            CHECK_EQUAL(in(rig->bus, base + step->port) & step->mask, step->value);
        else
            CHECK_EQUAL(out(rig->bus, base + step->port, step->value), step->action);
        if (step->irq >= 0)
            CHECK_EQUAL(atomic_load(&rig->line.level), step->irq);
        if (check_failures != before)
            fprintf(stderr, "  in sequence \"%s\", step %zu: %c port %u value 0x%02x\n", name, i, step->kind,
                    step->port, step->value);
    }
}
#define PLAY(name, rig, base, steps) play(name, rig, base, steps, sizeof(steps) / sizeof(steps)[0])

/* Offsets of the UART's registers. */
enum { RBR = 0, THR = 0, DLL = 0, IER = 1, DLM = 1, IIR = 2, FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };

static void set_nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static void sleep_ms(long ms)
{
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

/* Reads what is there, up to `capacity`. */
static size_t drain(int fd, uint8_t *buffer, size_t capacity)
{
    size_t total = 0;
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    while (total < capacity && poll(&ready, 1, 0) > 0) {
        ssize_t count = read(fd, buffer + total, capacity - total);
        if (count <= 0)
            break;
        total += (size_t)count;
    }
    return total;
}

/* Reads exactly `count` bytes, waiting for them. */
static bool read_exactly(int fd, uint8_t *buffer, size_t count)
{
    while (count > 0) {
        ssize_t part = read(fd, buffer, count);
        if (part <= 0)
            return false;
        buffer += part;
        count -= (size_t)part;
    }
    return true;
}

/* ---------------------------------------------------------------------------------------------------- bus -- */

/* A device that takes up to `max_access` bytes at once and writes down what it is asked. */
struct recorder {
    struct pyhv_device device;
    char log[256];
    enum pyhv_action action;
};

static uint32_t recorder_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    struct recorder *recorder = (struct recorder *)device;
    size_t used = strlen(recorder->log);
    snprintf(recorder->log + used, sizeof recorder->log - used, "r%u@%u ", size, offset);
    return 0x44332211;
}

static enum pyhv_action recorder_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    struct recorder *recorder = (struct recorder *)device;
    size_t used = strlen(recorder->log);
    snprintf(recorder->log + used, sizeof recorder->log - used, "w%u@%u=%x ", size, offset, value);
    return recorder->action == PYHV_ACTION_NONE ? PYHV_ACTION_NONE : value & 3;
}

static void recorder_save(struct pyhv_device *device, struct pyhv_writer *to)
{
    (void)device;
    pyhv_put_int(to, 0x0807060504030201, 8);
    pyhv_put_bytes(to, "abc", 3);
}

static int recorder_load(struct pyhv_device *device, struct pyhv_reader *from, struct pyhv_error *problem)
{
    uint8_t text[3];
    CHECK_EQUAL(pyhv_get_int(from, 8), 0x0807060504030201);
    pyhv_get_bytes(from, text, 3);
    CHECK(memcmp(text, "abc", 3) == 0);
    CHECK(!from->truncated && from->left == 0);
    CHECK_EQUAL(pyhv_get_int(from, 1), 0);
    CHECK(from->truncated);
    return pyhv_device_refuse_state(device, problem, "never %s", "good");
}

static struct pyhv_device_ops recorder_ops(uint32_t max_access)
{
    return (struct pyhv_device_ops){.name = "recorder",
                                    .size = sizeof(struct recorder),
                                    .state_version = 7,
                                    .max_access = max_access,
                                    .read = recorder_read,
                                    .write = recorder_write,
                                    .save = recorder_save,
                                    .load = recorder_load};
}

static struct recorder *recorder_create(const struct pyhv_device_ops *ops, uint16_t first, uint32_t count)
{
    struct pyhv_device *device = pyhv_device_create(ops, first, count, &error);
    CHECK(device);
    return (struct recorder *)device;
}

static void test_bus_unclaimed(void)
{
    struct pyhv_bus *bus = pyhv_bus_create(&error);
    static const uint32_t sizes[] = {1, 2, 4};
    for (size_t s = 0; s < 3; s++) {
        for (uint32_t count = 1; count <= 3; count++) {
            uint8_t data[16], expected[16];
            memset(data, 0x11, sizeof data);
            memset(expected, 0x11, sizeof expected);
            CHECK_EQUAL(pyhv_bus_port_io(bus, 0x80, 1, sizes[s], count, data), PYHV_ACTION_NONE);
            CHECK(memcmp(data, expected, sizeof data) == 0); /* a write changes nothing */
            memset(expected, 0xff, sizes[s] * count);
            CHECK_EQUAL(pyhv_bus_port_io(bus, 0xffff, 0, sizes[s], count, data), PYHV_ACTION_NONE);
            CHECK(memcmp(data, expected, sizeof data) == 0); /* and a read no more than its bytes */
        }
    }
    CHECK_EQUAL(pyhv_bus_exit_status(bus), 0);
    pyhv_bus_flush(bus);
    pyhv_bus_destroy(bus);
    pyhv_bus_destroy(NULL);
    pyhv_device_destroy(NULL);
}

/* Which accesses a device with ports 0x10 to 0x17 sees. */
static void test_bus_splits(void)
{
    static const struct {
        uint32_t max_access, size;
        uint16_t port;
        const char *reads, *writes;
        uint8_t data[4];
    } cases[] = {{1, 1, 0x10, "r1@0 ", "w1@0=a1 ", {0x11}},
                 {1, 2, 0x10, "r1@0 r1@1 ", "w1@0=a1 w1@1=b2 ", {0x11, 0x11}},
                 {1, 4, 0x12, "r1@2 r1@3 r1@4 r1@5 ", "w1@2=a1 w1@3=b2 w1@4=c3 w1@5=d4 ", {0x11, 0x11, 0x11, 0x11}},
                 {1, 4, 0x16, "r1@6 r1@7 ", "w1@6=a1 w1@7=b2 ", {0x11, 0x11, 0xff, 0xff}},
                 {1, 4, 0x0e, "r1@0 r1@1 ", "w1@0=c3 w1@1=d4 ", {0xff, 0xff, 0x11, 0x11}},
                 {2, 2, 0x10, "r2@0 ", "w2@0=b2a1 ", {0x11, 0x22}},
                 {2, 2, 0x17, "r1@7 ", "w1@7=a1 ", {0x11, 0xff}},
                 {2, 4, 0x10, "r1@0 r1@1 r1@2 r1@3 ", "w1@0=a1 w1@1=b2 w1@2=c3 w1@3=d4 ", {0x11, 0x11, 0x11, 0x11}},
                 {4, 4, 0x14, "r4@4 ", "w4@4=d4c3b2a1 ", {0x11, 0x22, 0x33, 0x44}},
                 {4, 4, 0x15, "r1@5 r1@6 r1@7 ", "w1@5=a1 w1@6=b2 w1@7=c3 ", {0x11, 0x11, 0x11, 0xff}},
                 {4, 2, 0x15, "r2@5 ", "w2@5=b2a1 ", {0x11, 0x22}},
                 {4, 1, 0x15, "r1@5 ", "w1@5=a1 ", {0x11}},
                 {4, 4, 0x18, "", "", {0xff, 0xff, 0xff, 0xff}}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct pyhv_device_ops ops = recorder_ops(cases[i].max_access);
        struct recorder *recorder = recorder_create(&ops, 0x10, 8);
        struct rig rig;
        uint8_t data[4] = {0}, written[4] = {0xa1, 0xb2, 0xc3, 0xd4};
        unsigned before = check_failures;
        rig_up(&rig, &recorder->device);
        pyhv_bus_port_io(rig.bus, cases[i].port, 0, cases[i].size, 1, data);
        CHECK(memcmp(data, cases[i].data, 4) == 0);
        CHECK(strcmp(recorder->log, cases[i].reads) == 0);
        recorder->log[0] = '\0';
        pyhv_bus_port_io(rig.bus, cases[i].port, 1, cases[i].size, 1, written);
        CHECK(strcmp(recorder->log, cases[i].writes) == 0);
        if (check_failures != before)
            fprintf(stderr, "  case %zu: read %02x%02x%02x%02x, saw \"%s\"\n", i, data[0], data[1], data[2], data[3],
                    recorder->log);
        rig_down(&rig);
    }
}

static void test_bus_neighbours(void)
{
    struct rig rig;
    uint8_t four[4] = {0x2a, 0x07, 0, 0};

    /* Two devices next to each other: one wide access reaches both, and the first status counts. */
    rig_up(&rig, pyhv_debug_exit_create(0x101, &error));
    CHECK_EQUAL(pyhv_bus_attach(rig.bus, pyhv_debug_exit_create(0x100, &error), &error), 0);
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0x100, 1, 2, 1, four), PYHV_ACTION_GUEST_EXIT);
    CHECK_EQUAL(pyhv_bus_exit_status(rig.bus), 0x2a);
    rig_down(&rig);

    /* The port space does not wrap round. */
    rig_up(&rig, pyhv_debug_exit_create(0, &error));
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0xffff, 1, 4, 1, four), PYHV_ACTION_NONE);
    CHECK_EQUAL(pyhv_bus_attach(rig.bus, pyhv_debug_exit_create(0xffff, &error), &error), 0);
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0xffff, 1, 1, 1, four), PYHV_ACTION_GUEST_EXIT);
    rig_down(&rig);

    /* Disjoint ports: 0x60 and 0x64 of the keyboard controller, others between them. */
    rig_up(&rig, pyhv_i8042_create(&error));
    CHECK_EQUAL(pyhv_bus_attach(rig.bus, pyhv_debug_exit_create(0x61, &error), &error), 0);
    out(rig.bus, 0x64, 0xaa);
    memset(four, 0, 4);
    pyhv_bus_port_io(rig.bus, 0x61, 0, 4, 1, four); /* 0x61 to 0x64 */
    CHECK(memcmp(four, (uint8_t[]){0xff, 0xff, 0xff, 0x1d}, 4) == 0);
    pyhv_bus_port_io(rig.bus, 0x5f, 0, 4, 1, four); /* 0x5f to 0x62 */
    CHECK(memcmp(four, (uint8_t[]){0xff, 0x55, 0xff, 0xff}, 4) == 0);
    rig_down(&rig);
}

static void test_bus_attach(void)
{
    struct pyhv_bus *bus = pyhv_bus_create(&error);
    struct pyhv_device *uart = pyhv_uart16550_create(COM1, 4, -1, -1, &error);
    CHECK_EQUAL(pyhv_bus_attach(bus, uart, &error), 0);
    static const uint16_t taken[] = {COM1 - 7, COM1, COM1 + 7};
    for (size_t i = 0; i < 3; i++) {
        struct pyhv_device *other = pyhv_uart16550_create(taken[i], 3, -1, -1, &error);
        memset(&error, 0, sizeof error);
        CHECK_EQUAL(pyhv_bus_attach(bus, other, &error), -1);
        CHECK_EQUAL(error.errnum, EBUSY);
        CHECK(strstr(error.detail, "uart16550") != NULL);
        pyhv_device_destroy(other); /* still the caller's */
    }
    CHECK_EQUAL(pyhv_bus_attach(bus, uart, &error), -1); /* the same one again */
    CHECK_EQUAL(pyhv_bus_attach(bus, uart, NULL), -1);   /* nobody wants to know why */
    for (uint16_t i = 1; i < PYHV_BUS_MAX_DEVICES; i++)
        CHECK_EQUAL(pyhv_bus_attach(bus, pyhv_debug_exit_create((uint16_t)(0x1000 - i), &error), &error), 0);
    struct pyhv_device *one_too_many = pyhv_debug_exit_create(0x2000, &error);
    CHECK_EQUAL(pyhv_bus_attach(bus, one_too_many, &error), -1);
    CHECK_EQUAL(error.errnum, ENOSPC);
    pyhv_device_destroy(one_too_many);
    for (uint16_t i = 1; i < PYHV_BUS_MAX_DEVICES; i++) /* all of them are found, whatever the order */
        CHECK_EQUAL(out(bus, (uint16_t)(0x1000 - i), 9), PYHV_ACTION_GUEST_EXIT);
    CHECK_EQUAL(in(bus, COM1 + LSR), 0x60);
    pyhv_bus_destroy(bus);

    struct pyhv_device *last = pyhv_uart16550_create(0xfff8, 4, -1, -1, &error);
    CHECK(last != NULL);
    pyhv_device_destroy(last);
    CHECK(pyhv_uart16550_create(0xfff9, 4, -1, -1, &error) == NULL);
    CHECK(strstr(error.detail, "0xffff") != NULL);
    CHECK(strcmp(error.what, "uart16550") == 0);
}

static void test_bus_names(void)
{
    struct {
        const char *name;
        struct pyhv_device *device;
    } devices[] = {{"uart16550", pyhv_uart16550_create(COM1, 4, -1, -1, &error)},
                   {"debug_exit", pyhv_debug_exit_create(0xf4, &error)},
                   {"i8042", pyhv_i8042_create(&error)},
                   {"cmos", pyhv_cmos_create(1 << 20, 0, &error)},
                   {"acpi_pm", pyhv_acpi_pm_create(0x600, 9, &error)},
                   {"chipset", pyhv_chipset_create(&error)},
                   {"pvpanic", pyhv_pvpanic_create(0x505, &error)},
                   {"vmgenid", pyhv_vmgenid_create(0, &error)},
                   {"fw_cfg", pyhv_fw_cfg_create(&error)}};
    for (size_t i = 0; i < sizeof devices / sizeof devices[0]; i++) {
        CHECK(strcmp(pyhv_device_name(devices[i].device), devices[i].name) == 0);
        pyhv_device_destroy(devices[i].device);
    }
}

static void test_bus_repeat(void)
{
    struct rig rig;
    struct pyhv_device_ops ops = recorder_ops(2);
    struct recorder *recorder = recorder_create(&ops, 0x10, 4);
    uint8_t data[8] = {1, 2, 3, 4, 5, 6, 7, 8};

    rig_up(&rig, &recorder->device);
    pyhv_bus_port_io(rig.bus, 0x11, 1, 2, 3, data);
    CHECK(strcmp(recorder->log, "w2@1=201 w2@1=403 w2@1=605 ") == 0);
    recorder->log[0] = '\0';
    pyhv_bus_port_io(rig.bus, 0x11, 1, 1, 3, data);
    CHECK(strcmp(recorder->log, "w1@1=1 w1@1=2 w1@1=3 ") == 0);
    recorder->log[0] = '\0';
    pyhv_bus_port_io(rig.bus, 0x12, 0, 2, 2, data);
    CHECK(strcmp(recorder->log, "r2@2 r2@2 ") == 0);
    CHECK(memcmp(data, (uint8_t[]){0x11, 0x22, 0x11, 0x22, 5, 6, 7, 8}, 8) == 0);

    /* The strongest action of all the pieces and repetitions. */
    recorder->action = PYHV_ACTION_RESET;
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0x10, 1, 1, 3, (uint8_t[]){1, 3, 2}), PYHV_ACTION_POWER_OFF);
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0x10, 1, 4, 1, (uint8_t[]){0, 2, 1, 0}), PYHV_ACTION_RESET);
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0x13, 1, 2, 2, (uint8_t[]){0, 3, 0, 3}), PYHV_ACTION_NONE);
    rig_down(&rig);

    rig_up(&rig, pyhv_debug_exit_create(0xf4, &error));
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0xf4, 1, 1, 3, (uint8_t[]){7, 8, 9}), PYHV_ACTION_GUEST_EXIT);
    CHECK_EQUAL(pyhv_bus_exit_status(rig.bus), 7);
    rig_down(&rig);
    rig_up(&rig, pyhv_i8042_create(&error));
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0x64, 1, 1, 3, (uint8_t[]){0xad, 0xfe, 0xae}), PYHV_ACTION_RESET);
    rig_down(&rig);
}

static void test_bus_state_codec(void)
{
    struct pyhv_device_ops ops = recorder_ops(1);
    struct recorder *recorder = recorder_create(&ops, 0, 1);
    static const uint8_t expected[] = {7, 1, 2, 3, 4, 5, 6, 7, 8, 'a', 'b', 'c'};
    uint8_t state[sizeof expected + 1];

    memset(state, 0xee, sizeof state);
    CHECK_EQUAL(pyhv_device_save(&recorder->device, state, sizeof expected, &error), sizeof expected);
    CHECK(memcmp(state, expected, sizeof expected) == 0);
    CHECK_EQUAL(state[sizeof expected], 0xee);
    CHECK_EQUAL(pyhv_device_load(&recorder->device, expected, sizeof expected, &error), -1);
    CHECK(strcmp(error.what, "recorder: load") == 0 && strcmp(error.detail, "never good") == 0);
    for (size_t room = 0; room < sizeof expected; room++) {
        memset(state, 0xee, sizeof state);
        CHECK_EQUAL(pyhv_device_save(&recorder->device, state, room, &error), -1);
        CHECK(strcmp(error.what, "recorder: save") == 0);
        for (size_t i = room; i < sizeof state; i++)
            CHECK_EQUAL(state[i], 0xee); /* nothing beyond what was given */
    }
    CHECK_EQUAL(pyhv_device_load(&recorder->device, NULL, 0, &error), -1);
    CHECK_EQUAL(pyhv_device_load(&recorder->device, (uint8_t[]){8}, 1, &error), -1);
    CHECK(strstr(error.detail, "version 8") != NULL);
    pyhv_device_destroy(&recorder->device);
}

static void test_bus_sink(void)
{
    /* Attached after the sink was set: rig_up. Here before. And a line that is high already is announced. */
    struct pyhv_bus *bus = pyhv_bus_create(&error);
    struct pyhv_device *uart = pyhv_uart16550_create(COM1, 4, -1, -1, &error);
    struct line line = {0};
    CHECK_EQUAL(pyhv_bus_attach(bus, uart, &error), 0);
    out(bus, COM1 + MCR, 0x08);
    out(bus, COM1 + IER, 0x02);
    pyhv_bus_set_irq_sink(bus, (struct pyhv_irq_sink){.raise = line_raise, .opaque = &line});
    CHECK_EQUAL(line.level, 1);
    CHECK_EQUAL(line.gsi, 4);
    out(bus, COM1 + IER, 0x00);
    CHECK_EQUAL(line.level, 0);
    pyhv_bus_set_irq_sink(bus, (struct pyhv_irq_sink){0});
    out(bus, COM1 + IER, 0x02);
    CHECK_EQUAL(line.level, 0); /* nobody is told */
    pyhv_bus_destroy(bus);
}

static void *write_statuses(void *opaque)
{
    for (int i = 0; i < 1000; i++)
        out(opaque, 0xf4, 1);
    return NULL;
}

static void test_debug_exit(void)
{
    struct rig rig;
    rig_up(&rig, pyhv_debug_exit_create(0xf4, &error));
    CHECK_EQUAL(in(rig.bus, 0xf4), 0xff);
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0xf3, 1, 2, 1, (uint8_t[]){1, 0x80}), PYHV_ACTION_GUEST_EXIT);
    CHECK_EQUAL(pyhv_bus_exit_status(rig.bus), 0x80); /* the byte that fell on the port */
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, 0xf4, 1, 4, 1, (uint8_t[]){5, 6, 7, 8}), PYHV_ACTION_GUEST_EXIT);
    CHECK_EQUAL(pyhv_bus_exit_status(rig.bus), 0x80); /* the first one stays */
    rig_down(&rig);

    rig_up(&rig, pyhv_debug_exit_create(0xf4, &error));
    pthread_t other;
    CHECK_EQUAL(out(rig.bus, 0xf4, 0), PYHV_ACTION_GUEST_EXIT); /* 0 is a status, and the first here */
    pthread_create(&other, NULL, write_statuses, rig.bus);
    write_statuses(rig.bus);
    pthread_join(other, NULL);
    CHECK_EQUAL(pyhv_bus_exit_status(rig.bus), 0);
    rig_down(&rig);
}

/* ------------------------------------------------------------------------------------ UART: the registers -- */

static void test_uart_registers(void)
{
    static const struct step steps[] = {
        /* as it comes up */
        R(RBR, 0x00, 0), R(IER, 0x00, 0), R(IIR, 0x01, 0), R(LCR, 0x00, 0), R(MCR, 0x00, 0), R(LSR, 0x60, 0),
        R(MSR, 0xb0, 0), R(SCR, 0x00, 0),
        /* which bits stay */
        W(SCR, 0xa5, 0), R(SCR, 0xa5, 0), W(LCR, 0x7f, 0), R(LCR, 0x7f, 0), W(LCR, 0x03, 0), W(MCR, 0xff, 0),
        R(MCR, 0x1f, 0), W(MCR, 0x03, 0), R(MCR, 0x03, 0), W(IER, 0xfd, 0), R(IER, 0x0d, -1), W(IER, 0x00, 0),
        /* LSR and MSR cannot be written; leaving loopback left its mark in MSR: RI went off */
        W(LSR, 0xff, 0), R(LSR, 0x60, 0), W(MSR, 0xff, 0), R(MSR, 0xb4, 0), R(MSR, 0xb0, 0),
        /* DLAB: the divisor instead of RBR, THR and IER, and nothing else */
        W(IER, 0x05, 0), W(LCR, 0x83, 0), W(DLL, 0x34, 0), W(DLM, 0x12, 0), R(DLL, 0x34, 0), R(DLM, 0x12, 0),
        R(LSR, 0x60, 0), R(IIR, 0x01, 0), R(SCR, 0xa5, 0), W(LCR, 0x03, 0), R(RBR, 0x00, 0), R(IER, 0x05, 0),
        W(IER, 0x00, 0), W(LCR, 0x80, 0), R(DLL, 0x34, 0), R(DLM, 0x12, 0), W(LCR, 0x03, 0),
        /* FCR: only with bit 0 do IIR's two top bits show FIFOs */
        W(FCR, 0xc6, 0), R(IIR, 0x01, 0), W(FCR, 0x01, 0), R(IIR, 0xc1, 0), W(FCR, 0xcf, 0), R(IIR, 0xc1, 0),
        W(FCR, 0x00, 0), R(IIR, 0x01, 0)};
    struct rig rig;
    uart_rig(&rig, -1, -1);
    PLAY("registers", &rig, COM1, steps);
    rig_down(&rig);

    uart_rig(&rig, -1, -1); /* 9600 baud at first */
    static const struct step divisor[] = {W(LCR, 0x80, 0), R(DLL, 12, 0), R(DLM, 0, 0)};
    PLAY("divisor", &rig, COM1, divisor);
    rig_down(&rig);
}

/* What Linux does to find out which chip it has (drivers/tty/serial/8250/8250_port.c), in its order. */
static void test_uart_linux_autoconfig(void)
{
    static const struct step steps[] = {
        /* autoconfig: is there one? IER bits 3:0 and only these */
        R(IER, 0x00, 0), W(IER, 0x00, 0), R(IER, 0x00, 0), W(IER, 0x0f, 0), R(IER, 0x0f, 0), W(IER, 0x00, 0),
        /* loopback test: RTS and OUT2 show as CTS and DCD */
        W(MCR, 0x1a, 0), RM(MSR, 0xf0, 0x90, 0), W(MCR, 0x00, 0),
        /* EFR of other chips: with LCR 0xbf must not read 0; FIFO enable shows 16550A */
        W(LCR, 0xbf, 0), W(FCR, 0x00, 0), W(LCR, 0x00, 0), W(FCR, 0x01, 0), RM(IIR, 0xc0, 0xc0, 0), W(LCR, 0x80, 0),
        RM(IIR, 0xff, 0xc1, 0), W(LCR, 0xbf, 0), R(IIR, 0xc1, 0),
        /* National's SuperIO: bit 4 of register 2 must not follow MCR's */
        W(LCR, 0x00, 0), R(MCR, 0x00, 0), W(LCR, 0xe0, 0), RM(IIR, 0x10, 0x00, 0), W(LCR, 0x00, 0), W(MCR, 0x10, 0),
        W(LCR, 0xe0, 0), RM(IIR, 0x10, 0x00, 0), W(LCR, 0x00, 0), W(MCR, 0x00, 0),
        /* TI16750: bit 5 of IIR must stay 0 with and without DLAB */
        W(LCR, 0x00, 0), W(FCR, 0x21, 0), RM(IIR, 0xe0, 0xc0, 0), W(LCR, 0x80, 0), W(FCR, 0x21, 0),
        RM(IIR, 0xe0, 0xc0, 0), W(LCR, 0x00, 0), W(FCR, 0x01, 0),
        /* XScale: IER bit 6 must not stay */
        R(IER, 0x00, 0), W(IER, 0x40, 0), R(IER, 0x00, 0), W(IER, 0x00, 0),
        /* serial8250_clear_fifos, then the interrupt and status registers */
        W(FCR, 0x01, 0), W(FCR, 0x07, 0), W(FCR, 0x00, 0), R(LSR, 0x60, 0), R(RBR, 0x00, 0), R(IIR, 0x01, 0),
        RM(MSR, 0xf0, 0xb0, 0), R(MSR, 0xb0, 0)};
    struct rig rig;
    uart_rig(&rig, -1, -1);
    PLAY("Linux autoconfig", &rig, COM1, steps);

    /* size_fifo: in loopback, how many of 256 bytes come back? 16, the first ones. */
    out(rig.bus, COM1 + FCR, 0x07);
    out(rig.bus, COM1 + MCR, 0x10);
    for (int i = 0; i < 256; i++)
        out(rig.bus, COM1 + THR, (uint8_t)i);
    int count = 0;
    for (; in(rig.bus, COM1 + LSR) & 1 && count < 256; count++)
        CHECK_EQUAL(in(rig.bus, COM1 + RBR), count);
    CHECK_EQUAL(count, 16);
    rig_down(&rig);
}

/* serial8250_do_startup, and how Linux sends and stops sending. */
static void test_uart_linux_transmit(void)
{
    static const struct step steps[] = {
        W(LCR, 0x03, 0), W(MCR, 0x08, 0),
        /* THRE test: enabling THRI with an empty transmitter interrupts, each time */
        R(LSR, 0x60, 0), W(IER, 0x02, 1), R(IIR, 0x02, 0), W(IER, 0x00, 0), W(IER, 0x02, 1), R(IIR, 0x02, 0),
        W(IER, 0x00, 0), R(IIR, 0x01, 0),
        /* TXEN test */
        W(IER, 0x02, 1), R(LSR, 0x60, 1), R(IIR, 0x02, 0), W(IER, 0x00, 0),
        /* start_tx: THRI on; the handler reads IIR, LSR, writes; each write makes the transmitter empty anew */
        W(IER, 0x07, 1), R(IIR, 0x02, 0), R(LSR, 0x60, 0), W(THR, 'a', 1), W(THR, 'b', 1), R(IIR, 0x02, 0),
        R(IIR, 0x01, 0), R(LSR, 0x60, 0),
        /* setting THRI again while it is set is no event */
        W(IER, 0x07, 0), R(IIR, 0x01, 0),
        /* stop_tx; what is not enabled does not show */
        W(THR, 'c', 1), W(IER, 0x05, 0), R(IIR, 0x01, 0), W(IER, 0x07, 1), R(IIR, 0x02, 0),
        /* console write: interrupts off, poll LSR, write, interrupts back */
        R(IER, 0x07, 0), W(IER, 0x00, 0), R(LSR, 0x60, 0), W(THR, 'd', 0), RM(LSR, 0x60, 0x60, 0), R(IIR, 0x01, 0),
        W(IER, 0x07, 1), R(IIR, 0x02, 0),
        /* OUT2 off: the line is cut, the source stays */
        W(IER, 0x00, 0), W(IER, 0x02, 1), W(MCR, 0x00, 0), W(MCR, 0x08, 1), W(MCR, 0x03, 0), R(IIR, 0x02, 0),
        W(MCR, 0x08, 0)};
    int fds[2];
    uint8_t got[8] = {0};
    CHECK_EQUAL(pipe(fds), 0);
    struct rig rig;
    uart_rig(&rig, -1, fds[1]);
    PLAY("Linux transmit", &rig, COM1, steps);
    CHECK_EQUAL(rig.line.gsi, 4);
    CHECK_EQUAL(drain(fds[0], got, sizeof got), 4);
    CHECK(memcmp(got, "abcd", 4) == 0);

    /* A handler that writes one byte an interrupt and never reads IIR needs an edge for each. */
    out(rig.bus, COM1 + IER, 0x02);
    int rises = rig.line.rises;
    for (int i = 0; i < 5; i++)
        out(rig.bus, COM1 + THR, 'x');
    CHECK_EQUAL(rig.line.rises - rises, 5);
    rig_down(&rig);

    uart_rig(&rig, -1, -1); /* the same without an output */
    PLAY("Linux transmit, no output", &rig, COM1, steps);
    rig_down(&rig);
    close(fds[0]);
    close(fds[1]);
}

static void test_uart_modem(void)
{
    static const struct step steps[] = {
        W(MCR, 0x08, 0), W(IER, 0x08, 0), R(MSR, 0xb0, 0),
        /* into loopback: CTS, DSR go, DCD stays for OUT2 is on; the line is cut in loopback */
        W(MCR, 0x18, 0), R(IIR, 0x00, 0), W(MCR, 0x18, 0), R(MSR, 0x83, 0), R(IIR, 0x01, 0),
        /* each output shows as its input; RI tells only when it goes off */
        W(MCR, 0x11, 0), R(MSR, 0x2a, 0), W(MCR, 0x12, 0), R(MSR, 0x13, 0), W(MCR, 0x14, 0), R(MSR, 0x41, 0),
        W(MCR, 0x10, 0), R(MSR, 0x04, 0), W(MCR, 0x1f, 0), R(MSR, 0xfb, 0),
        /* out of loopback: RI goes off, and the line shows the interrupt */
        W(MCR, 0x08, 1), R(IIR, 0x00, 1), R(MSR, 0xb4, 0), R(MSR, 0xb0, 0), R(IIR, 0x01, 0)};
    struct rig rig;
    uart_rig(&rig, -1, -1);
    PLAY("modem status", &rig, COM1, steps);
    rig_down(&rig);
}

static void test_uart_loopback(void)
{
    static const struct step steps[] = {
        /* without FIFO: one byte; a second one takes its place and tells of it, once */
        W(MCR, 0x18, 0), W(IER, 0x07, 0), R(IIR, 0x02, 0), W(THR, 0x11, 0), R(IIR, 0x04, 0), R(LSR, 0x61, 0),
        W(THR, 0x22, 0), R(IIR, 0x06, 0), R(LSR, 0x63, 0), R(LSR, 0x61, 0), R(IIR, 0x04, 0), R(RBR, 0x22, 0),
        R(LSR, 0x60, 0), R(IIR, 0x02, 0), R(IIR, 0x01, 0), R(RBR, 0x00, 0),
        /* all at once, in the order of priority: line, receive, transmit, modem */
        W(IER, 0x0f, 0), R(MSR, 0x83, 0), W(MCR, 0x1a, 0), W(THR, 0x33, 0), W(THR, 0x44, 0), R(IIR, 0x06, 0),
        R(LSR, 0x63, 0), R(IIR, 0x04, 0), R(RBR, 0x44, 0), R(IIR, 0x02, 0), R(IIR, 0x00, 0), R(MSR, 0x91, 0),
        R(IIR, 0x01, 0),
        /* bytes written in loopback stay in the FIFO when it ends */
        W(THR, 0x55, 0), W(MCR, 0x08, 1), R(RBR, 0x55, 1)};
    int fds[2];
    uint8_t got[4];
    CHECK_EQUAL(pipe(fds), 0);
    struct rig rig;
    uart_rig(&rig, -1, fds[1]);
    PLAY("loopback", &rig, COM1, steps);
    out(rig.bus, COM1 + MCR, 0x10);
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, COM1 + FCR, 1, 1, 1, (uint8_t[]){1}), 0);
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, COM1 + THR, 1, 1, 3, (uint8_t[]){7, 8, 9}), 0); /* REP OUTS too */
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, COM1 + RBR, 0, 1, 4, got), 0);
    CHECK(memcmp(got, (uint8_t[]){7, 8, 9, 0}, 4) == 0);
    CHECK_EQUAL(drain(fds[0], got, sizeof got), 0); /* nothing left the UART */
    rig_down(&rig);
    close(fds[0]);
    close(fds[1]);
}

/* FIFO trigger levels, in loopback, where the test decides what arrives. */
static void test_uart_fifo(void)
{
    static const struct {
        uint8_t fcr, level;
    } triggers[] = {{0x01, 1}, {0x41, 4}, {0x81, 8}, {0xc1, 14}};
    for (size_t t = 0; t < 4; t++) {
        struct rig rig;
        uart_rig(&rig, -1, -1);
        out(rig.bus, COM1 + FCR, triggers[t].fcr);
        out(rig.bus, COM1 + IER, 0x01);
        out(rig.bus, COM1 + MCR, 0x18);
        for (uint8_t n = 1; n <= 16; n++) {
            out(rig.bus, COM1 + THR, (uint8_t)(0x30 + n));
            CHECK_EQUAL(in(rig.bus, COM1 + IIR), n >= triggers[t].level ? 0xc4 : 0xcc);
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x61);
        }
        out(rig.bus, COM1 + THR, 0x99); /* the 17th is lost, the FIFO keeps its own */
        CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x63);
        CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x61);
        for (uint8_t n = 16; n >= 1; n--) {
            CHECK_EQUAL(in(rig.bus, COM1 + IIR), n >= triggers[t].level ? 0xc4 : 0xcc);
            CHECK_EQUAL(in(rig.bus, COM1 + RBR), 0x30 + 17 - n);
        }
        CHECK_EQUAL(in(rig.bus, COM1 + IIR), 0xc1);
        CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
        rig_down(&rig);
    }

    static const struct step clearing[] = {
        W(MCR, 0x10, 0), W(FCR, 0x01, 0), W(THR, 1, 0),    W(THR, 2, 0),    W(FCR, 0x05, 0),
        R(LSR, 0x61, 0), W(FCR, 0x03, 0), R(LSR, 0x60, 0), R(IIR, 0xc1, 0), /* cleared; FIFOs still on */
        W(THR, 3, 0),    W(FCR, 0x01, 0), R(RBR, 3, 0),                     /* bit 1 does not stay */
        W(THR, 4, 0),    W(FCR, 0x00, 0), R(LSR, 0x60, 0),                  /* turned off: cleared */
        W(THR, 5, 0),    W(FCR, 0x01, 0), R(LSR, 0x60, 0), R(RBR, 0, 0)     /* turned on: cleared */
    };
    struct rig rig;
    uart_rig(&rig, -1, -1);
    PLAY("FIFO clearing", &rig, COM1, clearing);
    rig_down(&rig);
}

/* ---------------------------------------------------------------------------------------- UART: the output -- */

/* One write a byte, and one for a REP OUTS: a packet socket keeps them apart. */
static void test_uart_output_writes(void)
{
    int fds[2];
    uint8_t text[300], got[300];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)i;
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds), 0);
    struct rig rig;
    uart_rig(&rig, -1, fds[1]);
    out(rig.bus, COM1, 'a');
    out(rig.bus, COM1, '\n');
    pyhv_bus_port_io(rig.bus, COM1, 1, 1, sizeof text, text);
    pyhv_bus_port_io(rig.bus, COM1, 1, 2, 2, (uint8_t[]){'w', 0x00, 'x', 0x02}); /* words: THR and IER */
    set_nonblocking(fds[0]);
    CHECK_EQUAL(read(fds[0], got, sizeof got), 1);
    CHECK_EQUAL(got[0], 'a');
    CHECK_EQUAL(read(fds[0], got, sizeof got), 1);
    CHECK_EQUAL(read(fds[0], got, sizeof got), sizeof text);
    CHECK(memcmp(got, text, sizeof text) == 0);
    CHECK_EQUAL(read(fds[0], got, sizeof got), 1);
    CHECK_EQUAL(got[0], 'w');
    CHECK_EQUAL(read(fds[0], got, sizeof got), 1);
    CHECK_EQUAL(got[0], 'x');
    CHECK_EQUAL(read(fds[0], got, sizeof got), -1);
    CHECK_EQUAL(in(rig.bus, COM1 + IER), 0x02);
    /* Elsewhere than THR a REP OUTS writes the register so many times. */
    pyhv_bus_port_io(rig.bus, COM1 + SCR, 1, 1, 3, (uint8_t[]){1, 2, 3});
    CHECK_EQUAL(in(rig.bus, COM1 + SCR), 3);
    out(rig.bus, COM1 + LCR, 0x80);
    pyhv_bus_port_io(rig.bus, COM1 + DLL, 1, 1, 3, (uint8_t[]){4, 5, 6});
    CHECK_EQUAL(in(rig.bus, COM1 + DLL), 6);
    CHECK_EQUAL(read(fds[0], got, sizeof got), -1);
    rig_down(&rig);
    close(fds[0]);
    close(fds[1]);
}

/* The kinds of descriptor that console output goes to, each with its own way to be full. */
enum sink_kind { SINK_PIPE, SINK_PIPE_NONBLOCKING, SINK_SOCKET, SINK_TERMINAL, SINK_KINDS };
static const char *const sink_names[] = {"pipe", "non-blocking pipe", "socket", "terminal"};

struct sink {
    int guest_end, reader;
};

static struct sink sink_open(enum sink_kind kind)
{
    int fds[2] = {-1, -1};
    if (kind == SINK_TERMINAL) {
        struct termios raw;
        fds[0] = posix_openpt(O_RDWR | O_NOCTTY);
        CHECK(fds[0] >= 0 && grantpt(fds[0]) == 0 && unlockpt(fds[0]) == 0);
        fds[1] = open(ptsname(fds[0]), O_RDWR | O_NOCTTY);
        CHECK(fds[1] >= 0);
        tcgetattr(fds[1], &raw);
        cfmakeraw(&raw);
        tcsetattr(fds[1], TCSANOW, &raw);
    } else if (kind == SINK_SOCKET) {
        CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    } else {
        CHECK_EQUAL(pipe(fds), 0);
    }
    if (kind == SINK_PIPE_NONBLOCKING)
        set_nonblocking(fds[1]);
    return (struct sink){.guest_end = fds[1], .reader = fds[0]};
}

static void sink_close(struct sink sink)
{
    close(sink.guest_end);
    close(sink.reader);
}

/* Writes into the sink until it takes no more; returns how many bytes that were. */
static size_t sink_fill(struct sink sink)
{
    int flags = fcntl(sink.guest_end, F_GETFL);
    size_t total = 0;
    uint8_t filler[256];
    memset(filler, '.', sizeof filler);
    fcntl(sink.guest_end, F_SETFL, flags | O_NONBLOCK);
    for (int idle = 0; idle < 5; idle++) { /* a terminal moves its bytes on a little later, and has room again */
        for (size_t part = sizeof filler; part > 0;) {
            ssize_t count = write(sink.guest_end, filler, part);
            if (count > 0) {
                total += (size_t)count;
                idle = 0;
            } else {
                part /= 2;
            }
        }
        sleep_ms(2);
    }
    fcntl(sink.guest_end, F_SETFL, flags);
    return total;
}

static void sink_skip(struct sink sink, size_t count)
{
    uint8_t buffer[4096];
    while (count > 0) {
        size_t part = count < sizeof buffer ? count : sizeof buffer;
        if (!read_exactly(sink.reader, buffer, part)) {
            CHECK(!"the filler came back");
            return;
        }
        count -= part;
    }
}

/* A vCPU's thread that makes one REP OUTS and says what it saw. */
struct writer {
    struct pyhv_bus *bus;
    const uint8_t *bytes;
    uint32_t count;
    _Atomic int stop; /* what pyhv_cancel looks at */
    _Atomic int started, finished;
    pthread_t thread;
};

static void *writer_run(void *opaque)
{
    struct writer *writer = opaque;
    pyhv_cancel = &writer->stop;
    atomic_store(&writer->started, 1);
    pyhv_bus_port_io(writer->bus, COM1 + THR, 1, 1, writer->count, (void *)writer->bytes);
    atomic_store(&writer->finished, 1);
    pyhv_cancel = NULL;
    return NULL;
}

static void writer_start(struct writer *writer, struct pyhv_bus *bus, const uint8_t *bytes, uint32_t count)
{
    memset(writer, 0, sizeof *writer);
    writer->bus = bus;
    writer->bytes = bytes;
    writer->count = count;
    pthread_create(&writer->thread, NULL, writer_run, writer);
    while (!atomic_load(&writer->started))
        sleep_ms(1);
    sleep_ms(20); /* time to block */
}

static void writer_kick(struct writer *writer, bool with_signal)
{
    atomic_store(&writer->stop, 1);
    if (with_signal)
        pthread_kill(writer->thread, SIGUSR1);
}

static void nothing(int signal)
{
    (void)signal;
}

static void test_uart_blocked_output(void)
{
    uint8_t text[4096], got[8192];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)(i * 7 + i / 256);

    for (enum sink_kind kind = 0; kind < SINK_KINDS; kind++) {
        for (int with_signal = 0; with_signal < 2; with_signal++) {
            unsigned before = check_failures;
            struct sink sink = sink_open(kind);
            struct rig rig;
            uart_rig(&rig, -1, sink.guest_end);
            struct writer writer;
            uint8_t state[PYHV_DEVICE_STATE_MAX];
            size_t filler = sink_fill(sink);

            out(rig.bus, COM1 + MCR, 0x08);
            out(rig.bus, COM1 + IER, 0x02);
            in(rig.bus, COM1 + IIR);
            writer_start(&writer, rig.bus, text, 1000);
            CHECK(!atomic_load(&writer.finished));

            /* Any other signal does not disturb it. */
            pthread_kill(writer.thread, SIGUSR1);
            sleep_ms(10);
            CHECK(!atomic_load(&writer.finished));

            /* Meanwhile other threads are not held up: another vCPU, and who saves. */
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x00);
            CHECK_EQUAL(in(rig.bus, COM1 + IIR), 0x01);
            CHECK(pyhv_device_save(rig.device, state, sizeof state, &error) >= 46);
            out(rig.bus, COM1 + THR, 'B'); /* queues up behind the 1000 */
            CHECK_EQUAL(rig.line.level, 0);

            writer_kick(&writer, with_signal);
            pthread_join(writer.thread, NULL);
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x00); /* tried, still no room */
            CHECK_EQUAL(rig.line.level, 0);

            /* What did go out (a terminal may take a little) and what is kept make up the whole, in order. */
            int64_t size = pyhv_device_save(rig.device, state, sizeof state, &error);
            CHECK(size > 46 && size <= 46 + 1001);
            sink_skip(sink, filler);
            for (int tries = 0; tries < 2000 && in(rig.bus, COM1 + LSR) != 0x60; tries++)
                sleep_ms(1);
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
            CHECK_EQUAL(rig.line.level, 1); /* the THR-empty event, now */
            CHECK_EQUAL(in(rig.bus, COM1 + IIR), 0x02);
            CHECK(read_exactly(sink.reader, got, 1001));
            CHECK(memcmp(got, text, 1000) == 0 && got[1000] == 'B');
            out(rig.bus, COM1 + THR, '!');
            CHECK(read_exactly(sink.reader, got, 1));
            CHECK_EQUAL(got[0], '!');
            CHECK_EQUAL(drain(sink.reader, got, sizeof got), 0);
            if (check_failures != before)
                fprintf(stderr, "  with a %s, %s\n", sink_names[kind], with_signal ? "kick by signal" : "flag alone");
            rig_down(&rig);
            sink_close(sink);
        }
    }
}

/* Without a kick a blocked write goes on as soon as there is room. */
static void test_uart_unblocked_output(void)
{
    uint8_t text[4096], got[4096];
    memset(text, 'u', sizeof text);
    for (enum sink_kind kind = 0; kind < SINK_KINDS; kind++) {
        struct sink sink = sink_open(kind);
        struct rig rig;
        uart_rig(&rig, -1, sink.guest_end);
        struct writer writer;
        size_t filler = sink_fill(sink);
        writer_start(&writer, rig.bus, text, sizeof text);
        CHECK(!atomic_load(&writer.finished));
        sink_skip(sink, filler);
        CHECK(read_exactly(sink.reader, got, sizeof got));
        pthread_join(writer.thread, NULL);
        CHECK(memcmp(got, text, sizeof text) == 0);
        CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
        rig_down(&rig);
        sink_close(sink);
    }
}

/* A terminal that takes a part of a write before it blocks: the kick keeps exactly the rest. */
static void test_uart_partial_output(void)
{
    struct sink sink = sink_open(SINK_TERMINAL);
    struct rig rig;
    struct writer writer;
    uint8_t text[4096], got[4096], state[PYHV_DEVICE_STATE_MAX];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)(i * 11 + i / 256);
    uart_rig(&rig, -1, sink.guest_end);
    size_t filler = sink_fill(sink);
    struct pollfd room = {.fd = sink.guest_end, .events = POLLOUT};
    for (; poll(&room, 1, 20) == 0 && filler > 256; filler -= 256)
        sink_skip(sink, 256);
    writer_start(&writer, rig.bus, text, sizeof text);
    CHECK(!atomic_load(&writer.finished));
    writer_kick(&writer, true);
    pthread_join(writer.thread, NULL);
    int64_t kept = pyhv_device_save(rig.device, state, sizeof state, &error) - 46;
    CHECK(kept > 0 && kept < (int64_t)sizeof text);
    CHECK(memcmp(state + 46, text + sizeof text - kept, (size_t)kept) == 0);
    sink_skip(sink, filler);
    for (int tries = 0; tries < 2000 && in(rig.bus, COM1 + LSR) != 0x60; tries++)
        sleep_ms(1);
    CHECK(read_exactly(sink.reader, got, sizeof got));
    CHECK(memcmp(got, text, sizeof text) == 0);

    /* A look at LSR, and a thread that is kicked already, send what fits and do not block in the rest. */
    filler = sink_fill(sink);
    writer_start(&writer, rig.bus, text, sizeof text);
    writer_kick(&writer, true);
    pthread_join(writer.thread, NULL);
    kept = pyhv_device_save(rig.device, state, sizeof state, &error) - 46;
    for (int kicked = 0; kicked < 2; kicked++) {
        for (; poll(&room, 1, 20) == 0 && filler > 256; filler -= 256)
            sink_skip(sink, 256);
        _Atomic int stop = 1;
        pyhv_cancel = &stop;
        if (kicked)
            pyhv_bus_flush(rig.bus);
        pyhv_cancel = NULL;
        if (!kicked)
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x00);
        int64_t still = pyhv_device_save(rig.device, state, sizeof state, &error) - 46;
        CHECK(still > 0 && still < kept);
        CHECK(memcmp(state + 46, text + sizeof text - still, (size_t)still) == 0);
        kept = still;
    }
    rig_down(&rig);
    sink_close(sink);
}

/* The next write sends what is kept first, and pyhv_bus_flush() sends it without any access of the guest. */
static void test_uart_pending_goes_on(void)
{
    for (int by_flush = 0; by_flush < 2; by_flush++) {
        struct sink sink = sink_open(SINK_PIPE);
        struct rig rig;
        uart_rig(&rig, -1, sink.guest_end);
        struct writer writer;
        uint8_t got[16];
        size_t filler = sink_fill(sink);
        out(rig.bus, COM1 + MCR, 0x08);
        out(rig.bus, COM1 + IER, 0x02);
        in(rig.bus, COM1 + IIR);
        writer_start(&writer, rig.bus, (const uint8_t *)"first ", 6);
        writer_kick(&writer, true);
        pthread_join(writer.thread, NULL);

        _Atomic int stop = 1; /* a kicked thread does not wait in the flush either */
        pyhv_cancel = &stop;
        pyhv_bus_flush(rig.bus);
        pyhv_cancel = NULL;
        CHECK_EQUAL(rig.line.level, 0);

        sink_skip(sink, filler);
        if (by_flush)
            pyhv_bus_flush(rig.bus);
        else
            out(rig.bus, COM1 + THR, '2');
        CHECK_EQUAL(rig.line.level, 1);
        size_t expected = by_flush ? 6 : 7;
        CHECK(read_exactly(sink.reader, got, expected));
        CHECK(memcmp(got, "first 2", expected) == 0);
        rig_down(&rig);
        sink_close(sink);
    }
}

/* What a kick left over moves to another process: here to another UART with another output. */
static void test_uart_pending_moves(void)
{
    struct sink source = sink_open(SINK_PIPE), target = sink_open(SINK_PIPE);
    struct rig from, to;
    uart_rig(&from, -1, source.guest_end);
    uart_rig(&to, -1, target.guest_end);
    uint8_t text[4096], got[4096], state[PYHV_DEVICE_STATE_MAX];
    struct writer writer;
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)(i ^ i >> 8);
    sink_fill(source);
    out(from.bus, COM1 + MCR, 0x08);
    out(from.bus, COM1 + IER, 0x02);
    in(from.bus, COM1 + IIR);
    writer_start(&writer, from.bus, text, sizeof text);
    writer_kick(&writer, true);
    pthread_join(writer.thread, NULL);
    int64_t size = pyhv_device_save(from.device, state, sizeof state, &error);
    CHECK_EQUAL(size, 46 + 4096); /* the pipe was full: all of it */

    /* More than fits is lost, but what was there first stays as it is. */
    writer_start(&writer, from.bus, text, 100);
    writer_kick(&writer, true);
    pthread_join(writer.thread, NULL);
    uint8_t again[PYHV_DEVICE_STATE_MAX];
    CHECK_EQUAL(pyhv_device_save(from.device, again, sizeof again, &error), size);
    CHECK(memcmp(state, again, (size_t)size) == 0);

    CHECK_EQUAL(pyhv_device_load(to.device, state, (size_t)size, &error), 0);
    CHECK_EQUAL(to.line.level, 0);
    CHECK_EQUAL(drain(target.reader, got, sizeof got), 0); /* loading sends nothing */
    pyhv_bus_flush(to.bus);
    CHECK_EQUAL(to.line.level, 1);
    CHECK(read_exactly(target.reader, got, sizeof got));
    CHECK(memcmp(got, text, sizeof text) == 0);

    /* Loopback does not let what waits be forgotten. */
    static const struct step loop[] = {W(MCR, 0x18, 0), W(THR, 'l', 0),  R(IIR, 0x01, 0), R(LSR, 0x01, 0),
                                       R(RBR, 'l', 0),  W(MCR, 0x08, 0), R(LSR, 0x00, 0)};
    PLAY("loopback with bytes to transmit", &from, COM1, loop);
    CHECK_EQUAL(pyhv_device_save(from.device, again, sizeof again, &error), size);
    CHECK_EQUAL(pyhv_device_load(from.device, again, (size_t)size, &error), 0);

    /* To one without an output: dropped, and the guest goes on. */
    struct rig nowhere;
    uart_rig(&nowhere, -1, -1);
    CHECK_EQUAL(pyhv_device_load(nowhere.device, state, (size_t)size, &error), 0);
    CHECK_EQUAL(in(nowhere.bus, COM1 + LSR), 0x60);
    CHECK_EQUAL(nowhere.line.level, 1);
    CHECK_EQUAL(pyhv_device_load(nowhere.device, state, (size_t)size, &error), 0);
    out(nowhere.bus, COM1 + THR, 'n');
    CHECK_EQUAL(pyhv_device_save(nowhere.device, again, sizeof again, &error), 46);
    CHECK_EQUAL(nowhere.line.level, 1);
    rig_down(&nowhere);
    rig_down(&from);
    rig_down(&to);
    sink_close(source);
    sink_close(target);
}

/* Two vCPUs that write more than the transmitter holds while the output is slow: nothing is lost or torn apart. */
static void test_uart_two_writers(void)
{
    struct sink sink = sink_open(SINK_PIPE);
    struct rig rig;
    uart_rig(&rig, -1, sink.guest_end);
    struct writer a, b;
    static uint8_t text_a[20000], text_b[20000], got[40000];
    memset(text_a, 'a', sizeof text_a);
    memset(text_b, 'b', sizeof text_b);
    size_t filler = sink_fill(sink);
    writer_start(&a, rig.bus, text_a, sizeof text_a);
    writer_start(&b, rig.bus, text_b, sizeof text_b);
    CHECK(!atomic_load(&a.finished) && !atomic_load(&b.finished));
    sink_skip(sink, filler);
    CHECK(read_exactly(sink.reader, got, sizeof got));
    pthread_join(a.thread, NULL);
    pthread_join(b.thread, NULL);
    size_t count_a = 0;
    for (size_t i = 0; i < sizeof got; i++)
        count_a += got[i] == 'a';
    CHECK_EQUAL(count_a, sizeof text_a);
    CHECK_EQUAL(drain(sink.reader, got, sizeof got), 0);

    /* One that waits for the other to make room can be kicked too. */
    filler = sink_fill(sink);
    writer_start(&a, rig.bus, text_a, 4096);
    writer_start(&b, rig.bus, text_b, 4096);
    CHECK(!atomic_load(&b.finished));
    writer_kick(&b, false);
    pthread_join(b.thread, NULL);
    CHECK(!atomic_load(&a.finished));
    writer_kick(&a, true);
    pthread_join(a.thread, NULL);
    rig_down(&rig);
    sink_close(sink);
}

/* A reader that goes away: the guest goes on, the process lives, and nothing is written any more. */
static void test_uart_broken_output(void)
{
    for (enum sink_kind kind = 0; kind < SINK_KINDS; kind++) {
        for (int ignored = 0; ignored < 2; ignored++) { /* SIGPIPE: at its default, or ignored as Python has it */
            unsigned before = check_failures;
            signal(SIGPIPE, ignored ? SIG_IGN : SIG_DFL);
            struct sink sink = sink_open(kind), fresh = sink_open(SINK_PIPE);
            struct rig rig;
            uart_rig(&rig, -1, sink.guest_end);
            uint8_t got[16];
            sigset_t mask, pending;

            out(rig.bus, COM1 + MCR, 0x08);
            out(rig.bus, COM1 + IER, 0x02);
            out(rig.bus, COM1 + THR, 'x');
            close(sink.reader);
            CHECK_EQUAL(out(rig.bus, COM1 + THR, 'y'), PYHV_ACTION_NONE);
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
            CHECK_EQUAL(rig.line.level, 1);
            CHECK_EQUAL(in(rig.bus, COM1 + IIR), 0x02);
            sigpending(&pending);
            CHECK(!sigismember(&pending, SIGPIPE));
            pthread_sigmask(SIG_BLOCK, NULL, &mask);
            CHECK(!sigismember(&mask, SIGPIPE));

            /* From now on it is dropped, even where the descriptor would take it again. */
            CHECK(dup2(fresh.guest_end, sink.guest_end) >= 0);
            pyhv_bus_port_io(rig.bus, COM1 + THR, 1, 1, 5, "later");
            out(rig.bus, COM1 + THR, 'z');
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
            CHECK_EQUAL(drain(fresh.reader, got, sizeof got), 0);
            if (check_failures != before)
                fprintf(stderr, "  with a %s, SIGPIPE %s\n", sink_names[kind], ignored ? "ignored" : "at its default");
            rig_down(&rig);
            close(sink.guest_end);
            sink_close(fresh);
        }
    }

    /* Closed while a vCPU is blocked in it. */
    signal(SIGPIPE, SIG_DFL);
    struct sink sink = sink_open(SINK_PIPE);
    struct rig rig;
    uart_rig(&rig, -1, sink.guest_end);
    struct writer writer;
    sink_fill(sink);
    writer_start(&writer, rig.bus, (const uint8_t *)"lost", 4);
    CHECK(!atomic_load(&writer.finished));
    close(sink.reader);
    pthread_join(writer.thread, NULL);
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
    rig_down(&rig);
    close(sink.guest_end);

    /* Somebody else's SIGPIPE that is already waiting is left to them. */
    sigset_t sigpipe, before, pending;
    int taken;
    sink = sink_open(SINK_PIPE);
    uart_rig(&rig, -1, sink.guest_end);
    close(sink.reader);
    sigemptyset(&sigpipe);
    sigaddset(&sigpipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &sigpipe, &before);
    pthread_kill(pthread_self(), SIGPIPE);
    out(rig.bus, COM1 + THR, 'q');
    sigpending(&pending);
    CHECK(sigismember(&pending, SIGPIPE));
    sigwait(&sigpipe, &taken);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    rig_down(&rig);
    close(sink.guest_end);

    /* Not a descriptor at all, one that cannot be written, one that is full for good: told, with what was lost on it. */
    int bad[] = {999, open("/dev/null", O_RDONLY), open("/dev/full", O_WRONLY)};
    const int errors[] = {EBADF, EBADF, ENOSPC};
    for (size_t i = 0; i < 3; i++) {
        uint64_t lost = 99;
        uart_rig(&rig, -1, bad[i]);
        CHECK_EQUAL(pyhv_uart16550_lost_output(rig.device, &lost), 0);
        CHECK_EQUAL(lost, 0);
        out(rig.bus, COM1 + THR, 'q');
        CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
        pyhv_bus_port_io(rig.bus, COM1, 1, 1, 4, "tail");
        CHECK_EQUAL(pyhv_uart16550_lost_output(rig.device, &lost), errors[i]);
        CHECK_EQUAL(lost, 5);
        rig_down(&rig);
    }
    close(bad[1]);
    close(bad[2]);
}

static void test_uart_output_to_file(void)
{
    char path[] = "/tmp/pyhv-test-devices-XXXXXX";
    int fd = mkstemp(path);
    uint8_t got[16] = {0};
    CHECK(fd >= 0);
    unlink(path);
    CHECK_EQUAL(write(fd, "head ", 5), 5);
    struct rig rig;
    uart_rig(&rig, -1, fd);
    pyhv_bus_port_io(rig.bus, COM1, 1, 1, 4, "tail");
    out(rig.bus, COM1, '\n');
    CHECK_EQUAL(pread(fd, got, sizeof got, 0), 10); /* at the file's position */
    CHECK(memcmp(got, "head tail\n", 10) == 0);
    rig_down(&rig);
    close(fd);
}

/* ----------------------------------------------------------------------------------------- UART: the input -- */

struct pump {
    struct pyhv_device *uart;
    int result;
    struct pyhv_error problem;
    _Atomic int finished;
    pthread_t thread;
};

static void *pump_run(void *opaque)
{
    struct pump *pump = opaque;
    pump->result = pyhv_uart16550_pump_input(pump->uart, &pump->problem);
    atomic_store(&pump->finished, 1);
    return NULL;
}

static void pump_start(struct pump *pump, struct pyhv_device *uart)
{
    memset(pump, 0, sizeof *pump);
    pump->uart = uart;
    pthread_create(&pump->thread, NULL, pump_run, pump);
}

static void pump_stop(struct pump *pump)
{
    pyhv_uart16550_stop_input(pump->uart);
    pthread_join(pump->thread, NULL);
    CHECK_EQUAL(pump->result, 0);
}

/* Waits until LSR shows (or not) a received byte. */
static void await_data(struct pyhv_bus *bus)
{
    for (int tries = 0; tries < 5000 && !(in(bus, COM1 + LSR) & 1); tries++)
        sleep_ms(1);
    CHECK(in(bus, COM1 + LSR) & 1);
}

static void test_uart_kept_output(void)
{
    struct rig rig;
    uint8_t text[300], got[64];
    uint64_t first, end;
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)i;
    uart_rig(&rig, -1, -1);
    CHECK_EQUAL(pyhv_uart16550_keep(rig.device, 16, &error), 0);
    CHECK_EQUAL(pyhv_uart16550_kept(rig.device, 0, got, sizeof got, &first, &end), 0);
    CHECK_EQUAL(first | end, 0);
    out(rig.bus, COM1 + MCR, 0x08);
    out(rig.bus, COM1 + IER, 0x02);
    in(rig.bus, COM1 + IIR);
    static const struct step ready[] = {W(RBR, 'a', 1), R(LSR, 0x60, 1), R(IIR, 0x02, 0)};
    PLAY("always ready", &rig, COM1, ready);
    CHECK_EQUAL(pyhv_uart16550_kept(rig.device, 0, got, sizeof got, &first, &end), 1);
    CHECK_EQUAL(got[0], 'a');
    /* The last 16 of 301, from anywhere, in pieces. */
    pyhv_bus_port_io(rig.bus, COM1, 1, 1, sizeof text, text);
    CHECK_EQUAL(pyhv_uart16550_kept(rig.device, 0, got, sizeof got, &first, &end), 16);
    CHECK_EQUAL(first, 301 - 16);
    CHECK_EQUAL(end, 301);
    CHECK(memcmp(got, text + sizeof text - 16, 16) == 0);
    CHECK_EQUAL(pyhv_uart16550_kept(rig.device, 290, got, 4, &first, &end), 4);
    CHECK(memcmp(got, text + 289, 4) == 0);
    CHECK_EQUAL(pyhv_uart16550_kept(rig.device, 301, got, sizeof got, &first, &end), 0);
    CHECK_EQUAL(pyhv_uart16550_kept(rig.device, 5000, got, sizeof got, &first, &end), 0);
    rig_down(&rig);
}

static void test_uart_input_set_later(void)
{
    int fds[2];
    struct pump pump;
    CHECK_EQUAL(pipe(fds), 0);
    struct rig rig;
    uart_rig(&rig, -1, -1);
    CHECK_EQUAL(pyhv_uart16550_set_input(rig.device, fds[0], &error), 0);
    pump_start(&pump, rig.device);
    CHECK_EQUAL(write(fds[1], "x", 1), 1);
    await_data(rig.bus);
    CHECK_EQUAL(in(rig.bus, COM1 + RBR), 'x');
    pump_stop(&pump);
    rig_down(&rig);
    close(fds[0]);
    close(fds[1]);
}

static void test_uart_pump(void)
{
    int fds[2];
    struct pump pump;
    CHECK_EQUAL(pipe(fds), 0);
    struct rig rig;
    uart_rig(&rig, fds[0], -1);
    uint8_t got[64];

    /* As Linux's driver receives: FIFO on, trigger 8, RDI and RLSI. */
    out(rig.bus, COM1 + FCR, 0x81);
    out(rig.bus, COM1 + MCR, 0x0b);
    out(rig.bus, COM1 + IER, 0x05);
    pump_start(&pump, rig.device);
    CHECK_EQUAL(write(fds[1], "abc", 3), 3);
    await_data(rig.bus);
    static const struct step three[] = {R(IIR, 0xcc, 1), R(LSR, 0x61, 1), R(RBR, 'a', 1),  R(LSR, 0x61, 1),
                                        R(RBR, 'b', 1),  R(RBR, 'c', 0),  R(LSR, 0x60, 0), R(IIR, 0xc1, 0)};
    PLAY("receive three", &rig, COM1, three);

    /* More than the FIFO holds: 16 at a time, the rest waits, nothing is overrun. */
    CHECK_EQUAL(write(fds[1], "0123456789abcdefghijklmnopqrstuvwxyz", 36), 36);
    for (int i = 0; i < 36; i++) {
        await_data(rig.bus);
        CHECK_EQUAL(in(rig.bus, COM1 + LSR) & 0x02, 0);
        if (i == 0) { /* wait for it to be full */
            for (int tries = 0; tries < 5000 && in(rig.bus, COM1 + IIR) != 0xc4; tries++)
                sleep_ms(1);
            CHECK_EQUAL(rig.line.level, 1);
        }
        got[i] = in(rig.bus, COM1 + RBR);
    }
    CHECK(memcmp(got, "0123456789abcdefghijklmnopqrstuvwxyz", 36) == 0);
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);

    /* Nothing comes in during loopback, all of it afterwards; also what the pump was just reading. */
    sleep_ms(10);
    out(rig.bus, COM1 + MCR, 0x18);
    CHECK_EQUAL(write(fds[1], "loop", 4), 4);
    sleep_ms(20);
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
    out(rig.bus, COM1 + THR, 'X');
    CHECK_EQUAL(in(rig.bus, COM1 + RBR), 'X');
    uint8_t state[PYHV_DEVICE_STATE_MAX]; /* what is held is part of the state */
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), 46);
    CHECK_EQUAL(state[27], 4);
    CHECK(memcmp(state + 28, "loop\0", 5) == 0);
    out(rig.bus, COM1 + MCR, 0x08);
    CHECK_EQUAL(rig.line.level, 1);
    for (int i = 0; i < 4; i++) {
        await_data(rig.bus);
        CHECK_EQUAL(in(rig.bus, COM1 + RBR), "loop"[i]);
    }

    /* FIFO turned off while the pump waits with room for 16: one byte at a time. */
    sleep_ms(10);
    out(rig.bus, COM1 + FCR, 0x00);
    CHECK_EQUAL(write(fds[1], "one", 3), 3);
    for (int i = 0; i < 3; i++) {
        await_data(rig.bus);
        CHECK_EQUAL(in(rig.bus, COM1 + IIR), 0x04);
        CHECK_EQUAL(in(rig.bus, COM1 + RBR), "one"[i]);
    }
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);

    /* A second pump at once is refused. */
    CHECK_EQUAL(pyhv_uart16550_pump_input(rig.device, &error), -1);
    CHECK_EQUAL(error.errnum, EBUSY);

    /* The end of input. */
    close(fds[1]);
    pthread_join(pump.thread, NULL);
    CHECK_EQUAL(pump.result, 0);
    pyhv_uart16550_stop_input(rig.device); /* after the end: no harm */
    rig_down(&rig);
    close(fds[0]);
}

/* Stopped in every state that the pump can be in, and started again. */
static void test_uart_pump_stop(void)
{
    int fds[2];
    struct pump pump;
    CHECK_EQUAL(pipe(fds), 0);
    struct rig rig;
    uart_rig(&rig, fds[0], -1);
    out(rig.bus, COM1 + FCR, 0x01);
    out(rig.bus, COM1 + IER, 0x01);

    pyhv_uart16550_stop_input(rig.device); /* before it starts */
    CHECK_EQUAL(pyhv_uart16550_pump_input(rig.device, &error), 0);

    pump_start(&pump, rig.device); /* waits for input */
    sleep_ms(10);
    CHECK(!atomic_load(&pump.finished));
    pump_stop(&pump);

    pump_start(&pump, rig.device); /* waits for room */
    CHECK_EQUAL(write(fds[1], "0123456789abcdefGH", 18), 18);
    sleep_ms(20);
    CHECK(!atomic_load(&pump.finished));
    pump_stop(&pump);
    for (int i = 0; i < 16; i++)
        CHECK_EQUAL(in(rig.bus, COM1 + RBR), "0123456789abcdef"[i]);
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60); /* stopped is stopped */
    pump_start(&pump, rig.device);              /* and what was left in the pipe comes when it is started again */
    await_data(rig.bus);
    CHECK_EQUAL(in(rig.bus, COM1 + RBR), 'G');
    await_data(rig.bus);
    CHECK_EQUAL(in(rig.bus, COM1 + RBR), 'H');
    pump_stop(&pump);

    out(rig.bus, COM1 + MCR, 0x10); /* in loopback */
    pump_start(&pump, rig.device);
    sleep_ms(10);
    CHECK(!atomic_load(&pump.finished));
    pump_stop(&pump);

    for (int i = 0; i < 300; i++) { /* at any moment of its start */
        pump_start(&pump, rig.device);
        pump_stop(&pump);
    }

    /* With a full FIFO the end of input is not seen before there is room: it must not spin or end. */
    out(rig.bus, COM1 + MCR, 0x00);
    pump_start(&pump, rig.device);
    CHECK_EQUAL(write(fds[1], "0123456789abcdefZ", 17), 17);
    close(fds[1]);
    sleep_ms(20);
    CHECK(!atomic_load(&pump.finished));
    for (int i = 0; i < 17; i++) {
        await_data(rig.bus);
        CHECK_EQUAL(in(rig.bus, COM1 + RBR), "0123456789abcdefZ"[i]);
    }
    pthread_join(pump.thread, NULL);
    CHECK_EQUAL(pump.result, 0);
    rig_down(&rig);
    close(fds[0]);

    /* No input at all; input that cannot be read. */
    uart_rig(&rig, -1, -1);
    pyhv_uart16550_stop_input(rig.device);
    CHECK_EQUAL(pyhv_uart16550_pump_input(rig.device, &error), 0);
    rig_down(&rig);
    int directory = open("/", O_RDONLY | O_DIRECTORY);
    uart_rig(&rig, directory, -1);
    out(rig.bus, COM1 + IER, 0x01);
    CHECK_EQUAL(pyhv_uart16550_pump_input(rig.device, &error), -1);
    CHECK_EQUAL(error.errnum, EISDIR);
    CHECK(strcmp(error.what, "read") == 0);
    rig_down(&rig);
    close(directory);
    uart_rig(&rig, 999, -1);
    out(rig.bus, COM1 + IER, 0x01);
    CHECK_EQUAL(pyhv_uart16550_pump_input(rig.device, &error), -1);
    CHECK_EQUAL(error.errnum, EBADF);
    rig_down(&rig);
}

/* Input that is there before the guest is up: none of it is lost on a driver that starts as Linux's does, which clears the
 * FIFO and reads RBR without wanting anything, and writes to the console by polling LSR. */
static void test_uart_input_waits_for_the_guest(void)
{
    int fds[2];
    struct pump pump;
    struct rig rig;
    uint8_t got[40];
    CHECK_EQUAL(pipe(fds), 0);
    uart_rig(&rig, fds[0], -1);
    CHECK_EQUAL(write(fds[1], "0123456789abcdefghijklmnopqrstuvwxyz", 36), 36);
    pump_start(&pump, rig.device);
    for (int again = 0; again < 20; again++) {
        out(rig.bus, COM1 + FCR, 0x01);
        out(rig.bus, COM1 + FCR, 0x07);
        out(rig.bus, COM1 + FCR, 0x00);
        CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
        in(rig.bus, COM1 + RBR);
        in(rig.bus, COM1 + IIR);
        in(rig.bus, COM1 + MSR);
        /* A line of the early console: with each byte one look, and one more in the end. */
        for (int i = 0; i < 50; i++) {
            CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
            out(rig.bus, COM1 + THR, 'e');
        }
        CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
        out(rig.bus, COM1 + IER, 0x00);
        sleep_ms(1);
    }
    out(rig.bus, COM1 + IER, 0x05);
    await_data(rig.bus); /* one byte has come in: the FIFO is not on yet */
    out(rig.bus, COM1 + FCR, 0x81);
    for (int i = 0; i < 36; i++) {
        if (i % 7 == 3) /* it starts once more: what it has not read yet comes again */
            out(rig.bus, COM1 + FCR, i % 2 ? 0x07 : 0x00);
        await_data(rig.bus);
        got[i] = in(rig.bus, COM1 + RBR);
    }
    CHECK(memcmp(got, "0123456789abcdefghijklmnopqrstuvwxyz", 36) == 0);
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);

    /* What the guest has sent itself is cleared. */
    out(rig.bus, COM1 + FCR, 0x01);
    out(rig.bus, COM1 + MCR, 0x10);
    out(rig.bus, COM1 + THR, 'L');
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x61);
    out(rig.bus, COM1 + MCR, 0x00);
    out(rig.bus, COM1 + FCR, 0x03);
    CHECK_EQUAL(in(rig.bus, COM1 + LSR), 0x60);
    pump_stop(&pump);
    rig_down(&rig);
    close(fds[0]);
    close(fds[1]);
}

/* A guest without interrupts gets its input when it polls for it: by LSR, also one that prints in between, or by RBR. */
static void test_uart_input_for_a_guest_that_polls(void)
{
    for (int how = 0; how < 3; how++) {
        int fds[2];
        struct pump pump;
        struct rig rig;
        uint8_t byte = 0;
        CHECK_EQUAL(pipe(fds), 0);
        uart_rig(&rig, fds[0], -1);
        CHECK_EQUAL(write(fds[1], "p", 1), 1);
        pump_start(&pump, rig.device);
        for (int tries = 0; tries < 5000 && byte != 'p'; tries++) {
            if (how == 2) {
                byte = in(rig.bus, COM1 + RBR);
            } else if (in(rig.bus, COM1 + LSR) & 1) {
                byte = in(rig.bus, COM1 + RBR);
            } else if (how == 1) {
                while (!(in(rig.bus, COM1 + LSR) & 0x20))
                    ;
                out(rig.bus, COM1 + THR, '.');
            }
            if (tries > 10)
                sleep_ms(1);
        }
        CHECK_EQUAL(byte, 'p');
        pump_stop(&pump);
        rig_down(&rig);
        close(fds[0]);
        close(fds[1]);
    }
}

/* One vCPU looks at LSR all the time, which sends without waiting, while another writes: that one's byte is not left to
 * the first, who gives up. */
static void *look_at_lsr(void *opaque)
{
    struct writer *looker = opaque;
    while (!atomic_load(&looker->stop))
        in(looker->bus, COM1 + LSR);
    return NULL;
}

static void test_uart_a_writer_beside_one_who_looks(void)
{
    for (int round = 0; round < 30; round++) {
        struct sink sink = sink_open(SINK_PIPE);
        struct rig rig;
        uart_rig(&rig, -1, sink.guest_end);
        out(rig.bus, COM1 + MCR, 0x08);
        out(rig.bus, COM1 + IER, 0x02);
        in(rig.bus, COM1 + IIR);
        size_t filler = sink_fill(sink);
        _Atomic int stopped = 1; /* as a kick leaves it: a byte waits in the transmitter */
        pyhv_cancel = &stopped;
        out(rig.bus, COM1 + THR, 'A');
        pyhv_cancel = NULL;

        struct writer looker = {.bus = rig.bus}, writer;
        pthread_create(&looker.thread, NULL, look_at_lsr, &looker);
        writer_start(&writer, rig.bus, (const uint8_t *)"B", 1);
        CHECK(!atomic_load(&writer.finished)); /* it waits for room, as it would alone */
        atomic_store(&looker.stop, 1);
        pthread_join(looker.thread, NULL);
        uint8_t got[2];
        sink_skip(sink, filler);
        CHECK(read_exactly(sink.reader, got, 2)); /* without anybody who looks again */
        CHECK(memcmp(got, "AB", 2) == 0);
        pthread_join(writer.thread, NULL);
        CHECK_EQUAL(rig.line.level, 1);
        rig_down(&rig);
        sink_close(sink);
    }
}

struct feeder {
    int fd;
    const uint8_t *bytes;
    size_t count;
};

static void *feed(void *opaque)
{
    struct feeder *feeder = opaque;
    for (size_t done = 0; done < feeder->count;) {
        size_t part = 1 + done % 97;
        if (part > feeder->count - done)
            part = feeder->count - done;
        ssize_t count = write(feeder->fd, feeder->bytes + done, part);
        if (count > 0)
            done += (size_t)count;
    }
    return NULL;
}

/* A guest that reads one byte for each rising edge and sleeps in between: it gets all of them, however they come. */
static void test_uart_pump_by_edges(void)
{
    static uint8_t text[5000];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)(i * 13 + i / 256);
    for (int fifo = 0; fifo < 2; fifo++) {
        int fds[2];
        struct pump pump;
        sem_t edge;
        pthread_t thread;
        CHECK_EQUAL(pipe(fds), 0);
        struct rig rig;
        uart_rig(&rig, fds[0], -1);
        sem_init(&edge, 0, 0);
        rig.line.on_rise = &edge;
        pyhv_bus_set_irq_sink(rig.bus, (struct pyhv_irq_sink){.raise = line_raise, .opaque = &rig.line});
        out(rig.bus, COM1 + FCR, fifo ? 0xc1 : 0x00);
        out(rig.bus, COM1 + MCR, 0x08);
        out(rig.bus, COM1 + IER, 0x01);
        pump_start(&pump, rig.device);
        struct feeder feeder = {.fd = fds[1], .bytes = text, .count = sizeof text};
        pthread_create(&thread, NULL, feed, &feeder);
        size_t wrong = 0, received = 0;
        while (received < sizeof text) {
            struct timespec limit;
            clock_gettime(CLOCK_REALTIME, &limit);
            limit.tv_sec += 20;
            if (sem_timedwait(&edge, &limit) < 0)
                break;
            /* A chip in FIFO mode holds its line up above the trigger level: a handler must look again. */
            do {
                if (!(in(rig.bus, COM1 + LSR) & 1))
                    break; /* an edge that was overtaken */
                wrong += in(rig.bus, COM1 + RBR) != text[received++];
            } while (in(rig.bus, COM1 + IIR) == 0xc4);
        }
        CHECK_EQUAL(received, sizeof text);
        CHECK_EQUAL(wrong, 0);
        pthread_join(thread, NULL);
        pump_stop(&pump);
        rig_down(&rig);
        sem_destroy(&edge);
        close(fds[0]);
        close(fds[1]);
    }
}

/* -------------------------------------------------------------------------------------------------- i8042 -- */

static void test_i8042(void)
{
    enum { DATA = 0x60, COMMAND = 0x64 };
    static const struct step steps[] = {
        /* as it comes up: empty, tested, not locked */
        R(COMMAND, 0x14, 0), R(DATA, 0x00, 0), R(COMMAND, 0x14, 0),
        /* Linux, i8042_controller_check and _init: flush, command byte twice, written back, read back */
        W(COMMAND, 0x20, 0), R(COMMAND, 0x1d, 0), R(DATA, 0x74, 0), R(COMMAND, 0x1c, 0), W(COMMAND, 0x20, 0),
        R(DATA, 0x74, 0), W(COMMAND, 0x60, 0), R(COMMAND, 0x1c, 0), W(DATA, 0x45, 0), R(COMMAND, 0x14, 0),
        W(COMMAND, 0x20, 0), R(DATA, 0x45, 0),
        /* self test, port tests: answered at once */
        W(COMMAND, 0x60, 0), W(DATA, 0x00, 0), R(COMMAND, 0x10, 0), W(COMMAND, 0xaa, 0), R(COMMAND, 0x1d, 0),
        R(DATA, 0x55, 0), R(COMMAND, 0x1c, 0), R(DATA, 0x55, 0), W(COMMAND, 0x20, 0), R(DATA, 0x04, 0),
        W(COMMAND, 0xab, 0), R(COMMAND, 0x1d, 0), R(DATA, 0x00, 0),
        /* Linux, i8042_check_aux: the looped byte is not the mouse's (status bit 5), the mouse port test fails */
        W(COMMAND, 0xd3, 0), W(DATA, 0x5a, 0), R(COMMAND, 0x15, 0), R(DATA, 0x5a, 0), W(COMMAND, 0xa9, 0),
        R(COMMAND, 0x1d, 0), R(DATA, 0x01, 0),
        /* the other commands */
        W(COMMAND, 0xd2, 0), W(DATA, 0x77, 0), R(COMMAND, 0x15, 0), R(DATA, 0x77, 0), W(COMMAND, 0xd4, 0),
        W(DATA, 0xff, 0), R(COMMAND, 0x14, 0), W(COMMAND, 0xad, 0), W(COMMAND, 0xa7, 0), W(COMMAND, 0x20, 0),
        R(DATA, 0x34, 0), W(COMMAND, 0xae, 0), W(COMMAND, 0x20, 0), R(DATA, 0x24, 0), W(COMMAND, 0xa8, 0),
        W(COMMAND, 0x20, 0), R(DATA, 0x04, 0), W(COMMAND, 0xc0, 0), R(DATA, 0x80, 0), W(COMMAND, 0xe0, 0),
        R(COMMAND, 0x1d, 0), R(DATA, 0x00, 0),
        /* A20 is on and stays on; bytes to the keyboard vanish; unknown commands too */
        W(COMMAND, 0xd0, 0), R(DATA, 0xcf, 0), W(COMMAND, 0xd1, 0), W(DATA, 0xdd, 0), W(COMMAND, 0xdd, 0),
        W(COMMAND, 0xd0, 0), R(DATA, 0xcf, 0), W(DATA, 0xf2, 0), R(COMMAND, 0x14, 0), W(COMMAND, 0x42, 0),
        R(COMMAND, 0x1c, 0),
        /* a command takes the place of one that waits for its byte */
        W(COMMAND, 0x60, 0), W(COMMAND, 0xae, 0), W(DATA, 0xff, 0), W(COMMAND, 0x20, 0), R(DATA, 0x04, 0),
        /* reset: every pulse of line 0, and the output port with bit 0 low; nothing else */
        WA(COMMAND, 0xfe, PYHV_ACTION_RESET), WA(COMMAND, 0xf0, PYHV_ACTION_RESET), WA(COMMAND, 0xff, 0),
        WA(COMMAND, 0xfd, 0), WA(COMMAND, 0xd1, 0), WA(DATA, 0xfe, PYHV_ACTION_RESET), WA(DATA, 0xfe, 0),
        WA(COMMAND, 0xd1, 0), WA(DATA, 0x03, 0), WA(DATA, 0x00, 0)};
    struct rig rig;
    rig_up(&rig, pyhv_i8042_create(&error));
    PLAY("i8042", &rig, 0, steps);
    rig_down(&rig);
}

/* --------------------------------------------------------------------------------------------------- CMOS -- */

static uint8_t cmos_get(struct pyhv_bus *bus, uint8_t index)
{
    out(bus, 0x70, index);
    return in(bus, 0x71);
}

static void cmos_set(struct pyhv_bus *bus, uint8_t index, uint8_t value)
{
    out(bus, 0x70, index);
    out(bus, 0x71, value);
}

static void cmos_rig(struct rig *rig, uint64_t below, uint64_t above)
{
    rig_up(rig, pyhv_cmos_create(below, above, &error));
}

static uint8_t code(int number, bool binary)
{
    return (uint8_t)(binary ? number : number / 10 * 16 + number % 10);
}

static int number(uint8_t byte, bool binary)
{
    return binary ? byte : byte / 16 * 10 + byte % 16;
}

/* The hours register for an hour of the day. */
static uint8_t hour_code(int hour, bool binary, bool all_24)
{
    return all_24 ? code(hour, binary) : (uint8_t)(code(hour % 12 ? hour % 12 : 12, binary) | (hour >= 12 ? 0x80 : 0));
}

/* What the clock shows, as Linux reads it, in seconds since 1970. */
static time_t clock_shows(struct pyhv_bus *bus)
{
    uint8_t b = cmos_get(bus, 0x0b);
    bool binary = b & 4;
    struct tm tm = {0};
    tm.tm_sec = number(cmos_get(bus, 0), binary); /* first: takes the picture */
    tm.tm_min = number(cmos_get(bus, 2), binary);
    uint8_t hours = cmos_get(bus, 4);
    tm.tm_hour = b & 2 ? number(hours, binary) : number(hours & 0x7f, binary) % 12 + (hours & 0x80 ? 12 : 0);
    int day_of_week = cmos_get(bus, 6);
    tm.tm_mday = number(cmos_get(bus, 7), binary);
    tm.tm_mon = number(cmos_get(bus, 8), binary) - 1;
    tm.tm_year = number(cmos_get(bus, 9), binary) + number(cmos_get(bus, 0x32), binary) * 100 - 1900;
    time_t seconds = timegm(&tm);
    CHECK_EQUAL(day_of_week, tm.tm_wday + 1);
    return seconds;
}

/* As Linux sets it (mc146818_set_time): SET, divider reset, fields, then back. */
static void clock_set(struct pyhv_bus *bus, const struct tm *tm)
{
    uint8_t b = cmos_get(bus, 0x0b), a = cmos_get(bus, 0x0a) & 0x7f;
    bool binary = b & 4;
    cmos_set(bus, 0x0b, b | 0x80);
    cmos_set(bus, 0x0a, a | 0x70);
    cmos_set(bus, 9, code(tm->tm_year % 100, binary));
    cmos_set(bus, 8, code(tm->tm_mon + 1, binary));
    cmos_set(bus, 7, code(tm->tm_mday, binary));
    cmos_set(bus, 4, hour_code(tm->tm_hour, binary, b & 2));
    cmos_set(bus, 2, code(tm->tm_min, binary));
    cmos_set(bus, 0, code(tm->tm_sec, binary));
    cmos_set(bus, 0x32, code((tm->tm_year + 1900) / 100, binary));
    CHECK_EQUAL(cmos_get(bus, 0), code(tm->tm_sec, binary)); /* halted: it shows what was written */
    CHECK_EQUAL(cmos_get(bus, 4), hour_code(tm->tm_hour, binary, b & 2));
    CHECK_EQUAL(cmos_get(bus, 0x0a) & 0x80, 0);
    cmos_set(bus, 0x0b, b);
    CHECK_EQUAL(cmos_get(bus, 0), code(tm->tm_sec, binary)); /* the divider halts it still */
    cmos_set(bus, 0x0a, a);
}

#define CHECK_CLOSE(got, expected) /* a second may have passed since; it is a busy machine: a few */ \
    do {                                                                                             \
        int64_t difference = (int64_t)((got) - (expected));                                          \
        if (difference < 0 || difference > 5)                                                        \
            fprintf(stderr, "  the clock is %lld seconds off\n", (long long)difference);             \
        CHECK(difference >= 0 && difference <= 5);                                                   \
    } while (0)

static void test_cmos_clock(void)
{
    static const uint8_t formats[] = {0x02, 0x00, 0x06, 0x04}; /* 24 hours and BCD, 12 hours, binary, both */
    static const struct tm dates[] = {
        /* second minute hour day month year, counted as struct tm does */
        {.tm_sec = 0, .tm_min = 0, .tm_hour = 0, .tm_mday = 1, .tm_mon = 0, .tm_year = 70},
        {.tm_sec = 30, .tm_min = 59, .tm_hour = 11, .tm_mday = 29, .tm_mon = 1, .tm_year = 124},
        {.tm_sec = 30, .tm_min = 15, .tm_hour = 12, .tm_mday = 31, .tm_mon = 11, .tm_year = 99},
        {.tm_sec = 9, .tm_min = 10, .tm_hour = 23, .tm_mday = 28, .tm_mon = 1, .tm_year = 0},
        {.tm_sec = 45, .tm_min = 1, .tm_hour = 13, .tm_mday = 19, .tm_mon = 0, .tm_year = 138},
        {.tm_sec = 1, .tm_min = 2, .tm_hour = 1, .tm_mday = 9, .tm_mon = 9, .tm_year = 9999 - 1900},
        {.tm_sec = 59, .tm_min = 59, .tm_hour = 23, .tm_mday = 31, .tm_mon = 11, .tm_year = 199} /* rolls over */
    };
    for (size_t f = 0; f < 4; f++) {
        struct rig rig;
        cmos_rig(&rig, 64 << 20, 0);
        time_t now = time(NULL);
        CHECK_CLOSE(clock_shows(rig.bus), now);
        cmos_set(rig.bus, 0x0b, formats[f]); /* a running clock shows itself in the new format */
        CHECK_EQUAL(cmos_get(rig.bus, 0x0b), formats[f]);
        now = time(NULL);
        CHECK_CLOSE(clock_shows(rig.bus), now);
        for (size_t d = 0; d < sizeof dates / sizeof dates[0]; d++) {
            unsigned before = check_failures;
            struct tm date = dates[d];
            time_t expected = timegm(&date);
            clock_set(rig.bus, &dates[d]);
            CHECK_CLOSE(clock_shows(rig.bus), expected);
            if (d != 6)
                CHECK_EQUAL(cmos_get(rig.bus, 4), hour_code(date.tm_hour, formats[f] & 4, formats[f] & 2));

            /* Moves with the state, and on with the time. */
            uint8_t state[PYHV_DEVICE_STATE_MAX];
            int64_t size = pyhv_device_save(rig.device, state, sizeof state, &error);
            CHECK_EQUAL(size, 139);
            struct rig other;
            cmos_rig(&other, 1 << 20, 0);
            CHECK_EQUAL(pyhv_device_load(other.device, state, (size_t)size, &error), 0);
            CHECK_CLOSE(clock_shows(other.bus), expected);
            rig_down(&other);

            /* One field at a time, without SET. */
            cmos_set(rig.bus, 4, hour_code((date.tm_hour + 5) % 24, formats[f] & 4, formats[f] & 2));
            if (d != 6) /* not across midnight */
                CHECK_CLOSE(clock_shows(rig.bus), expected + ((date.tm_hour + 5) % 24 - date.tm_hour) * 3600);
            if (check_failures != before)
                fprintf(stderr, "  date %zu, status B 0x%02x\n", d, formats[f]);
        }
        rig_down(&rig);
    }
}

static void test_cmos_status(void)
{
    struct rig rig;
    cmos_rig(&rig, 64 << 20, 0);
    CHECK_EQUAL(in(rig.bus, 0x70), 0xff);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0a) & 0x7f, 0x26);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0b), 0x02);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0c), 0x00);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0d), 0x80);
    CHECK_EQUAL(cmos_get(rig.bus, 0x8d), 0x80); /* the NMI bit is not part of the index */
    cmos_set(rig.bus, 0x0c, 0xff);
    cmos_set(rig.bus, 0x0d, 0x00);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0c), 0x00);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0d), 0x80);
    cmos_set(rig.bus, 0x0a, 0xaf);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0a) & 0x7f, 0x2f); /* bit 7 is the chip's */
    cmos_set(rig.bus, 0x0b, 0x72);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0b), 0x72);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0c), 0x00); /* enabled, but there are no interrupts */
    cmos_set(rig.bus, 0x0b, 0xf2);
    CHECK_EQUAL(cmos_get(rig.bus, 0x0b), 0xe2); /* SET clears the update interrupt's enable */

    /* Halted, here by the divider, it stands still; not having been written it then goes on as if nothing had been. */
    cmos_set(rig.bus, 0x0b, 0x02);
    cmos_set(rig.bus, 0x0a, 0x76);
    uint8_t seconds = cmos_get(rig.bus, 0);
    sleep_ms(1100);
    CHECK_EQUAL(cmos_get(rig.bus, 0), seconds);
    cmos_set(rig.bus, 0x0a, 0x26);
    time_t now = time(NULL);
    CHECK_CLOSE(clock_shows(rig.bus), now);
    uint8_t state[PYHV_DEVICE_STATE_MAX];
    pyhv_device_save(rig.device, state, sizeof state, &error);
    CHECK(memcmp(state + 3, "\0\0\0\0\0\0\0\0", 8) == 0); /* the offset is still none */

    /* A state saved while the guest sets the clock. */
    cmos_set(rig.bus, 0x0b, 0x82);
    cmos_set(rig.bus, 9, 0x01);
    cmos_set(rig.bus, 0x32, 0x20);
    int64_t size = pyhv_device_save(rig.device, state, sizeof state, &error);
    struct rig other;
    cmos_rig(&other, 1 << 20, 0);
    CHECK_EQUAL(pyhv_device_load(other.device, state, (size_t)size, &error), 0);
    cmos_set(other.bus, 0x0b, 0x02);
    CHECK_EQUAL(cmos_get(other.bus, 9), 0x01);
    rig_down(&other);

    /* Garbage in the registers is carried into the next field; nothing breaks, whatever the format. */
    for (int b = 0; b < 8; b += 2) {
        static const uint8_t times[] = {0, 2, 4, 6, 7, 8, 9, 0x32};
        for (int value = 0; value < 256; value += 5) {
            cmos_set(rig.bus, 0x0b, (uint8_t)(b | 0x80));
            for (size_t i = 0; i < sizeof times; i++)
                cmos_set(rig.bus, times[i], (uint8_t)value);
            cmos_set(rig.bus, 0x0b, (uint8_t)b);
            clock_shows(rig.bus);
            size = pyhv_device_save(rig.device, state, sizeof state, &error);
            CHECK_EQUAL(pyhv_device_load(rig.device, state, (size_t)size, &error), 0);
        }
    }
    cmos_set(rig.bus, 0x0b, 0x82);
    static const uint8_t fields[][2] = {{0, 0}, {2, 0}, {4, 0}, {7, 0x32}, {8, 0x01}, {9, 0x24}, {0x32, 0x20}};
    for (size_t i = 0; i < 7; i++)
        cmos_set(rig.bus, fields[i][0], fields[i][1]);
    cmos_set(rig.bus, 0x0b, 0x02);
    CHECK_EQUAL(cmos_get(rig.bus, 7), 0x01); /* 32 January is 1 February */
    CHECK_EQUAL(cmos_get(rig.bus, 8), 0x02);
    rig_down(&rig);
}

/* The notice before an update, and that a guest too slow for it still reads one consistent time. */
static void test_cmos_update(void)
{
    struct rig rig;
    cmos_rig(&rig, 64 << 20, 0);
    static const struct tm eve = {
        .tm_sec = 59, .tm_min = 59, .tm_hour = 23, .tm_mday = 31, .tm_mon = 11, .tm_year = 99};
    bool seen = false;
    for (int attempt = 0; attempt < 10 && !seen; attempt++) { /* a busy machine may sleep through it */
        clock_set(rig.bus, &eve);
        time_t start = time(NULL);
        while (time(NULL) - start < 2) {
            if (!(cmos_get(rig.bus, 0x0a) & 0x80))
                continue;
            if (cmos_get(rig.bus, 0) == 0x59) { /* the picture is of before, and good for a second */
                sleep_ms(5);
                CHECK_EQUAL(cmos_get(rig.bus, 2), 0x59);
                CHECK_EQUAL(cmos_get(rig.bus, 9), 0x99);
                CHECK_EQUAL(cmos_get(rig.bus, 0x32), 0x19);
                CHECK_EQUAL(cmos_get(rig.bus, 0x0a), 0x26); /* not stuck; and a new picture */
                CHECK_EQUAL(cmos_get(rig.bus, 2), 0x00);
                CHECK_EQUAL(cmos_get(rig.bus, 9), 0x00);
                CHECK_EQUAL(cmos_get(rig.bus, 0x32), 0x20);
                CHECK_EQUAL(cmos_get(rig.bus, 0), 0x00);
                CHECK_EQUAL(cmos_get(rig.bus, 6), 0x07); /* 1 January 2000 was a Saturday */
                seen = true;
            }
            break;
        }
    }
    CHECK(seen);

    /* One that only ever looks at the minutes is not shown an old picture. */
    clock_set(rig.bus, &eve);
    CHECK_EQUAL(cmos_get(rig.bus, 2), 0x59);
    sleep_ms(1100);
    CHECK_EQUAL(cmos_get(rig.bus, 2), 0x00);
    rig_down(&rig);
}

static void test_cmos_memory(void)
{
    static const uint64_t mib = 1 << 20, gib = 1 << 30;
    static const struct {
        uint64_t below, above;
        uint32_t base, extended, above_16m, above_4g;
    } cases[] = {{0, 0, 0, 0, 0, 0},
                 {64 * 1024, 0, 64, 0, 0, 0},
                 {1 * mib, 0, 640, 0, 0, 0},
                 {1 * mib + 4096, 0, 640, 4, 0, 0},
                 {16 * mib, 0, 640, 15 * 1024, 0, 0},
                 {128 * mib, 0, 640, 0xffff, 112 * 16, 0},
                 {3 * gib, 0, 640, 0xffff, 3056 * 16, 0},
                 {4 * gib, 0, 640, 0xffff, 4080 * 16, 0},
                 {3 * gib, 1 * gib, 640, 0xffff, 3056 * 16, 0x4000},
                 {3 * gib, 0x10000 * gib, 640, 0xffff, 3056 * 16, 0xffffff}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct rig rig;
        cmos_rig(&rig, cases[i].below, cases[i].above);
        CHECK_EQUAL(cmos_get(rig.bus, 0x15) | cmos_get(rig.bus, 0x16) << 8, cases[i].base);
        CHECK_EQUAL(cmos_get(rig.bus, 0x17) | cmos_get(rig.bus, 0x18) << 8, cases[i].extended);
        CHECK_EQUAL(cmos_get(rig.bus, 0x30) | cmos_get(rig.bus, 0x31) << 8, cases[i].extended);
        CHECK_EQUAL(cmos_get(rig.bus, 0x34) | cmos_get(rig.bus, 0x35) << 8, cases[i].above_16m);
        CHECK_EQUAL(cmos_get(rig.bus, 0x5b) | cmos_get(rig.bus, 0x5c) << 8 | cmos_get(rig.bus, 0x5d) << 16,
                    cases[i].above_4g);
        uint32_t sum = 0;
        for (uint8_t cell = 0x10; cell <= 0x2d; cell++)
            sum += cmos_get(rig.bus, cell);
        CHECK_EQUAL(cmos_get(rig.bus, 0x2e) << 8 | cmos_get(rig.bus, 0x2f), sum);
        rig_down(&rig);
    }

    /* All that is neither time nor status is memory. */
    struct rig rig;
    cmos_rig(&rig, 64 << 20, 0);
    for (int pass = 0; pass < 2; pass++) {
        for (int cell = 0; cell < 128; cell++) {
            bool alarm = cell == 1 || cell == 3 || cell == 5;
            if ((cell < 0x0e && !alarm) || cell == 0x32)
                continue;
            if (pass == 0)
                cmos_set(rig.bus, (uint8_t)cell, (uint8_t)~cell);
            else
                CHECK_EQUAL(cmos_get(rig.bus, (uint8_t)cell), (uint8_t)~cell);
        }
    }
    rig_down(&rig);
}

/* ------------------------------------------------------------------------------------- a PC's other devices -- */

static uint32_t in_wide(struct pyhv_bus *bus, uint16_t port, uint32_t size)
{
    uint8_t data[4] = {0};
    CHECK_EQUAL(pyhv_bus_port_io(bus, port, 0, size, 1, data), PYHV_ACTION_NONE);
    return data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
}

static int out_wide(struct pyhv_bus *bus, uint16_t port, uint32_t size, uint32_t value)
{
    uint8_t data[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    return pyhv_bus_port_io(bus, port, 1, size, 1, data);
}

#define PM 0x600

static void test_acpi_pm(void)
{
    enum { EN = 2, CNT = 4, TMR = 8, GPE_STS = 0xc, GPE_EN = 0xd };
    static const struct step steps[] = {
        /* nothing is pending; ACPI mode is on and stays on; reserved bits read 0 */
        R(0, 0, 0), R(1, 0, 0), W(0, 0xff, 0), W(1, 0xff, 0), R(0, 0, 0), R(1, 0, 0), R(CNT, 0x01, 0), W(CNT, 0xfe, 0),
        R(CNT, 0x03, 0), W(CNT, 0, 0), R(CNT, 0x01, 0), W(EN, 0xff, 0), R(EN, 0x21, 0), W(EN + 1, 0xff, 0),
        R(EN + 1, 0x07, 0), R(EN, 0x21, 0),
        /* SLP_TYP is kept, SLP_EN is not; only type 0 is a sleeping state */
        W(CNT + 1, 0x1c, 0), R(CNT + 1, 0x1c, 0), W(CNT + 1, 0x3c, 0), R(CNT + 1, 0x1c, 0), W(CNT + 1, 0x24, 0),
        W(CNT, 0xff, 0), WA(CNT + 1, 0x20, PYHV_ACTION_POWER_OFF), R(CNT + 1, 0, 0),
        /* nobody's ports */
        R(6, 0, 0), R(7, 0, 0), R(0xe, 0, 0), R(0xf, 0, 0), W(0xe, 0xff, 0), R(0xe, 0, 0)};
    struct rig rig;
    rig_up(&rig, pyhv_acpi_pm_create(PM, 9, &error));
    PLAY("acpi_pm", &rig, PM, steps);
    CHECK_EQUAL(in_wide(rig.bus, PM, 4), 0x07210000);
    CHECK_EQUAL(in_wide(rig.bus, PM + CNT, 2), 0x0003);
    /* How kernels without an interpreter switch such a machine off. */
    CHECK_EQUAL(out_wide(rig.bus, PM + CNT, 2, 0x2000), PYHV_ACTION_POWER_OFF);
    CHECK_EQUAL(out_wide(rig.bus, PM + CNT, 2, 0x2400), PYHV_ACTION_NONE);
    CHECK_EQUAL(out_wide(rig.bus, PM + EN, 4, 0x20000000), PYHV_ACTION_POWER_OFF);

    /* An event raises the line where it is enabled, and writing its bit lowers it. */
    pyhv_acpi_pm_event(rig.device, 3);
    static const struct step events[] = {R(GPE_STS, 0x08, 0), W(GPE_EN, 0x09, 1),  R(GPE_EN, 0x09, 1),
                                         W(GPE_STS, 0x01, 1), R(GPE_STS, 0x08, 1), W(GPE_STS, 0x08, 0),
                                         R(GPE_STS, 0, 0)};
    PLAY("events", &rig, PM, events);
    pyhv_acpi_pm_event(rig.device, 0);
    CHECK_EQUAL(atomic_load(&rig.line.level), 1);
    CHECK_EQUAL(atomic_load(&rig.line.gsi), 9);
    CHECK_EQUAL(out(rig.bus, PM + GPE_EN, 0), PYHV_ACTION_NONE);
    CHECK_EQUAL(atomic_load(&rig.line.level), 0);

    /* The timer: never back, and as far ahead as it is told. */
    uint32_t before = in_wide(rig.bus, PM + TMR, 4), after = in_wide(rig.bus, PM + TMR, 4);
    CHECK(after - before < UINT32_C(1) << 31);
    pyhv_acpi_pm_advance(rig.device, UINT64_C(100000000000)); /* 100 s */
    uint32_t ahead = in_wide(rig.bus, PM + TMR, 4) - after;
    CHECK(ahead >= 357954500 && ahead < 357954500 + 60 * 3579545);
    struct timespec pause = {.tv_nsec = 20000000};
    before = in_wide(rig.bus, PM + TMR, 4);
    nanosleep(&pause, NULL);
    CHECK(in_wide(rig.bus, PM + TMR, 4) - before >= 71590);
    rig_down(&rig);
}

static void test_chipset(void)
{
    struct rig rig;
    rig_up(&rig, pyhv_chipset_create(&error));
    /* Linux, pci_check_type1: the address comes back. */
    CHECK_EQUAL(in_wide(rig.bus, 0xcf8, 4), 0);
    CHECK_EQUAL(out_wide(rig.bus, 0xcf8, 4, 0x80000000), PYHV_ACTION_NONE);
    CHECK_EQUAL(in_wide(rig.bus, 0xcf8, 4), 0x80000000);
    CHECK_EQUAL(in_wide(rig.bus, 0xcfc, 4), UINT32_MAX);
    CHECK_EQUAL(in_wide(rig.bus, 0xcfe, 2), 0xffff);
    CHECK_EQUAL(in(rig.bus, 0xcff), 0xff);
    CHECK_EQUAL(out_wide(rig.bus, 0xcfc, 4, 0xffffffff), PYHV_ACTION_NONE);
    CHECK_EQUAL(out_wide(rig.bus, 0xcf8, 4, 0xffffffff), PYHV_ACTION_NONE); /* touches 0xcf9, but not by a byte */
    CHECK_EQUAL(in_wide(rig.bus, 0xcf8, 4), 0x80fffffc);
    CHECK_EQUAL(out_wide(rig.bus, 0xcf8, 2, 0x0600), PYHV_ACTION_NONE); /* nor is this the address register */
    CHECK_EQUAL(out(rig.bus, 0xcfb, 0x01), PYHV_ACTION_NONE);
    CHECK_EQUAL(in_wide(rig.bus, 0xcf8, 4), 0x80fffffc);
    CHECK_EQUAL(in_wide(rig.bus, 0xcf8, 2), 0xffff);
    /* The reset control register as Linux uses it. */
    CHECK_EQUAL(in(rig.bus, 0xcf9), 0);
    CHECK_EQUAL(out(rig.bus, 0xcf9, 0x02), PYHV_ACTION_NONE);
    CHECK_EQUAL(out(rig.bus, 0xcf9, 0x06), PYHV_ACTION_RESET);
    CHECK_EQUAL(in(rig.bus, 0x92), 0x02);
    CHECK_EQUAL(out(rig.bus, 0x92, 0x02), PYHV_ACTION_NONE);
    CHECK_EQUAL(out(rig.bus, 0x92, 0x03), PYHV_ACTION_RESET);
    rig_down(&rig);
}

static void test_pvpanic(void)
{
    struct rig rig;
    rig_up(&rig, pyhv_pvpanic_create(0x505, &error));
    CHECK_EQUAL(in(rig.bus, 0x505), 0x01);
    CHECK_EQUAL(out(rig.bus, 0x505, 0x02), PYHV_ACTION_NONE);
    CHECK_EQUAL(out(rig.bus, 0x505, 0x01), PYHV_ACTION_PANIC);
    rig_down(&rig);
}

static void test_vmgenid(void)
{
    struct rig rig;
    uint8_t state[PYHV_DEVICE_STATE_MAX];
    rig_up(&rig, pyhv_vmgenid_create(0x123456789000, &error));
    CHECK_EQUAL(pyhv_vmgenid_address(rig.device), 0x123456789000);
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), 9);
    CHECK(memcmp(state, (uint8_t[]){1, 0, 0x90, 0x78, 0x56, 0x34, 0x12, 0, 0}, 9) == 0);
    CHECK_EQUAL(pyhv_device_load(rig.device, (uint8_t[]){1, 8, 0, 0, 0, 0, 0, 0, 0}, 9, &error), 0);
    CHECK_EQUAL(pyhv_vmgenid_address(rig.device), 8);
    CHECK_EQUAL(pyhv_device_load(rig.device, (uint8_t[]){1, 4, 0, 0, 0, 0, 0, 0, 0}, 9, &error), -1);
    CHECK(strstr(error.detail, "0x4 is not a multiple") != NULL);
    rig_down(&rig);
}

#define SELECTOR 0x510
#define DATA     0x511

static void test_fw_cfg(void)
{
    struct rig rig;
    uint8_t bytes[6] = {0};
    rig_up(&rig, pyhv_fw_cfg_create(&error));
    CHECK_EQUAL(in(rig.bus, DATA), 0);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 5, (const uint8_t *)"ab", 2, &error), 0);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 0, (const uint8_t *)"QEMU", 4, &error), 0);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 0xffff, (const uint8_t *)"z", 1, &error), 0);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 3, NULL, 0, &error), 0);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 5, (const uint8_t *)"c", 1, &error), -1);
    CHECK_EQUAL(error.errnum, EEXIST);

    /* Item 0 was selected all the time; past an item's end there are zeros. */
    CHECK_EQUAL(pyhv_bus_port_io(rig.bus, DATA, 0, 1, 6, bytes), PYHV_ACTION_NONE);
    CHECK(memcmp(bytes, "QEMU\0\0", 6) == 0);
    static const struct {
        uint16_t key;
        const char *bytes;
    } items[] = {{5, "ab"}, {3, ""}, {4, ""}, {0xffff, "z"}, {0xfffe, ""}, {0, "QEMU"}};
    for (size_t i = 0; i < sizeof items / sizeof items[0]; i++) {
        CHECK_EQUAL(out_wide(rig.bus, SELECTOR, 2, items[i].key), PYHV_ACTION_NONE);
        for (const char *expected = items[i].bytes; *expected; expected++)
            CHECK_EQUAL(in(rig.bus, DATA), *expected);
        CHECK_EQUAL(in(rig.bus, DATA), 0);
    }
    /* Nothing can be written, and other widths do nothing. */
    CHECK_EQUAL(out_wide(rig.bus, SELECTOR, 2, 5), PYHV_ACTION_NONE);
    CHECK_EQUAL(out(rig.bus, DATA, 'x'), PYHV_ACTION_NONE);
    CHECK_EQUAL(out(rig.bus, SELECTOR, 0), PYHV_ACTION_NONE);
    CHECK_EQUAL(in_wide(rig.bus, SELECTOR, 2), 0xffff);
    CHECK_EQUAL(in(rig.bus, SELECTOR), 0xff);
    CHECK_EQUAL(in_wide(rig.bus, DATA, 2), 0xff00 | 'a');
    CHECK_EQUAL(out_wide(rig.bus, SELECTOR, 4, 0), PYHV_ACTION_NONE);
    CHECK_EQUAL(in(rig.bus, DATA), 'b');
    rig_down(&rig);

    /* As much as fits, to the byte; and then its state can still be saved. */
    static uint8_t large[PYHV_FW_CFG_MAX], state[PYHV_DEVICE_STATE_MAX];
    rig_up(&rig, pyhv_fw_cfg_create(&error));
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 1, large, PYHV_FW_CFG_MAX - 3, &error), -1);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 1, large, SIZE_MAX - 2, &error), -1);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 1, large, PYHV_FW_CFG_MAX - 9, &error), 0);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 2, large, 2, &error), -1);
    CHECK_EQUAL(error.errnum, ENOSPC);
    CHECK_EQUAL(pyhv_fw_cfg_add(rig.device, 0, (const uint8_t *)"!", 1, &error), 0);
    CHECK_EQUAL(in(rig.bus, DATA), '!');
    int64_t size = pyhv_device_save(rig.device, state, sizeof state, &error);
    CHECK_EQUAL(size, 9 + PYHV_FW_CFG_MAX);
    CHECK_EQUAL(pyhv_device_load(rig.device, state, (size_t)size, &error), 0);
    CHECK_EQUAL(pyhv_device_load(rig.device, state, (size_t)size + 1, &error), -1);
    rig_down(&rig);

    /* The layout of a state, and states that cannot be. */
    rig_up(&rig, pyhv_fw_cfg_create(&error));
    uint8_t good[] = {1, 7, 0, 1, 0, 0, 0, 2, 0, 3, 0, 1, 0, 'x', 7, 0, 2, 0, 'y', 'z'};
    CHECK_EQUAL(pyhv_device_load(rig.device, good, sizeof good, &error), 0);
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), sizeof good);
    CHECK(memcmp(state, good, sizeof good) == 0);
    CHECK_EQUAL(in(rig.bus, DATA), 'z');
    static const struct {
        size_t at;
        uint8_t value;
        const char *because;
    } bad[] = {{7, 3, "2 items, not 3"},       {9, 7, "item 1, key 0x7, is out of order"},
               {9, 8, "out of order"},         {11, 9, "item 0 is cut short"},
               {16, 3, "item 1 is cut short"}, {16, 1, "item 2 is cut short"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memcpy(state, good, sizeof good);
        state[bad[i].at] = bad[i].value;
        CHECK_EQUAL(pyhv_device_load(rig.device, state, sizeof good, &error), -1);
        if (!strstr(error.detail, bad[i].because)) {
            CHECK(!"the reason");
            fprintf(stderr, "  case %zu: \"%s\"\n", i, error.detail);
        }
    }
    rig_down(&rig);
}

/* ------------------------------------------------------------------------------------------- saved states -- */

enum { CMOS = 3, ACPI_PM = 4, VMGENID = 7, FW_CFG = 8, DEVICES = 9 };

/* The PM timer goes on between two saves: its bytes do not count. */
static bool same_state(int which, const uint8_t *one, const uint8_t *other, size_t size)
{
    enum { TIMER = 5, TIMER_SIZE = 4 };
    if (which != ACPI_PM)
        return memcmp(one, other, size) == 0;
    return memcmp(one, other, TIMER) == 0 &&
           memcmp(one + TIMER + TIMER_SIZE, other + TIMER + TIMER_SIZE, size - TIMER - TIMER_SIZE) == 0;
}

static struct pyhv_device *any_device(int which)
{
    switch (which) {
    case 0:
        return pyhv_uart16550_create(COM1, 4, -1, -1, &error);
    case 1:
        return pyhv_debug_exit_create(0xf4, &error);
    case 2:
        return pyhv_i8042_create(&error);
    case CMOS:
        return pyhv_cmos_create(64 << 20, 0, &error);
    case ACPI_PM:
        return pyhv_acpi_pm_create(PM, 9, &error);
    case 5:
        return pyhv_chipset_create(&error);
    case 6:
        return pyhv_pvpanic_create(0x505, &error);
    case VMGENID:
        return pyhv_vmgenid_create(0xe0000, &error);
    default: {
        struct pyhv_device *fw_cfg = pyhv_fw_cfg_create(&error);
        CHECK_EQUAL(pyhv_fw_cfg_add(fw_cfg, 0, (const uint8_t *)"QEMU", 4, &error), 0);
        CHECK_EQUAL(pyhv_fw_cfg_add(fw_cfg, 5, (const uint8_t *)"\1\0", 2, &error), 0);
        return fw_cfg;
    }
    }
}

/* A random access to the device, biased towards what changes its state. The time registers of the CMOS and the PM timer
 * are left alone: two devices asked one after the other may show two times. */
struct access {
    uint16_t port;
    uint8_t value;
    bool is_write;
    uint8_t size; /* 2, 4: a word or a double word, its other bytes 0 */
};

static struct access random_access(int which, bool *time_selected)
{
    struct access access = {.value = (uint8_t)random32(), .is_write = random32() & 1, .size = 1};
    switch (which) {
    case 0:
        access.port = COM1 + random32() % 8;
        if (random32() % 2) /* all eight bits at random would set DLAB and loopback half of the time */
            access.value &= access.port == COM1 + LCR ? 0x03 : access.port == COM1 + MCR ? 0x1b : 0xff;
        break;
    case 1:
        access.port = 0xf4;
        break;
    case 2:
        access.port = random32() % 2 ? 0x60 : 0x64;
        if (random32() % 2)
            access.value = (uint8_t[]){0x20, 0x60, 0xd0, 0xd1, 0xd2, 0xd3, 0xd4, 0xaa}[random32() % 8];
        break;
    case ACPI_PM:
        access.port = PM + (uint16_t[]){0, 2, 3, 4, 5, 0xc, 0xd, 0xe}[random32() % 8];
        break;
    case 5:
        access.port = random32() % 8 ? 0xcf8 + random32() % 8 : 0x92;
        if (access.port == 0xcf8 && random32() % 4)
            access.size = 4;
        break;
    case 6:
    case VMGENID: /* which has no ports */
        access.port = 0x505;
        break;
    case FW_CFG:
        access.port = random32() % 2 ? SELECTOR : DATA;
        if (access.port == SELECTOR && access.is_write) {
            access.size = 2;
            access.value %= 7;
        }
        break;
    default:
        access.port = random32() % 2 ? 0x70 : 0x71;
        if (access.port == 0x70) {
            uint8_t index = access.value & 0x7f;
            *time_selected = index == 0 || index == 2 || index == 4 || (index >= 6 && index <= 10) || index == 0x32;
            access.is_write = true;
        } else if (*time_selected && !access.is_write) {
            access.port = 0x80;
        }
        break;
    }
    return access;
}

static uint8_t do_access(struct rig *rig, struct access access, int *action)
{
    uint8_t value[4] = {access.value};
    *action = pyhv_bus_port_io(rig->bus, access.port, access.is_write, access.size, 1, value);
    return value[0];
}

/* At many points: saved, loaded into a new device, and from there both do the same. */
static void test_state_round_trip(void)
{
    for (int which = 0; which < DEVICES; which++) {
        for (int round = 0; round < 300; round++) {
            unsigned before = check_failures;
            uint64_t seed = random_state;
            uint8_t state[PYHV_DEVICE_STATE_MAX], again[PYHV_DEVICE_STATE_MAX];
            bool time_selected = true;
            int action, other_action;
            struct rig rig, other;
            rig_up(&rig, any_device(which));
            rig_up(&other, any_device(which));
            for (uint32_t i = random32() % 200; i > 0; i--) {
                do_access(&rig, random_access(which, &time_selected), &action);
                do_access(&other, random_access(which, &time_selected), &action); /* it has a past of its own */
            }
            if (which == CMOS) { /* the same index in both, and not one that shows the time */
                cmos_set(rig.bus, 0x40, 0x11);
                time_selected = false;
            }
            int64_t size = pyhv_device_save(rig.device, state, sizeof state, &error);
            CHECK(size > 0);
            CHECK_EQUAL(pyhv_device_load(other.device, state, (size_t)size, &error), 0);
            CHECK_EQUAL(pyhv_device_save(other.device, again, sizeof again, &error), size);
            CHECK(same_state(which, state, again, (size_t)size));
            CHECK_EQUAL(atomic_load(&other.line.level), atomic_load(&rig.line.level));
            for (int i = 0; i < 100; i++) {
                struct access access = random_access(which, &time_selected);
                CHECK_EQUAL(do_access(&other, access, &other_action), do_access(&rig, access, &action));
                CHECK_EQUAL(other_action, action);
                CHECK_EQUAL(atomic_load(&other.line.level), atomic_load(&rig.line.level));
            }
            if (check_failures != before)
                fprintf(stderr, "  %s, seed 0x%" PRIx64 "\n", pyhv_device_name(rig.device), seed);
            rig_down(&rig);
            rig_down(&other);
            if (check_failures != before)
                return;
        }
    }
}

/* Refused states leave the device as it was: each cut, each extension, each byte changed in each way. */
static void test_state_refused(void)
{
    for (int which = 0; which < DEVICES; which++) {
        for (int used = 0; used < 2; used++) {
            uint8_t good[PYHV_DEVICE_STATE_MAX], bad[PYHV_DEVICE_STATE_MAX], now[PYHV_DEVICE_STATE_MAX];
            unsigned accepted = 0, refused = 0;
            bool time_selected = true;
            int action;
            struct rig rig;
            rig_up(&rig, any_device(which));
            for (int i = 0; used && i < 100; i++)
                do_access(&rig, random_access(which, &time_selected), &action);
            size_t size = (size_t)pyhv_device_save(rig.device, good, sizeof good, &error);

            for (size_t cut = 0; cut < size; cut++)
                CHECK_EQUAL(pyhv_device_load(rig.device, good, cut, &error), -1);
            memcpy(bad, good, size);
            bad[size] = 0;
            CHECK_EQUAL(pyhv_device_load(rig.device, bad, size + 1, &error), -1);
            CHECK_EQUAL(pyhv_device_load(rig.device, bad, sizeof bad, &error), -1);
            CHECK_EQUAL(pyhv_device_load(rig.device, bad, sizeof bad, NULL), -1);
            CHECK_EQUAL(pyhv_device_save(rig.device, now, sizeof now, &error), size);
            CHECK(same_state(which, now, good, size));

            for (size_t at = 0; at < size; at++) {
                for (int value = 0; value < 256; value++) {
                    if (value == good[at])
                        continue;
                    memcpy(bad, good, size);
                    bad[at] = (uint8_t)value;
                    memset(&error, 0, sizeof error);
                    if (pyhv_device_load(rig.device, bad, size, &error) == 0) {
                        accepted++;
                        CHECK_EQUAL(pyhv_device_load(rig.device, good, size, &error), 0);
                    } else {
                        refused++;
                        CHECK(strncmp(error.what, pyhv_device_name(rig.device), strlen(pyhv_device_name(rig.device))) ==
                              0);
                        CHECK(error.detail[0] != '\0');
                    }
                    CHECK_EQUAL(pyhv_device_save(rig.device, now, sizeof now, &error), size);
                    CHECK(same_state(which, now, good, size));
                }
            }
            CHECK(refused >= 255); /* the version at least */
            CHECK(size == 1 || accepted > 255);
            rig_down(&rig);
        }
    }
}

/* The documented layout, byte for byte: other versions of pyhv rely on it. And what is impossible is refused. */
static void test_state_layout(void)
{
    struct rig rig;
    uart_rig(&rig, -1, -1);
    uint8_t state[PYHV_DEVICE_STATE_MAX], expected[50] = {0};
    static const struct step steps[] = {W(LCR, 0x80, 0), W(DLL, 0x22, 0), W(DLM, 0x33, 0), W(LCR, 0x1b, 0),
                                        W(FCR, 0x89, 0), W(SCR, 0x44, 0), W(MCR, 0x10, 0), W(IER, 0x0d, 0),
                                        W(THR, 'p', 0),  W(THR, 'q', 0)};
    PLAY("layout", &rig, COM1, steps);
    memcpy(expected, (uint8_t[]){1, 0x0d, 0x89, 0x1b, 0x10, 0x44, 0x22, 0x33, 0x06, 0x0b, 2, 'p', 'q'}, 13);
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), 46);
    CHECK(memcmp(state, expected, 46) == 0);

    expected[8] = 0x61;                            /* overrun, THR not empty; it polls for input, LSR the last time */
    memcpy(expected + 27, (uint8_t[]){1, 'r'}, 2); /* one held */
    memcpy(expected + 44, (uint8_t[]){4, 0, 'w', 'x', 'y', 'z'}, 6);
    CHECK_EQUAL(pyhv_device_load(rig.device, expected, 50, &error), 0);
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), 50);
    CHECK(memcmp(state, expected, 50) == 0);
    static const struct step after[] = {
        R(IIR, 0xc6, 0), R(LSR, 0x63, 0), /* no output: what waits is dropped at the first look */
        R(RBR, 'p', 0),  R(RBR, 'q', 0),  R(RBR, 0, 0),    W(MCR, 0x08, 1),
        R(IIR, 0xcc, 1), R(RBR, 'r', 1),  R(IIR, 0xc0, 1), R(MSR, 0xbb, 0)};
    PLAY("after load", &rig, COM1, after);

    static const struct {
        size_t at;
        uint8_t value;
        const char *because;
    } bad[] = {
        {0, 2, "version 2"},   {1, 0x10, "IER 0x10"},       {2, 0x88, "FCR 0x88"},    {2, 0x02, "FCR 0x02"},
        {2, 0x91, "FCR 0x91"}, {4, 0x20, "MCR 0x20"},       {8, 0x29, "flags 0x29"},  {8, 0x03, "THR cannot be empty"},
        {9, 0x10, "MSR 0x10"}, {10, 17, "17 bytes"},        {8, 0xc1, "flags 0xc1"},  {27, 17, "17 held"},
        {44, 5, "cut short"},  {44, 3, "1 bytes too many"}, {45, 0x10, "4100 bytes"}, {2, 0x00, "2 bytes received"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        uint8_t broken[50];
        memcpy(broken, expected, sizeof broken);
        broken[bad[i].at] = bad[i].value;
        CHECK_EQUAL(pyhv_device_load(rig.device, broken, sizeof broken, &error), -1);
        CHECK(strcmp(error.what, "uart16550: load") == 0);
        if (!strstr(error.detail, bad[i].because)) {
            CHECK(!"the reason");
            fprintf(stderr, "  case %zu: \"%s\"\n", i, error.detail);
        }
    }
    rig_down(&rig);

    rig_up(&rig, pyhv_i8042_create(&error));
    out(rig.bus, 0x64, 0xaa);
    out(rig.bus, 0x64, 0xd1);
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), 5);
    CHECK(memcmp(state, (uint8_t[]){1, 0x74, 0x55, 0x03, 0xd1}, 5) == 0);
    CHECK_EQUAL(pyhv_device_load(rig.device, (uint8_t[]){1, 0x74, 0x55, 0x07, 0xd1}, 5, &error), -1);
    CHECK_EQUAL(pyhv_device_load(rig.device, (uint8_t[]){1, 0x74, 0x55, 0x01, 0xd1}, 5, &error), -1);
    CHECK_EQUAL(pyhv_device_load(rig.device, (uint8_t[]){1, 0x74, 0x55, 0x03, 0xd5}, 5, &error), -1);
    CHECK_EQUAL(pyhv_device_load(rig.device, (uint8_t[]){1, 0x74, 0x55, 0x03, 0xd1}, 5, &error), 0);
    CHECK_EQUAL(out(rig.bus, 0x60, 0x02), PYHV_ACTION_RESET);
    rig_down(&rig);

    rig_up(&rig, pyhv_debug_exit_create(0xf4, &error));
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), 1);
    CHECK_EQUAL(state[0], 1);
    rig_down(&rig);

    cmos_rig(&rig, 128 << 20, 0);
    cmos_set(rig.bus, 0x40, 0x99);
    CHECK_EQUAL(pyhv_device_save(rig.device, state, sizeof state, &error), 139);
    CHECK(memcmp(state, (uint8_t[]){1, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 11) == 0);
    CHECK_EQUAL(state[11 + 0x40], 0x99);
    state[3] = 0xa0; /* 100,000 seconds later */
    state[4] = 0x86;
    state[5] = 0x01;
    CHECK_EQUAL(pyhv_device_load(rig.device, state, 139, &error), 0);
    time_t now = time(NULL);
    CHECK_CLOSE(clock_shows(rig.bus), now + 100000);
    static const struct {
        size_t at;
        uint8_t value;
    } impossible[] = {{1, 0x80},  {2, 0x01},         {2, 0x02},      {8, 0x01},
                      {10, 0x80}, {11 + 0x0a, 0xa6}, {11 + 0x0c, 1}, {11 + 0x0d, 0}};
    for (size_t i = 0; i < sizeof impossible / sizeof impossible[0]; i++) {
        uint8_t broken[139];
        memcpy(broken, state, sizeof broken);
        broken[impossible[i].at] = impossible[i].value;
        CHECK_EQUAL(pyhv_device_load(rig.device, broken, sizeof broken, &error), -1);
    }
    rig_down(&rig);
}

/* -------------------------------------------------------------------------------------------- concurrency -- */

struct hammer {
    struct pyhv_bus *bus;
    struct pyhv_device **devices;
    _Atomic int *stop;
    _Atomic int *faults;
    uint32_t seed;
};

static void *hammer_ports(void *opaque)
{
    struct hammer *hammer = opaque;
    uint32_t x = hammer->seed;
    uint8_t data[64] = {0};
    for (int i = 0; i < 4000; i++) {
        static const uint16_t ports[] = {COM1, COM1 + 1, COM1 + 2, COM1 + 4, COM1 + 5, 0x60,
                                         0x64, 0x70,     0x71,     0xf4,     0x80};
        x = x * 1664525 + 1013904223;
        data[0] = (uint8_t)(x >> 24);
        uint16_t port = ports[(x >> 8) % 11];
        pyhv_bus_port_io(hammer->bus, port, x >> 7 & 1, 1u << (x >> 5) % 3, 1 + (x >> 12) % 16, data);
        pyhv_bus_exit_status(hammer->bus);
    }
    return NULL;
}

static void *hammer_states(void *opaque)
{
    struct hammer *hammer = opaque;
    uint8_t state[PYHV_DEVICE_STATE_MAX];
    for (int i = 0; !atomic_load(hammer->stop); i++) {
        struct pyhv_device *device = hammer->devices[i % DEVICES];
        int64_t size = pyhv_device_save(device, state, sizeof state, NULL);
        if (size <= 0 || pyhv_device_load(device, state, (size_t)size, NULL) != 0)
            atomic_fetch_add(hammer->faults, 1);
        pyhv_bus_flush(hammer->bus);
    }
    return NULL;
}

static void *read_all(void *opaque)
{
    uint8_t buffer[4096];
    while (read(*(int *)opaque, buffer, sizeof buffer) > 0)
        ;
    return NULL;
}

/* Not much to check but that it ends, and that the sanitizers are content. */
static void test_concurrency(void)
{
    int input[2], output[2];
    _Atomic int stop = 0, faults = 0;
    struct line line = {0};
    struct pyhv_device *devices[DEVICES];
    pthread_t threads[3], states, reader;
    struct hammer hammers[4];
    struct pump pump;
    CHECK_EQUAL(pipe(input), 0);
    CHECK_EQUAL(pipe(output), 0);
    struct pyhv_bus *bus = pyhv_bus_create(&error);
    pyhv_bus_set_irq_sink(bus, (struct pyhv_irq_sink){.raise = line_raise, .opaque = &line});
    for (int i = 0; i < DEVICES; i++) {
        devices[i] = i ? any_device(i) : pyhv_uart16550_create(COM1, 4, input[0], output[1], &error);
        CHECK_EQUAL(pyhv_bus_attach(bus, devices[i], &error), 0);
    }
    pthread_create(&reader, NULL, read_all, &output[0]);
    pump_start(&pump, devices[0]);
    for (uint32_t i = 0; i < 4; i++)
        hammers[i] = (struct hammer){.bus = bus, .devices = devices, .stop = &stop, .faults = &faults, .seed = i + 1};
    for (int i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, hammer_ports, &hammers[i]);
    pthread_create(&states, NULL, hammer_states, &hammers[3]);
    for (int i = 0; i < 200; i++) {
        CHECK_EQUAL(write(input[1], "typed", 5), 5);
        sleep_ms(1);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    atomic_store(&stop, 1);
    pthread_join(states, NULL);
    pump_stop(&pump);
    CHECK_EQUAL(faults, 0);
    CHECK_EQUAL(line.faults, 0);
    pyhv_bus_destroy(bus);
    close(output[1]);
    pthread_join(reader, NULL);
    close(output[0]);
    close(input[0]);
    close(input[1]);
}

/* ------------------------------------------------------------------------------------------------- errors -- */

static void test_errors(void)
{
    char guard[sizeof(struct pyhv_error) + 1];
    struct pyhv_error *problem = (struct pyhv_error *)guard;
    memset(guard, 0x55, sizeof guard);
    errno = EAGAIN;
    CHECK_EQUAL(pyhv_fail(problem, 5, "what", "%d and %s", 7, "seven"), -1);
    CHECK_EQUAL(errno, EAGAIN);
    CHECK_EQUAL(problem->errnum, 5);
    CHECK(strcmp(problem->what, "what") == 0 && strcmp(problem->detail, "7 and seven") == 0);
    CHECK_EQUAL(pyhv_fail(problem, 0, "other", NULL), -1);
    CHECK(problem->errnum == 0 && problem->detail[0] == '\0');
    CHECK_EQUAL(pyhv_fail_errno(problem, "read"), -1);
    CHECK(problem->errnum == EAGAIN && strcmp(problem->what, "read") == 0 && problem->detail[0] == '\0');
    char longer[400];
    memset(longer, 'l', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    pyhv_fail(problem, 1, longer, "%s", longer);
    CHECK(strlen(problem->what) == sizeof problem->what - 1 && strlen(problem->detail) == sizeof problem->detail - 1);
    CHECK_EQUAL(guard[sizeof guard - 1], 0x55);
    CHECK_EQUAL(pyhv_fail(NULL, 1, "what", "%d", 1), -1);
    CHECK_EQUAL(pyhv_fail_errno(NULL, "what"), -1);
}

/* --------------------------------------------------------------------------------------------------- main -- */

static const char *running;

/* A device that hangs is a failure that must name itself. */
static void hangs(int signal)
{
    (void)signal;
    ssize_t ignored = write(STDERR_FILENO, "HANGS: ", 7);
    ignored = write(STDERR_FILENO, running, strlen(running));
    ignored = write(STDERR_FILENO, "\n", 1);
    (void)ignored;
    _exit(1);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
#define TEST(name) {#name, test_##name}
        TEST(errors),
        TEST(bus_unclaimed),
        TEST(bus_splits),
        TEST(bus_neighbours),
        TEST(bus_attach),
        TEST(bus_names),
        TEST(bus_repeat),
        TEST(bus_state_codec),
        TEST(bus_sink),
        TEST(debug_exit),
        TEST(uart_registers),
        TEST(uart_linux_autoconfig),
        TEST(uart_linux_transmit),
        TEST(uart_modem),
        TEST(uart_loopback),
        TEST(uart_fifo),
        TEST(uart_output_writes),
        TEST(uart_blocked_output),
        TEST(uart_unblocked_output),
        TEST(uart_partial_output),
        TEST(uart_pending_goes_on),
        TEST(uart_pending_moves),
        TEST(uart_two_writers),
        TEST(uart_broken_output),
        TEST(uart_output_to_file),
        TEST(uart_kept_output),
        TEST(uart_input_set_later),
        TEST(uart_pump),
        TEST(uart_pump_stop),
        TEST(uart_input_waits_for_the_guest),
        TEST(uart_input_for_a_guest_that_polls),
        TEST(uart_a_writer_beside_one_who_looks),
        TEST(uart_pump_by_edges),
        TEST(i8042),
        TEST(cmos_clock),
        TEST(cmos_status),
        TEST(cmos_update),
        TEST(cmos_memory),
        TEST(acpi_pm),
        TEST(chipset),
        TEST(pvpanic),
        TEST(vmgenid),
        TEST(fw_cfg),
        TEST(state_round_trip),
        TEST(state_refused),
        TEST(state_layout),
        TEST(concurrency),
#undef TEST
    };
    /* `test_devices [NAME [SEED]]` */
    if (argc > 2)
        random_state = strtoull(argv[2], NULL, 0);
    struct sigaction kick = {.sa_handler = nothing}; /* no SA_RESTART, as the run loop has it */
    sigaction(SIGUSR1, &kick, NULL);
    signal(SIGALRM, hangs);
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        if (argc > 1 && strcmp(argv[1], tests[i].name) != 0)
            continue;
        unsigned before = check_failures;
        running = tests[i].name;
        alarm(30);
        tests[i].run();
        if (check_failures != before)
            fprintf(stderr, "FAILED: %s\n", tests[i].name);
    }
    return check_report("devices");
}

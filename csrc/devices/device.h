/* SPDX-License-Identifier: MIT
 *
 * What a device is, seen from inside the engine. pyhv.h shows the outside.
 *
 * A device embeds struct pyhv_device as its first member, is made by pyhv_device_create() and hands out a pointer to
 * that. The functions in bus.c that work on any device take the device's lock around every operation, so an operation
 * never runs twice at once for one device. An operation that must sleep (the UART's output) gives the lock back
 * while it sleeps: its file says what the others can see then.
 */
#ifndef PYHV_DEVICES_DEVICE_H
#define PYHV_DEVICES_DEVICE_H

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "pyhv.h"

/* ------------------------------------------------------------------------------------------- saved state -- */

/* Writes little-endian fields into a buffer. What does not fit is counted but not written. */
struct pyhv_writer {
    uint8_t *buffer;
    size_t capacity;
    size_t size; /* bytes that the fields so far take, even where that is more than `capacity` */
};

static inline void pyhv_put_bytes(struct pyhv_writer *out, const void *bytes, size_t count)
{
    if (out->size <= out->capacity && count <= out->capacity - out->size)
        memcpy(out->buffer + out->size, bytes, count);
    out->size += count;
}

static inline void pyhv_put_int(struct pyhv_writer *out, uint64_t value, unsigned bytes)
{
    uint8_t field[8];
    for (unsigned i = 0; i < bytes; i++)
        field[i] = (uint8_t)(value >> (8 * i));
    pyhv_put_bytes(out, field, bytes);
}

/* Reads them back. A read past the end gives zeros and makes `truncated` stick. */
struct pyhv_reader {
    const uint8_t *at;
    size_t left;
    bool truncated;
};

static inline void pyhv_get_bytes(struct pyhv_reader *in, void *bytes, size_t count)
{
    if (count > in->left) {
        memset(bytes, 0, count);
        in->left = 0;
        in->truncated = true;
        return;
    }
    if (count == 0) /* `at` may be NULL then */
        return;
    memcpy(bytes, in->at, count);
    in->at += count;
    in->left -= count;
}

static inline uint64_t pyhv_get_int(struct pyhv_reader *in, unsigned bytes)
{
    uint8_t field[8];
    uint64_t value = 0;
    pyhv_get_bytes(in, field, bytes);
    for (unsigned i = 0; i < bytes; i++)
        value |= (uint64_t)field[i] << (8 * i);
    return value;
}

/* ------------------------------------------------------------------------------------------------ devices -- */

struct pyhv_device_ops {
    const char *name;
    size_t size;           /* of the struct that embeds the device */
    uint8_t state_version; /* the first byte of the saved state; bus.c writes and checks it */

    /* The widest access that read and write take in one piece: 1, 2 or 4 bytes. The bus splits wider ones, and those
     * that leave the device's ports, into bytes at consecutive ports. */
    uint32_t max_access;

    /* `offset` counts from the first port of the device's first range. `size` <= max_access. */
    uint32_t (*read)(struct pyhv_device *device, uint32_t offset, uint32_t size);
    enum pyhv_action (*write)(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value);

    /* Optional: `count` bytes written to one port by REP OUTSB. Without it each goes through write. */
    enum pyhv_action (*write_string)(struct pyhv_device *device, uint32_t offset, const uint8_t *bytes, uint32_t count);

    /* Optional: see pyhv_bus_flush(). */
    void (*flush)(struct pyhv_device *device);

    /* The state behind the version byte; both or, without any, neither. load must leave the device alone unless all of
     * it is good, and takes exactly what is there: it fails on bytes left over. */
    void (*save)(struct pyhv_device *device, struct pyhv_writer *out);
    int (*load)(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error);

    /* Optional: gives back what the device has besides its own memory. */
    void (*release)(struct pyhv_device *device);
};

/* Ports first .. last. A device may have ports that are not next to each other: the keyboard controller has
 * 0x60 and 0x64, and 0x61 in between belongs to the PIT and the speaker. */
struct pyhv_port_range {
    uint16_t first;
    uint16_t last;
};

#define PYHV_DEVICE_MAX_RANGES 2

struct pyhv_device {
    const struct pyhv_device_ops *ops;
    struct pyhv_port_range ranges[PYHV_DEVICE_MAX_RANGES]; /* ascending */
    uint32_t range_count;
    pthread_mutex_t lock;

    /* The device's interrupt line, if it has one: see pyhv_device_set_irq(). */
    struct pyhv_irq_sink sink;
    uint32_t gsi;
    int32_t irq_level;
};

/* Makes a device, zeroed but for its base, with `count` ports from `first` on; NULL with an error. */
struct pyhv_device *pyhv_device_create(const struct pyhv_device_ops *ops, uint16_t first, uint32_t count,
                                       struct pyhv_error *error);

/* Adds `count` ports from `first` on, if any. Fails where they run past port 0xffff. */
int pyhv_device_add_ports(struct pyhv_device *device, uint16_t first, uint32_t count, struct pyhv_error *error);

/* Drives the device's interrupt line; tells the sink only when the level changes. With the lock held: that keeps the
 * changes in order. The sink must therefore not call back into a device. */
void pyhv_device_set_irq(struct pyhv_device *device, int32_t level);

/* ops->load ends with this: -1 with an error that names the device. */
int pyhv_device_refuse_state(struct pyhv_device *device, struct pyhv_error *error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* ---------------------------------------------------------------------------------------------------- bus -- */

/* Sends what a kick made a device keep. The run loop calls it when a run begins, after it has set pyhv_cancel and
 * before the guest executes anything. Blocks as the guest's own write would have, until all is out or the thread is
 * asked to stop. Without it a guest that sleeps until its UART reports an empty transmitter would sleep for good: no
 * port access of its own would ever get the output going again. Any thread; cheap when there is nothing to do. */
void pyhv_bus_flush(struct pyhv_bus *bus);

#endif

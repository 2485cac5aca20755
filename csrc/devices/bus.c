/* SPDX-License-Identifier: MIT
 *
 * The I/O port bus, and what all devices have in common.
 *
 * The bus is a short sorted list of port ranges. It is complete before the first vCPU runs and does not change after
 * that, so lookups need no lock; each device has a lock of its own.
 *
 * An access wider than the device takes becomes byte accesses at consecutive ports, low byte first, as the
 * bus controller of a PC makes them for 8-bit cards. An access may so begin in one device and end in another or
 * in none. The processor's port space ends at 0xffff (SDM Vol. 1, "I/O Port Addressing"): bytes beyond it are
 * unclaimed.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "cancel.h"
#include "devices/device.h"
#include "error.h"

_Thread_local const _Atomic int *pyhv_cancel;

/* ------------------------------------------------------------------------------------------------ devices -- */

struct pyhv_device *pyhv_device_create(const struct pyhv_device_ops *ops, uint16_t first, uint32_t count,
                                       struct pyhv_error *error)
{
    struct pyhv_device *device = calloc(1, ops->size);
    if (!device) {
        pyhv_fail(error, ENOMEM, ops->name, NULL);
        return NULL;
    }
    device->ops = ops;
    int errnum = pthread_mutex_init(&device->lock, NULL);
    if (errnum) {
        pyhv_fail(error, errnum, "pthread_mutex_init", "for %s", ops->name);
        free(device);
        return NULL;
    }
    if (pyhv_device_add_ports(device, first, count, error) < 0) {
        pthread_mutex_destroy(&device->lock);
        free(device);
        return NULL;
    }
    return device;
}

int pyhv_device_add_ports(struct pyhv_device *device, uint16_t first, uint32_t count, struct pyhv_error *error)
{
    if (count == 0)
        return 0;
    if (count - 1 > 0xffffu - first)
        return pyhv_fail(error, EINVAL, device->ops->name, "%u ports from 0x%x on: the last port is 0xffff", count,
                         first);
    device->ranges[device->range_count++] =
        (struct pyhv_port_range){.first = first, .last = (uint16_t)(first + count - 1)};
    return 0;
}

void pyhv_device_set_irq(struct pyhv_device *device, int32_t level)
{
    if (device->irq_level == level)
        return;
    device->irq_level = level;
    if (device->sink.raise)
        device->sink.raise(device->sink.opaque, device->gsi, level);
}

int pyhv_device_refuse_state(struct pyhv_device *device, struct pyhv_error *error, const char *format, ...)
{
    char what[sizeof error->what], detail[sizeof error->detail];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    snprintf(what, sizeof what, "%s: load", device->ops->name);
    return pyhv_fail(error, 0, what, "%s", detail);
}

const char *pyhv_device_name(const struct pyhv_device *device)
{
    return device->ops->name;
}

int64_t pyhv_device_save(struct pyhv_device *device, uint8_t *buffer, size_t capacity, struct pyhv_error *error)
{
    struct pyhv_writer out = {.buffer = buffer, .capacity = capacity};
    pthread_mutex_lock(&device->lock);
    pyhv_put_int(&out, device->ops->state_version, 1);
    if (device->ops->save)
        device->ops->save(device, &out);
    pthread_mutex_unlock(&device->lock);
    if (out.size <= capacity)
        return (int64_t)out.size;

    char what[sizeof error->what];
    snprintf(what, sizeof what, "%s: save", device->ops->name);
    return pyhv_fail(error, ENOSPC, what, "%zu bytes of state, room for %zu", out.size, capacity);
}

int pyhv_device_load(struct pyhv_device *device, const uint8_t *buffer, size_t size, struct pyhv_error *error)
{
    struct pyhv_reader in = {.at = buffer, .left = size};
    uint8_t version = (uint8_t)pyhv_get_int(&in, 1);
    if (in.truncated)
        return pyhv_device_refuse_state(device, error, "the state is empty");
    if (version != device->ops->state_version)
        return pyhv_device_refuse_state(device, error, "the state has version %u, this pyhv reads version %u", version,
                                        device->ops->state_version);
    if (!device->ops->load)
        return in.left ? pyhv_device_refuse_state(device, error, "%zu bytes too many", in.left) : 0;
    pthread_mutex_lock(&device->lock);
    int result = device->ops->load(device, &in, error);
    pthread_mutex_unlock(&device->lock);
    return result;
}

void pyhv_device_destroy(struct pyhv_device *device)
{
    if (!device)
        return;
    if (device->ops->release)
        device->ops->release(device);
    pthread_mutex_destroy(&device->lock);
    free(device);
}

/* ---------------------------------------------------------------------------------------------------- bus -- */

#define NO_EXIT_STATUS (-1)

struct claim {
    struct pyhv_port_range ports;
    struct pyhv_device *device;
};

struct pyhv_bus {
    uint32_t device_count;
    uint32_t claim_count;
    struct pyhv_device *devices[PYHV_BUS_MAX_DEVICES];
    struct claim claims[PYHV_BUS_MAX_DEVICES * PYHV_DEVICE_MAX_RANGES]; /* ascending, disjoint */
    struct pyhv_irq_sink sink;
    _Atomic int exit_status; /* NO_EXIT_STATUS, or the first one written */
};

struct pyhv_bus *pyhv_bus_create(struct pyhv_error *error)
{
    struct pyhv_bus *bus = calloc(1, sizeof *bus);
    if (!bus) {
        pyhv_fail(error, ENOMEM, "pyhv_bus_create", NULL);
        return NULL;
    }
    atomic_init(&bus->exit_status, NO_EXIT_STATUS);
    return bus;
}

void pyhv_bus_destroy(struct pyhv_bus *bus)
{
    if (!bus)
        return;
    for (uint32_t i = 0; i < bus->device_count; i++)
        pyhv_device_destroy(bus->devices[i]);
    free(bus);
}

/* Gives a device its sink. A line that is high already (its state was loaded first) is announced: the new
 * listener has not heard of it. */
static void connect_irq(struct pyhv_device *device, struct pyhv_irq_sink sink)
{
    pthread_mutex_lock(&device->lock);
    device->sink = sink;
    if (sink.raise && device->irq_level)
        sink.raise(sink.opaque, device->gsi, device->irq_level);
    pthread_mutex_unlock(&device->lock);
}

int pyhv_bus_attach(struct pyhv_bus *bus, struct pyhv_device *device, struct pyhv_error *error)
{
    if (bus->device_count == PYHV_BUS_MAX_DEVICES)
        return pyhv_fail(error, ENOSPC, "pyhv_bus_attach", "%s: %d devices are attached already", device->ops->name,
                         PYHV_BUS_MAX_DEVICES);
    for (uint32_t i = 0; i < bus->claim_count; i++) {
        const struct claim *taken = &bus->claims[i];
        for (uint32_t j = 0; j < device->range_count; j++) {
            const struct pyhv_port_range *wanted = &device->ranges[j];
            if (wanted->first <= taken->ports.last && taken->ports.first <= wanted->last)
                return pyhv_fail(error, EBUSY, "pyhv_bus_attach", "%s: ports 0x%x-0x%x meet 0x%x-0x%x of %s",
                                 device->ops->name, wanted->first, wanted->last, taken->ports.first, taken->ports.last,
                                 taken->device->ops->name);
        }
    }

    for (uint32_t j = 0; j < device->range_count; j++) {
        uint32_t place = bus->claim_count++;
        for (; place > 0 && bus->claims[place - 1].ports.first > device->ranges[j].first; place--)
            bus->claims[place] = bus->claims[place - 1];
        bus->claims[place] = (struct claim){.ports = device->ranges[j], .device = device};
    }
    bus->devices[bus->device_count++] = device;
    connect_irq(device, bus->sink);
    return 0;
}

void pyhv_bus_set_irq_sink(struct pyhv_bus *bus, struct pyhv_irq_sink sink)
{
    bus->sink = sink;
    for (uint32_t i = 0; i < bus->device_count; i++)
        connect_irq(bus->devices[i], sink);
}

void pyhv_bus_flush(struct pyhv_bus *bus)
{
    for (uint32_t i = 0; i < bus->device_count; i++) {
        struct pyhv_device *device = bus->devices[i];
        if (!device->ops->flush)
            continue;
        pthread_mutex_lock(&device->lock);
        device->ops->flush(device);
        pthread_mutex_unlock(&device->lock);
    }
}

uint8_t pyhv_bus_exit_status(const struct pyhv_bus *bus)
{
    int status = atomic_load_explicit(&bus->exit_status, memory_order_acquire);
    return status == NO_EXIT_STATUS ? 0 : (uint8_t)status;
}

/* Who owns a port. The list is short and its order lets the search end early: quicker than halving it. */
static const struct claim *find_claim(const struct pyhv_bus *bus, uint32_t port)
{
    for (uint32_t i = 0; i < bus->claim_count && bus->claims[i].ports.first <= port; i++) {
        if (port <= bus->claims[i].ports.last)
            return &bus->claims[i];
    }
    return NULL;
}

static enum pyhv_action stronger(enum pyhv_action a, enum pyhv_action b)
{
    return a > b ? a : b;
}

/* Notes an exit status; the first one counts, whichever vCPU writes it. */
static void note_action(struct pyhv_bus *bus, enum pyhv_action action, uint8_t value)
{
    int none = NO_EXIT_STATUS;
    if (action == PYHV_ACTION_GUEST_EXIT)
        atomic_compare_exchange_strong(&bus->exit_status, &none, value);
}

/* One access to one device, or to nobody. */
static enum pyhv_action access_piece(struct pyhv_bus *bus, const struct claim *claim, uint32_t port, bool is_write,
                                     uint32_t size, uint8_t *bytes)
{
    enum pyhv_action action = PYHV_ACTION_NONE;
    uint32_t value = 0;
    if (!claim) {
        if (!is_write)
            memset(bytes, 0xff, size);
        return action;
    }

    struct pyhv_device *device = claim->device;
    uint32_t offset = port - device->ranges[0].first;
    if (is_write) {
        for (uint32_t i = 0; i < size; i++)
            value |= (uint32_t)bytes[i] << (8 * i);
        pthread_mutex_lock(&device->lock);
        action = device->ops->write(device, offset, size, value);
        pthread_mutex_unlock(&device->lock);
        note_action(bus, action, bytes[0]);
    } else {
        pthread_mutex_lock(&device->lock);
        value = device->ops->read(device, offset, size);
        pthread_mutex_unlock(&device->lock);
        for (uint32_t i = 0; i < size; i++)
            bytes[i] = (uint8_t)(value >> (8 * i));
    }
    return action;
}

/* One item: in one piece where a device takes it so and has all of its ports, else byte by byte. */
static enum pyhv_action access_item(struct pyhv_bus *bus, uint32_t port, bool is_write, uint32_t size, uint8_t *bytes)
{
    const struct claim *claim = find_claim(bus, port);
    if (size == 1 || (claim && size <= claim->device->ops->max_access && port + size - 1 <= claim->ports.last))
        return access_piece(bus, claim, port, is_write, size, bytes);

    enum pyhv_action action = PYHV_ACTION_NONE;
    for (uint32_t i = 0; i < size; i++)
        action = stronger(action, access_piece(bus, find_claim(bus, port + i), port + i, is_write, 1, bytes + i));
    return action;
}

int pyhv_bus_port_io(struct pyhv_bus *bus, uint16_t port, int is_write, uint32_t size, uint32_t count, void *data)
{
    uint8_t *bytes = data;
    enum pyhv_action action = PYHV_ACTION_NONE;

    if (is_write && size == 1 && count > 1) {
        const struct claim *claim = find_claim(bus, port);
        if (claim && claim->device->ops->write_string) {
            struct pyhv_device *device = claim->device;
            pthread_mutex_lock(&device->lock);
            action = device->ops->write_string(device, (uint32_t)port - device->ranges[0].first, bytes, count);
            pthread_mutex_unlock(&device->lock);
            return action;
        }
    }
    for (uint32_t i = 0; i < count; i++, bytes += size)
        action = stronger(action, access_item(bus, port, is_write != 0, size, bytes));
    return action;
}

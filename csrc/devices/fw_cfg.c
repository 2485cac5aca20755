/* SPDX-License-Identifier: MIT
 *
 * Firmware configuration: named pieces of data that a guest can ask for, such as the number of processors.
 *
 * Ports: 0x510 (selector, 16 bits, write only) and 0x511 (data, 8 bits). Source: QEMU, docs/specs/fw_cfg.rst. The items
 * themselves, and what their bytes mean, come from pyhv/boot/pc.py.
 *
 *  - Writing a key to the selector begins with the first byte of its item; each read of the data port gives the next
 *    one. Past the item's end, and for a key that has none, it reads 0.
 *  - Items cannot be written, and there is no DMA; the interface's own ID item says so.
 *  - As in QEMU a byte written to the selector counts as one written to the data port: it vanishes. Reads of the selector
 *    are all-ones.
 *
 * Saved state, version 1: u16 key selected; u32 bytes of its item read so far; u16 number of items; for each, keys
 * ascending: u16 key; u16 length; the bytes. All items together, each with its key and length, take at most
 * PYHV_FW_CFG_MAX bytes, so that any state can be saved.
 */
#include <errno.h>

#include "devices/device.h"
#include "error.h"

#define SELECTOR_PORT 0x510
#define ITEM_HEAD     4 /* bytes of key and length */

/* The items as they are saved, one behind the other. */
struct items {
    uint32_t count, size;
    uint8_t bytes[PYHV_FW_CFG_MAX];
};

struct fw_cfg {
    struct pyhv_device device;
    uint16_t key;
    uint32_t position;
    uint32_t item, item_size; /* where the selected item's bytes are in items.bytes; a size of 0: nowhere */
    struct items items;
};

static struct fw_cfg *fw_cfg_of(struct pyhv_device *device)
{
    return (struct fw_cfg *)device;
}

static uint32_t get16(const uint8_t *bytes)
{
    return bytes[0] | (uint32_t)bytes[1] << 8;
}

/* Where the first item begins whose key is `key` or above: items->size where there is none. */
static uint32_t find(const struct items *items, uint32_t key)
{
    uint32_t at = 0;
    while (at < items->size && get16(items->bytes + at) < key)
        at += ITEM_HEAD + get16(items->bytes + at + 2);
    return at;
}

static void select_item(struct fw_cfg *fw_cfg, uint16_t key, uint32_t position)
{
    uint32_t at = find(&fw_cfg->items, key);
    bool found = at < fw_cfg->items.size && get16(fw_cfg->items.bytes + at) == key;
    fw_cfg->key = key;
    fw_cfg->position = position;
    fw_cfg->item = at + ITEM_HEAD;
    fw_cfg->item_size = found ? get16(fw_cfg->items.bytes + at + 2) : 0;
}

static uint32_t fw_cfg_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    struct fw_cfg *fw_cfg = fw_cfg_of(device);
    if (offset == 0 || size != 1)
        return UINT32_MAX;
    if (fw_cfg->position >= fw_cfg->item_size)
        return 0;
    return fw_cfg->items.bytes[fw_cfg->item + fw_cfg->position++];
}

static enum pyhv_action fw_cfg_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    if (offset == 0 && size == 2)
        select_item(fw_cfg_of(device), (uint16_t)value, 0);
    return PYHV_ACTION_NONE;
}

static void fw_cfg_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    const struct fw_cfg *fw_cfg = fw_cfg_of(device);
    pyhv_put_int(out, fw_cfg->key, 2);
    pyhv_put_int(out, fw_cfg->position, 4);
    pyhv_put_int(out, fw_cfg->items.count, 2);
    pyhv_put_bytes(out, fw_cfg->items.bytes, fw_cfg->items.size);
}

static int fw_cfg_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    struct fw_cfg *fw_cfg = fw_cfg_of(device);
    struct items loaded = {0};
    uint16_t key = (uint16_t)pyhv_get_int(in, 2);
    uint32_t position = (uint32_t)pyhv_get_int(in, 4);
    uint16_t count = (uint16_t)pyhv_get_int(in, 2);
    if (in->truncated)
        return pyhv_device_refuse_state(device, error, "the state is cut short");
    if (in->left > sizeof loaded.bytes)
        return pyhv_device_refuse_state(device, error, "%zu bytes of items, at most %zu fit", in->left,
                                        sizeof loaded.bytes);
    loaded.size = (uint32_t)in->left;
    pyhv_get_bytes(in, loaded.bytes, in->left);
    int64_t last = -1;
    for (uint32_t at = 0, length = 0; at < loaded.size; at += ITEM_HEAD + length, loaded.count++) {
        if (loaded.size - at >= ITEM_HEAD)
            length = get16(loaded.bytes + at + 2);
        if (loaded.size - at < ITEM_HEAD || length > loaded.size - at - ITEM_HEAD)
            return pyhv_device_refuse_state(device, error, "item %u is cut short", loaded.count);
        if (get16(loaded.bytes + at) <= last)
            return pyhv_device_refuse_state(device, error, "item %u, key 0x%x, is out of order", loaded.count,
                                            get16(loaded.bytes + at));
        last = get16(loaded.bytes + at);
    }
    if (loaded.count != count)
        return pyhv_device_refuse_state(device, error, "%u items, not %u", loaded.count, count);
    fw_cfg->items = loaded;
    select_item(fw_cfg, key, position);
    return 0;
}

static const struct pyhv_device_ops fw_cfg_ops = {
    .name = "fw_cfg",
    .size = sizeof(struct fw_cfg),
    .state_version = 1,
    .max_access = 2,
    .read = fw_cfg_read,
    .write = fw_cfg_write,
    .save = fw_cfg_save,
    .load = fw_cfg_load,
};

struct pyhv_device *pyhv_fw_cfg_create(struct pyhv_error *error)
{
    return pyhv_device_create(&fw_cfg_ops, SELECTOR_PORT, 2, error);
}

int pyhv_fw_cfg_add(struct pyhv_device *device, uint16_t key, const uint8_t *bytes, size_t size,
                    struct pyhv_error *error)
{
    struct fw_cfg *fw_cfg = fw_cfg_of(device);
    struct items *items = &fw_cfg->items;
    int result = 0;
    pthread_mutex_lock(&device->lock);
    uint32_t at = find(items, key);
    if (at < items->size && get16(items->bytes + at) == key) {
        result = pyhv_fail(error, EEXIST, "pyhv_fw_cfg_add", "key 0x%x", key);
    } else if (size > sizeof items->bytes || ITEM_HEAD + size > sizeof items->bytes - items->size) {
        result = pyhv_fail(error, ENOSPC, "pyhv_fw_cfg_add", "key 0x%x: %zu bytes, room for %zu", key, ITEM_HEAD + size,
                           sizeof items->bytes - items->size);
    } else {
        memmove(items->bytes + at + ITEM_HEAD + size, items->bytes + at, items->size - at);
        uint8_t head[ITEM_HEAD] = {(uint8_t)key, (uint8_t)(key >> 8), (uint8_t)size, (uint8_t)(size >> 8)};
        memcpy(items->bytes + at, head, sizeof head);
        if (size)
            memcpy(items->bytes + at + ITEM_HEAD, bytes, size);
        items->size += (uint32_t)(ITEM_HEAD + size);
        items->count++;
        select_item(fw_cfg, fw_cfg->key, fw_cfg->position);
    }
    pthread_mutex_unlock(&device->lock);
    return result;
}

/* SPDX-License-Identifier: MIT
 *
 * Fuzzes what a stranger can send: device states from a file or a migration, and port accesses from a guest.
 *
 * An input is: 1 byte that chooses the device; 2 bytes, little-endian, the length of a state; the state; then port
 * accesses of 3 bytes each: offset and kind, width and count, value. What must hold, besides that nothing crashes:
 *  - a refused state leaves the device as it was, and says why in the device's name;
 *  - an accepted one, saved again, is accepted again, and gives the same bytes;
 *  - two devices that were given the same state answer the same accesses with the same bytes and actions.
 *
 * How it is built and run is in fuzz.h. Without libFuzzer half of the inputs are noise, and half valid states with a few
 * bytes changed.
 */
#include <string.h>
#include <unistd.h>

#include "fuzz.h"
#include "pyhv.h"

#define DEVICES 9

/* The VM generation ID has no ports: those are nobody's. */
static const struct {
    uint16_t port, ports;
} places[DEVICES] = {{0x3f8, 8}, {0xf4, 1},  {0x60, 5},  {0x70, 2}, {0x600, 16},
                     {0xcf8, 8}, {0x505, 1}, {0x505, 1}, {0x510, 2}};

enum { CMOS = 3, ACPI_PM = 4, FW_CFG = 8 };

static struct pyhv_device *create(unsigned which)
{
    switch (which) {
    case 0:
        return pyhv_uart16550_create(0x3f8, 4, -1, -1, NULL);
    case 1:
        return pyhv_debug_exit_create(0xf4, NULL);
    case 2:
        return pyhv_i8042_create(NULL);
    case CMOS:
        return pyhv_cmos_create(UINT64_C(3) << 30, UINT64_C(1) << 30, NULL);
    case ACPI_PM:
        return pyhv_acpi_pm_create(0x600, 9, NULL);
    case 5:
        return pyhv_chipset_create(NULL);
    case 6:
        return pyhv_pvpanic_create(0x505, NULL);
    case 7:
        return pyhv_vmgenid_create(0xe0000, NULL);
    default: {
        struct pyhv_device *fw_cfg = pyhv_fw_cfg_create(NULL);
        REQUIRE(fw_cfg && pyhv_fw_cfg_add(fw_cfg, 0, (const uint8_t *)"QEMU", 4, NULL) == 0);
        REQUIRE(pyhv_fw_cfg_add(fw_cfg, 5, (const uint8_t *)"\2\0", 2, NULL) == 0);
        return fw_cfg;
    }
    }
}

/* Whether two states of a device are the same. ACPI's timer goes on between two saves: its bytes do not count. */
static int same_state(unsigned which, const uint8_t *one, const uint8_t *other, int64_t size)
{
    enum { TIMER = 5, TIMER_SIZE = 4 };
    size_t bytes = (size_t)size;
    if (which != ACPI_PM)
        return memcmp(one, other, bytes) == 0;
    return memcmp(one, other, TIMER) == 0 &&
           memcmp(one + TIMER + TIMER_SIZE, other + TIMER + TIMER_SIZE, bytes - TIMER - TIMER_SIZE) == 0;
}

static struct pyhv_bus *bus_with(struct pyhv_device *device)
{
    struct pyhv_bus *bus = pyhv_bus_create(NULL);
    REQUIRE(bus && device && pyhv_bus_attach(bus, device, NULL) == 0);
    return bus;
}

/* Whether reading this may give two answers: ACPI's timer, the clock of the CMOS, and what the guest stored of it. */
static int shows_time(unsigned which, const uint8_t *state, int64_t size)
{
    static const uint8_t times[] = {0, 2, 4, 6, 7, 8, 9, 10, 0x32};
    if (which == ACPI_PM)
        return 1;
    return which == CMOS && size > 1 && memchr(times, state[1], sizeof times) != NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t before[PYHV_DEVICE_STATE_MAX], after[PYHV_DEVICE_STATE_MAX];
    struct pyhv_error error = {0};
    if (size < 3)
        return 0;
    unsigned which = data[0] % DEVICES;
    size_t length = data[1] | (size_t)data[2] << 8;
    data += 3;
    size -= 3;
    if (length > size)
        length = size;

    struct pyhv_device *one = create(which), *two = create(which);
    struct pyhv_bus *bus_one = bus_with(one), *bus_two = bus_with(two);
    int64_t before_size = pyhv_device_save(one, before, sizeof before, NULL);
    REQUIRE(before_size > 0);
    if (pyhv_device_load(one, data, length, &error) < 0) {
        REQUIRE(pyhv_device_save(one, after, sizeof after, NULL) == before_size);
        REQUIRE(same_state(which, before, after, before_size));
        REQUIRE(strncmp(error.what, pyhv_device_name(one), strlen(pyhv_device_name(one))) == 0 && error.detail[0]);
    } else {
        before_size = pyhv_device_save(one, before, sizeof before, NULL);
        REQUIRE(before_size > 0);
        REQUIRE(pyhv_device_load(two, before, (size_t)before_size, NULL) == 0);
        REQUIRE(pyhv_device_save(two, after, sizeof after, NULL) == before_size);
        REQUIRE(same_state(which, before, after, before_size));
    }

    for (data += length, size -= length; size >= 3; data += 3, size -= 3) {
        uint16_t port = (uint16_t)(places[which].port - 1 + (data[0] & 0x7f) % (places[which].ports + 2));
        int is_write = data[0] >> 7;
        uint32_t width = 1u << data[1] % 3, count = 1 + data[1] / 3 % 8;
        uint8_t bytes_one[32], bytes_two[32];
        before_size = pyhv_device_save(one, before, sizeof before, NULL);
        memset(bytes_one, data[2], sizeof bytes_one);
        memset(bytes_two, data[2], sizeof bytes_two);
        int action_one = pyhv_bus_port_io(bus_one, port, is_write, width, count, bytes_one);
        int action_two = pyhv_bus_port_io(bus_two, port, is_write, width, count, bytes_two);
        REQUIRE(action_one == action_two && action_one >= PYHV_ACTION_NONE && action_one <= PYHV_ACTION_PANIC);
        if (!shows_time(which, before, before_size))
            REQUIRE(memcmp(bytes_one, bytes_two, sizeof bytes_one) == 0);
    }
    /* However the guest treated it, it can be saved and loaded. */
    before_size = pyhv_device_save(one, before, sizeof before, NULL);
    REQUIRE(before_size > 0 && pyhv_device_load(two, before, (size_t)before_size, NULL) == 0);
    pyhv_bus_destroy(bus_one);
    pyhv_bus_destroy(bus_two);
    return 0;
}

#ifdef PYHV_FUZZ_MAIN
/* A state that a guest could bring about. */
static size_t valid_state(unsigned which, uint8_t *state)
{
    struct pyhv_device *device = create(which);
    struct pyhv_bus *bus = bus_with(device);
    for (uint32_t i = random32() % 64; i > 0; i--) {
        uint8_t value = (uint8_t)random32();
        pyhv_bus_port_io(bus, (uint16_t)(places[which].port + random32() % places[which].ports), random32() & 1, 1, 1,
                         &value);
    }
    int64_t size = pyhv_device_save(device, state, PYHV_DEVICE_STATE_MAX, NULL);
    REQUIRE(size > 0);
    pyhv_bus_destroy(bus);
    return (size_t)size;
}

static size_t make_input(uint8_t *input)
{
    unsigned which = random32() % DEVICES;
    size_t length = random32() % 200;
    if (random32() % 2) {
        length = valid_state(which, input + 3);
        if (random32() % 8 == 0 && which == 0 && length >= 46) { /* bytes that wait for transmission */
            uint32_t waiting = random32() % 4097;
            input[3 + 8] &= 0x01;
            input[3 + 44] = (uint8_t)waiting;
            input[3 + 45] = (uint8_t)(waiting >> 8);
            length = 46 + waiting;
        }
        for (uint32_t changes = random32() % 4; changes > 0; changes--)
            input[3 + random32() % length] = (uint8_t)random32();
        if (random32() % 16 == 0)
            length = random32() % (length + 4);
    } else {
        for (size_t i = 0; i < length; i++)
            input[3 + i] = (uint8_t)(i == 0 && random32() % 8 ? 1 : random32());
    }
    input[0] = (uint8_t)which;
    input[1] = (uint8_t)length;
    input[2] = (uint8_t)(length >> 8);
    size_t accesses = random32() % 256 * 3;
    for (size_t i = 0; i < accesses; i++)
        input[3 + length + i] = (uint8_t)random32();
    return 3 + length + accesses;
}

int main(int argc, char **argv)
{
    static uint8_t input[3 + PYHV_DEVICE_STATE_MAX + 3 * 256];
    return fuzz(argc, argv, input, make_input);
}
#endif

/* SPDX-License-Identifier: MIT
 *
 * The keyboard controller of a PC, without a keyboard or a mouse. Kernels pulse its reset line to restart the machine.
 *
 * Ports: 0x60 (data) and 0x64 (status when read, command when written). 0x61 between them belongs to others.
 * Sources: Intel 8042 and IBM PS/2 Technical Reference, "Keyboard and Auxiliary Device Controller"; what Linux's
 * drivers/input/serio/i8042.c asks.
 *
 *  - A command is done at once: the input buffer (status bit 1) is never full.
 *  - Bytes for the keyboard or the mouse vanish, as with nothing plugged in. No interrupt is ever raised.
 *  - Every command that has an answer gets one, also those about the mouse port that is not there: a kernel would
 *    otherwise wait half a second for each. The answers to 0xA9 and 0xD3 are such that Linux sees no mouse port.
 *  - A20 is always on. Writes that would turn it off are ignored, and the output port reads bit 1 as 1.
 *
 * Saved state, version 1 (5 bytes with the version):
 *   u8 command byte; u8 output byte; u8 flags: bit 0 output buffer full, bit 1 last write was a command;
 *   u8 command that waits for its byte on port 0x60, 0: none
 */
#include "devices/device.h"

#define DATA_PORT    0x60
#define COMMAND_PORT 0x64

#define STATUS_OUTPUT_FULL   0x01 /* a byte can be read at port 0x60 */
#define STATUS_SYSTEM        0x04 /* the controller passed its self test */
#define STATUS_COMMAND       0x08 /* the last write went to port 0x64 */
#define STATUS_NOT_INHIBITED 0x10 /* the keyboard lock is open; closed, Linux warns */

#define BYTE_SYSTEM           0x04
#define BYTE_KEYBOARD_DISABLE 0x10
#define BYTE_MOUSE_DISABLE    0x20
#define BYTE_TRANSLATE        0x40

#define OUTPUT_PORT_NOT_RESET 0x01
#define OUTPUT_PORT_VALUE     0xcf /* not reset, A20 on, the lines of the two devices idle */
#define INPUT_PORT_VALUE      0x80 /* the keyboard lock is open */

#define SAVED_OUTPUT_FULL 0x01
#define SAVED_COMMAND     0x02

struct i8042 {
    struct pyhv_device device;
    uint8_t command_byte;
    uint8_t output;
    bool output_full;
    bool last_was_command;
    uint8_t waiting; /* a command that takes a byte from port 0x60 */
};

static struct i8042 *i8042_of(struct pyhv_device *device)
{
    return (struct i8042 *)device;
}

static void answer(struct i8042 *i8042, uint8_t value)
{
    i8042->output = value;
    i8042->output_full = true;
}

static uint32_t i8042_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    struct i8042 *i8042 = i8042_of(device);
    (void)size;
    if (offset == DATA_PORT - DATA_PORT) {
        i8042->output_full = false;
        return i8042->output; /* with an empty buffer: the last byte once more, as the chip does */
    }
    uint8_t status = STATUS_NOT_INHIBITED;
    if (i8042->output_full)
        status |= STATUS_OUTPUT_FULL;
    if (i8042->command_byte & BYTE_SYSTEM)
        status |= STATUS_SYSTEM;
    if (i8042->last_was_command)
        status |= STATUS_COMMAND;
    return status;
}

static enum pyhv_action write_command(struct i8042 *i8042, uint8_t command)
{
    i8042->last_was_command = true;
    i8042->waiting = 0;
    if (command >= 0xf0) /* pulse the output port's lines 0 to 3 that have a 0 here; 0xff pulses none */
        return command & OUTPUT_PORT_NOT_RESET ? PYHV_ACTION_NONE : PYHV_ACTION_RESET;
    switch (command) {
    case 0x20: /* read the command byte */
        answer(i8042, i8042->command_byte);
        break;
    case 0x60: /* write the command byte */
    case 0xd1: /* write the output port */
    case 0xd2: /* put a byte into the output buffer, as if from the keyboard */
    case 0xd3: /* the same as if from the mouse */
    case 0xd4: /* send a byte to the mouse */
        i8042->waiting = command;
        break;
    case 0xa7:
        i8042->command_byte |= BYTE_MOUSE_DISABLE;
        break;
    case 0xa8:
        i8042->command_byte &= (uint8_t)~BYTE_MOUSE_DISABLE;
        break;
    case 0xa9: /* test the mouse port: "clock line stuck low", there is none */
        answer(i8042, 0x01);
        break;
    case 0xaa: /* self test: passed */
        i8042->command_byte |= BYTE_SYSTEM;
        answer(i8042, 0x55);
        break;
    case 0xab: /* test the keyboard port: no fault of the lines */
        answer(i8042, 0x00);
        break;
    case 0xad:
        i8042->command_byte |= BYTE_KEYBOARD_DISABLE;
        break;
    case 0xae:
        i8042->command_byte &= (uint8_t)~BYTE_KEYBOARD_DISABLE;
        break;
    case 0xc0: /* read the input port */
        answer(i8042, INPUT_PORT_VALUE);
        break;
    case 0xd0: /* read the output port */
        answer(i8042, OUTPUT_PORT_VALUE);
        break;
    case 0xe0: /* read the test inputs: the clock lines, low */
        answer(i8042, 0x00);
        break;
    default: /* unknown, and 0xdd and 0xdf, which switch A20 on some controllers */
        break;
    }
    return PYHV_ACTION_NONE;
}

static enum pyhv_action write_data(struct i8042 *i8042, uint8_t value)
{
    uint8_t command = i8042->waiting;
    i8042->last_was_command = false;
    i8042->waiting = 0;
    switch (command) {
    case 0x60:
        i8042->command_byte = value;
        break;
    case 0xd1:
        return value & OUTPUT_PORT_NOT_RESET ? PYHV_ACTION_NONE : PYHV_ACTION_RESET;
    case 0xd2:
    case 0xd3: /* without the status bit "from the mouse": Linux takes that for a controller without a mouse port */
        answer(i8042, value);
        break;
    default: /* for the mouse or the keyboard: nobody there */
        break;
    }
    return PYHV_ACTION_NONE;
}

static enum pyhv_action i8042_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    struct i8042 *i8042 = i8042_of(device);
    (void)size;
    return offset == COMMAND_PORT - DATA_PORT ? write_command(i8042, (uint8_t)value)
                                              : write_data(i8042, (uint8_t)value);
}

static void i8042_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    const struct i8042 *i8042 = i8042_of(device);
    uint8_t flags = (i8042->output_full ? SAVED_OUTPUT_FULL : 0) | (i8042->last_was_command ? SAVED_COMMAND : 0);
    pyhv_put_int(out, i8042->command_byte, 1);
    pyhv_put_int(out, i8042->output, 1);
    pyhv_put_int(out, flags, 1);
    pyhv_put_int(out, i8042->waiting, 1);
}

static int i8042_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    struct i8042 *i8042 = i8042_of(device);
    uint8_t command_byte = (uint8_t)pyhv_get_int(in, 1);
    uint8_t output = (uint8_t)pyhv_get_int(in, 1);
    uint8_t flags = (uint8_t)pyhv_get_int(in, 1);
    uint8_t waiting = (uint8_t)pyhv_get_int(in, 1);
    if (in->truncated)
        return pyhv_device_refuse_state(device, error, "the state is cut short");
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);
    if (flags & ~(SAVED_OUTPUT_FULL | SAVED_COMMAND))
        return pyhv_device_refuse_state(device, error, "reserved bits are set in flags 0x%02x", flags);
    if (waiting != 0 && waiting != 0x60 && !(waiting >= 0xd1 && waiting <= 0xd4))
        return pyhv_device_refuse_state(device, error, "command 0x%02x takes no byte", waiting);
    if (waiting != 0 && !(flags & SAVED_COMMAND))
        return pyhv_device_refuse_state(device, error, "command 0x%02x waits, but was not the last write", waiting);
    i8042->command_byte = command_byte;
    i8042->output = output;
    i8042->output_full = flags & SAVED_OUTPUT_FULL;
    i8042->last_was_command = flags & SAVED_COMMAND;
    i8042->waiting = waiting;
    return 0;
}

static const struct pyhv_device_ops i8042_ops = {
    .name = "i8042",
    .size = sizeof(struct i8042),
    .state_version = 1,
    .max_access = 1,
    .read = i8042_read,
    .write = i8042_write,
    .save = i8042_save,
    .load = i8042_load,
};

struct pyhv_device *pyhv_i8042_create(struct pyhv_error *error)
{
    struct pyhv_device *device = pyhv_device_create(&i8042_ops, DATA_PORT, 1, error);
    if (!device)
        return NULL;
    if (pyhv_device_add_ports(device, COMMAND_PORT, 1, error) < 0) {
        pyhv_device_destroy(device);
        return NULL;
    }
    /* As firmware leaves it: tested, scan codes translated, both ports off until a driver wants them. */
    i8042_of(device)->command_byte = BYTE_SYSTEM | BYTE_KEYBOARD_DISABLE | BYTE_MOUSE_DISABLE | BYTE_TRANSLATE;
    return device;
}

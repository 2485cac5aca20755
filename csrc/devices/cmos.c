/* SPDX-License-Identifier: MIT
 *
 * The real-time clock of a PC and the battery-backed memory around it.
 *
 * Ports: 0x70 (index; write only, bit 7 is the NMI mask and is ignored) and 0x71 (the byte at the index).
 * Sources: Motorola MC146818 and Intel 82371SB (PIIX3) datasheets for registers 0x00 to 0x0d; Ralf Brown's "CMOS
 * Memory Map" for the memory sizes; ACPI, FADT field CENTURY, for 0x32.
 *
 *  0x00 0x02 0x04 0x06..0x09 0x32   seconds, minutes, hours, day of week (1: Sunday), day, month, year, century
 *  0x01 0x03 0x05                   alarm: kept, never goes off
 *  0x0a                             status A: bit 7 update in progress; bits 6:4 divider, 11x halts the clock
 *  0x0b                             status B: bit 7 SET halts the clock, bit 2 binary (else BCD), bit 1 24 hours
 *  0x0c                             status C: reads 0. There are no interrupts yet: no alarm, no update-ended, no
 *                                   periodic one, whatever status B enables
 *  0x0d                             status D: bit 7, the battery is good
 *  0x15 0x16                        KiB below 1 MiB, at most 640
 *  0x17 0x18 and 0x30 0x31          KiB from 1 MiB on, at most 65535
 *  0x34 0x35                        64 KiB units from 16 MiB on, below 4 GiB, at most 65535
 *  0x5b 0x5c 0x5d                   64 KiB units above 4 GiB, at most 0xffffff
 *  0x2e 0x2f                        the sum of 0x10 to 0x2d, high byte first, as firmware checks it
 *  all other                        plain memory
 *
 * The time is the host's real-time clock plus an offset of whole seconds. When the guest sets the clock the offset
 * changes; the seconds go on to change when the host's do, so that a clock just set is off by less than a second.
 * The offset, not the time, is saved: wherever and whenever a VM is restored its clock is right. While the
 * clock is halted the registers hold what the guest writes; when it goes on, the offset is computed from them, if the
 * guest wrote any. Fields out of range are carried into the next one (day 32 of January is 1 February). The day of
 * week always follows from the date.
 *
 * Reading takes several accesses, and a second may end in between. A chip gives notice: bit 7 of status A is set from
 * 244 microseconds before an update to its end, 1984 microseconds later. It is so here too, by the host's clock. But
 * a guest under a hypervisor may need longer than the notice gives it. So reading status A or the seconds takes a
 * picture of the time, which the other registers are read from for the next second.
 *
 * Saved state, version 1 (139 bytes with the version):
 *   u8 index; u8 flags: bit 0 the guest wrote a time register while the clock was halted; i64 offset in seconds;
 *   u8[128] memory, where status A has bit 7 clear, C is 0 and D is 0x80, and the time registers count only while
 *   the clock is halted
 */
#include <time.h>

#include "devices/device.h"

#define INDEX_PORT 0x70
#define CELLS      128

enum {
    SECONDS = 0x00,
    MINUTES = 0x02,
    HOURS = 0x04,
    DAY_OF_WEEK = 0x06,
    DAY = 0x07,
    MONTH = 0x08,
    YEAR = 0x09,
    STATUS_A = 0x0a,
    STATUS_B = 0x0b,
    STATUS_C = 0x0c,
    STATUS_D = 0x0d,
    CENTURY = 0x32,
};

#define A_UPDATE_IN_PROGRESS 0x80
#define A_DIVIDER_HALT       0x60 /* both bits: the divider is held in reset */
#define A_AT_POWER_ON        0x26 /* 32.768 kHz, periodic rate 1024 Hz: what firmware leaves */
#define B_SET                0x80
#define B_UPDATE_INTERRUPT   0x10
#define B_BINARY             0x04
#define B_24_HOURS           0x02
#define D_BATTERY_GOOD       0x80
#define HOURS_PM             0x80 /* in 12-hour mode */

#define NS_PER_SECOND    1000000000
#define UPDATE_NOTICE_NS (244000 + 1984000) /* MC146818, tBUC + tUC with a 32.768 kHz time base */

/* No time that a guest can write is further away: the registers end before the year 26000. */
#define OFFSET_LIMIT INT64_C(1000000000000)

#define SAVED_TIME_WRITTEN 0x01

struct cmos {
    struct pyhv_device device;
    uint8_t index;
    uint8_t cells[CELLS];
    int64_t offset;    /* seconds to add to the host's clock */
    bool time_written; /* while halted */
    bool has_picture;  /* the time registers hold the time as of `picture` */
    struct timespec picture;
};

static struct cmos *cmos_of(struct pyhv_device *device)
{
    return (struct cmos *)device;
}

static bool is_halted(const struct cmos *cmos)
{
    return cmos->cells[STATUS_B] & B_SET || (cmos->cells[STATUS_A] & A_DIVIDER_HALT) == A_DIVIDER_HALT;
}

static bool is_time_register(uint8_t index)
{
    return index == SECONDS || index == MINUTES || index == HOURS || (index >= DAY_OF_WEEK && index <= YEAR) ||
           index == CENTURY;
}

static struct timespec host_time(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now;
}

/* A number below 100 as the registers show it, and back. Bytes that are no BCD give some number below 256. */
static uint8_t encode(const struct cmos *cmos, int number)
{
    return (uint8_t)(cmos->cells[STATUS_B] & B_BINARY ? number : number / 10 << 4 | number % 10);
}

static int decode(const struct cmos *cmos, uint8_t byte)
{
    return cmos->cells[STATUS_B] & B_BINARY ? byte : (byte >> 4) * 10 + (byte & 15);
}

/* Puts the time of day at `now` into the registers. */
static void take_picture(struct cmos *cmos, struct timespec now)
{
    time_t seconds = now.tv_sec + cmos->offset;
    struct tm tm = {0};
    gmtime_r(&seconds, &tm);
    int year = ((tm.tm_year + 1900) % 10000 + 10000) % 10000; /* four digits are all there is */

    uint8_t hours;
    if (cmos->cells[STATUS_B] & B_24_HOURS)
        hours = encode(cmos, tm.tm_hour);
    else
        hours = encode(cmos, tm.tm_hour % 12 ? tm.tm_hour % 12 : 12) | (tm.tm_hour >= 12 ? HOURS_PM : 0);

    cmos->cells[SECONDS] = encode(cmos, tm.tm_sec);
    cmos->cells[MINUTES] = encode(cmos, tm.tm_min);
    cmos->cells[HOURS] = hours;
    cmos->cells[DAY_OF_WEEK] = encode(cmos, tm.tm_wday + 1);
    cmos->cells[DAY] = encode(cmos, tm.tm_mday);
    cmos->cells[MONTH] = encode(cmos, tm.tm_mon + 1);
    cmos->cells[YEAR] = encode(cmos, year % 100);
    cmos->cells[CENTURY] = encode(cmos, year / 100);
    cmos->picture = now;
    cmos->has_picture = true;
}

/* Sets the clock to what the registers say. */
static void set_clock(struct cmos *cmos, struct timespec now)
{
    uint8_t hours = cmos->cells[HOURS];
    struct tm tm = {
        .tm_sec = decode(cmos, cmos->cells[SECONDS]),
        .tm_min = decode(cmos, cmos->cells[MINUTES]),
        .tm_mday = decode(cmos, cmos->cells[DAY]),
        .tm_mon = decode(cmos, cmos->cells[MONTH]) - 1,
        .tm_year = decode(cmos, cmos->cells[CENTURY]) * 100 + decode(cmos, cmos->cells[YEAR]) - 1900,
    };
    if (cmos->cells[STATUS_B] & B_24_HOURS)
        tm.tm_hour = decode(cmos, hours);
    else
        tm.tm_hour = decode(cmos, hours & (uint8_t)~HOURS_PM) % 12 + (hours & HOURS_PM ? 12 : 0);
    cmos->offset = timegm(&tm) - now.tv_sec;
    cmos->has_picture = false;
}

static bool picture_is_fresh(const struct cmos *cmos, struct timespec now)
{
    int64_t age = (int64_t)(now.tv_sec - cmos->picture.tv_sec) * NS_PER_SECOND + now.tv_nsec - cmos->picture.tv_nsec;
    return cmos->has_picture && age >= 0 && age < NS_PER_SECOND;
}

static uint32_t cmos_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    struct cmos *cmos = cmos_of(device);
    uint8_t index = cmos->index;
    (void)size;
    if (offset == 0) /* the index cannot be read */
        return 0xff;
    if ((is_time_register(index) || index == STATUS_A) && !is_halted(cmos)) {
        struct timespec now = host_time();
        if (index == SECONDS || index == STATUS_A || !picture_is_fresh(cmos, now))
            take_picture(cmos, now);
        if (index == STATUS_A && now.tv_nsec >= NS_PER_SECOND - UPDATE_NOTICE_NS)
            return cmos->cells[STATUS_A] | A_UPDATE_IN_PROGRESS;
    }
    return cmos->cells[index];
}

/* Writes status A or B, which may halt the clock or let it go on. */
static void write_control(struct cmos *cmos, uint8_t index, uint8_t value)
{
    struct timespec now = host_time();
    bool was_halted = is_halted(cmos);
    if (!was_halted) {
        take_picture(cmos, now); /* what a halted clock shows until the guest writes */
        cmos->time_written = false;
    }
    cmos->cells[index] = value;
    if (is_halted(cmos))
        return;
    if (was_halted && cmos->time_written)
        set_clock(cmos, now);
    cmos->time_written = false;
    cmos->has_picture = false; /* status B may have changed the format */
}

static enum pyhv_action cmos_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    struct cmos *cmos = cmos_of(device);
    uint8_t byte = (uint8_t)value;
    uint8_t index = cmos->index;
    (void)size;
    if (offset == 0) {
        cmos->index = byte & (CELLS - 1);
    } else if (index == STATUS_A) {
        write_control(cmos, index, byte & (uint8_t)~A_UPDATE_IN_PROGRESS);
    } else if (index == STATUS_B) {
        /* The chip clears the update-ended interrupt's enable bit with SET. */
        write_control(cmos, index, byte & B_SET ? byte & (uint8_t)~B_UPDATE_INTERRUPT : byte);
    } else if (index == STATUS_C || index == STATUS_D) {
        /* read only */
    } else if (!is_time_register(index)) {
        cmos->cells[index] = byte;
    } else if (is_halted(cmos)) {
        cmos->cells[index] = byte;
        cmos->time_written = true;
    } else { /* the datasheet asks for SET first; without it one field changes at once */
        struct timespec now = host_time();
        take_picture(cmos, now);
        cmos->cells[index] = byte;
        set_clock(cmos, now);
    }
    return PYHV_ACTION_NONE;
}

static void cmos_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    const struct cmos *cmos = cmos_of(device);
    pyhv_put_int(out, cmos->index, 1);
    pyhv_put_int(out, cmos->time_written ? SAVED_TIME_WRITTEN : 0, 1);
    pyhv_put_int(out, (uint64_t)cmos->offset, 8);
    pyhv_put_bytes(out, cmos->cells, CELLS);
}

static int cmos_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    struct cmos *cmos = cmos_of(device);
    struct cmos loaded = {.index = (uint8_t)pyhv_get_int(in, 1)};
    uint8_t flags = (uint8_t)pyhv_get_int(in, 1);
    loaded.offset = (int64_t)pyhv_get_int(in, 8);
    pyhv_get_bytes(in, loaded.cells, CELLS);
    if (in->truncated)
        return pyhv_device_refuse_state(device, error, "the state is cut short");
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);
    if (loaded.index >= CELLS)
        return pyhv_device_refuse_state(device, error, "index 0x%02x is not below 0x80", loaded.index);
    if (flags & ~SAVED_TIME_WRITTEN || (flags && !is_halted(&loaded)))
        return pyhv_device_refuse_state(device, error, "flags 0x%02x do not fit status A 0x%02x and B 0x%02x", flags,
                                        loaded.cells[STATUS_A], loaded.cells[STATUS_B]);
    if (loaded.offset < -OFFSET_LIMIT || loaded.offset > OFFSET_LIMIT)
        return pyhv_device_refuse_state(device, error, "an offset of %lld seconds", (long long)loaded.offset);
    if (loaded.cells[STATUS_A] & A_UPDATE_IN_PROGRESS || loaded.cells[STATUS_C] ||
        loaded.cells[STATUS_D] != D_BATTERY_GOOD)
        return pyhv_device_refuse_state(device, error, "status A 0x%02x, C 0x%02x, D 0x%02x cannot be",
                                        loaded.cells[STATUS_A], loaded.cells[STATUS_C], loaded.cells[STATUS_D]);
    cmos->index = loaded.index;
    cmos->offset = loaded.offset;
    cmos->time_written = flags & SAVED_TIME_WRITTEN;
    cmos->has_picture = false;
    memcpy(cmos->cells, loaded.cells, CELLS);
    return 0;
}

static const struct pyhv_device_ops cmos_ops = {
    .name = "cmos",
    .size = sizeof(struct cmos),
    .state_version = 1,
    .max_access = 1,
    .read = cmos_read,
    .write = cmos_write,
    .save = cmos_save,
    .load = cmos_load,
};

/* How many units lie from `start` to `end`, at most `limit`; little-endian into cells from `index` on. */
static void put_size(struct cmos *cmos, uint8_t index, uint64_t start, uint64_t end, uint64_t unit, uint32_t limit)
{
    uint64_t units = end > start ? (end - start) / unit : 0;
    if (units > limit)
        units = limit;
    for (; limit; limit >>= 8, units >>= 8)
        cmos->cells[index++] = (uint8_t)units;
}

struct pyhv_device *pyhv_cmos_create(uint64_t ram_below_4g, uint64_t ram_above_4g, struct pyhv_error *error)
{
    const uint64_t kib = 1024, mib = 1024 * kib;
    struct pyhv_device *device = pyhv_device_create(&cmos_ops, INDEX_PORT, 2, error);
    if (!device)
        return NULL;

    struct cmos *cmos = cmos_of(device);
    cmos->cells[STATUS_A] = A_AT_POWER_ON;
    cmos->cells[STATUS_B] = B_24_HOURS;
    cmos->cells[STATUS_D] = D_BATTERY_GOOD;
    put_size(cmos, 0x15, 0, ram_below_4g < 640 * kib ? ram_below_4g : 640 * kib, kib, 0xffff);
    put_size(cmos, 0x17, mib, ram_below_4g, kib, 0xffff);
    put_size(cmos, 0x30, mib, ram_below_4g, kib, 0xffff);
    put_size(cmos, 0x34, 16 * mib, ram_below_4g, 64 * kib, 0xffff);
    put_size(cmos, 0x5b, 0, ram_above_4g, 64 * kib, 0xffffff);
    uint32_t sum = 0;
    for (uint8_t i = 0x10; i <= 0x2d; i++)
        sum += cmos->cells[i];
    cmos->cells[0x2e] = (uint8_t)(sum >> 8);
    cmos->cells[0x2f] = (uint8_t)sum;
    return device;
}

/* SPDX-License-Identifier: MIT
 *
 * ACPI's fixed power management registers: how kernels switch a PC off, a clock, and general-purpose events.
 *
 * Ports: sixteen, from the one given at creation (pyhv/boot/acpi.py tells guests in the FADT). Source: ACPI specification
 * 6.4, "ACPI Hardware Specification".
 *
 *  0x0  PM1_STS, 16 bits      0x8  PM_TMR, 32 bits
 *  0x2  PM1_EN, 16 bits       0xc  GPE0_STS, 8 bits
 *  0x4  PM1_CNT, 16 bits      0xd  GPE0_EN, 8 bits
 *
 * Ports in between read 0. An access may be 1, 2 or 4 bytes wide and touch several registers.
 *
 *  - SLP_EN with SLP_TYP 0 switches the machine off: S5 is the only sleeping state, and its type is 0, as on the machines
 *    whose port 0x604 kernels without an ACPI interpreter write 0x2000 to.
 *  - The machine is always in ACPI mode: SCI_EN reads 1, and there is no SMI command port.
 *  - No fixed event ever happens: there are no buttons, and the timer's overflow is not reported (TMR_STS stays 0). PM1_EN
 *    can be written and has no effect.
 *  - The interrupt (SCI) is a level: high while an enabled general-purpose event is pending.
 *
 * The timer counts 3,579,545 times a second by CLOCK_MONOTONIC, 32 bits wide. While a VM is paused it goes on, as its
 * other clocks do; a loaded state goes on from the count that it was saved with, and pyhv_acpi_pm_advance() adds
 * what has passed since.
 *
 * Saved state, version 1 (11 bytes with the version):
 *   u16 PM1_EN; u16 PM1_CNT's bits that can be written and read (SLP_TYP, BM_RLD); u32 the timer; u8 GPE0_STS; u8 GPE0_EN
 */
#include <time.h>

#include "devices/device.h"

#define PORTS 16

enum { PM1_STS = 0x0, PM1_EN = 0x2, PM1_CNT = 0x4, PM_TMR = 0x8, GPE0_STS = 0xc, GPE0_EN = 0xd };

#define EN_ALL         0x0721 /* TMR, GBL, PWRBTN, SLPBTN, RTC */
#define CNT_SCI_EN     0x0001
#define CNT_KEPT       0x1c02 /* SLP_TYP, BM_RLD */
#define CNT_SLP_TYP    0x1c00
#define CNT_SLP_EN     0x2000
#define TICKS_A_SECOND UINT64_C(3579545)
#define NS_A_SECOND    UINT64_C(1000000000)

struct acpi_pm {
    struct pyhv_device device;
    uint16_t pm1_en, pm1_cnt;
    uint8_t gpe_status, gpe_enable;
    uint32_t timer_offset; /* what is added to the host's count */
};

static struct acpi_pm *pm_of(struct pyhv_device *device)
{
    return (struct acpi_pm *)device;
}

static uint32_t ticks(uint64_t seconds, uint64_t ns)
{
    return (uint32_t)(seconds * TICKS_A_SECOND + ns * TICKS_A_SECOND / NS_A_SECOND);
}

static uint32_t host_count(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return ticks((uint64_t)now.tv_sec, (uint64_t)now.tv_nsec);
}

static void update_sci(struct acpi_pm *pm)
{
    pyhv_device_set_irq(&pm->device, (pm->gpe_status & pm->gpe_enable) != 0);
}

static uint32_t pm_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    struct acpi_pm *pm = pm_of(device);
    uint8_t registers[PORTS] = {
        [PM1_EN] = (uint8_t)pm->pm1_en,
        [PM1_EN + 1] = (uint8_t)(pm->pm1_en >> 8),
        [PM1_CNT] = (uint8_t)(pm->pm1_cnt | CNT_SCI_EN),
        [PM1_CNT + 1] = (uint8_t)(pm->pm1_cnt >> 8),
        [GPE0_STS] = pm->gpe_status,
        [GPE0_EN] = pm->gpe_enable,
    };
    uint32_t count = host_count() + pm->timer_offset, value = 0;
    for (uint32_t i = 0; i < 4; i++)
        registers[PM_TMR + i] = (uint8_t)(count >> (8 * i));
    for (uint32_t i = 0; i < size; i++)
        value |= (uint32_t)registers[offset + i] << (8 * i);
    return value;
}

/* One byte of a register. The fields that do something when written lie in one byte each. */
static enum pyhv_action write_byte(struct acpi_pm *pm, uint32_t offset, uint8_t value)
{
    unsigned shift = 8 * (offset & 1);
    uint16_t bits = (uint16_t)(value << shift), kept = (uint16_t)(0xff00 >> shift);
    switch (offset) {
    case PM1_EN:
    case PM1_EN + 1:
        pm->pm1_en = (uint16_t)((pm->pm1_en & kept) | (bits & EN_ALL));
        break;
    case PM1_CNT:
    case PM1_CNT + 1:
        pm->pm1_cnt = (uint16_t)((pm->pm1_cnt & kept) | (bits & CNT_KEPT));
        if (bits & CNT_SLP_EN && !(bits & CNT_SLP_TYP))
            return PYHV_ACTION_POWER_OFF;
        break;
    case GPE0_STS: /* a one clears */
        pm->gpe_status &= (uint8_t)~value;
        update_sci(pm);
        break;
    case GPE0_EN:
        pm->gpe_enable = value;
        update_sci(pm);
        break;
    default: /* PM1_STS, where nothing is ever set, the timer, and gaps */
        break;
    }
    return PYHV_ACTION_NONE;
}

static enum pyhv_action pm_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    enum pyhv_action action = PYHV_ACTION_NONE;
    for (uint32_t i = 0; i < size; i++) {
        enum pyhv_action of_byte = write_byte(pm_of(device), offset + i, (uint8_t)(value >> (8 * i)));
        action = of_byte > action ? of_byte : action;
    }
    return action;
}

static void pm_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    const struct acpi_pm *pm = pm_of(device);
    pyhv_put_int(out, pm->pm1_en, 2);
    pyhv_put_int(out, pm->pm1_cnt, 2);
    pyhv_put_int(out, host_count() + pm->timer_offset, 4);
    pyhv_put_int(out, pm->gpe_status, 1);
    pyhv_put_int(out, pm->gpe_enable, 1);
}

static int pm_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    struct acpi_pm *pm = pm_of(device);
    uint16_t pm1_en = (uint16_t)pyhv_get_int(in, 2);
    uint16_t pm1_cnt = (uint16_t)pyhv_get_int(in, 2);
    uint32_t count = (uint32_t)pyhv_get_int(in, 4);
    uint8_t gpe_status = (uint8_t)pyhv_get_int(in, 1);
    uint8_t gpe_enable = (uint8_t)pyhv_get_int(in, 1);
    if (in->truncated)
        return pyhv_device_refuse_state(device, error, "the state is cut short");
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);
    if (pm1_en & ~EN_ALL || pm1_cnt & ~CNT_KEPT)
        return pyhv_device_refuse_state(device, error, "reserved bits are set in PM1_EN 0x%04x or PM1_CNT 0x%04x",
                                        pm1_en, pm1_cnt);
    pm->pm1_en = pm1_en;
    pm->pm1_cnt = pm1_cnt;
    pm->timer_offset = count - host_count();
    pm->gpe_status = gpe_status;
    pm->gpe_enable = gpe_enable;
    update_sci(pm);
    return 0;
}

static const struct pyhv_device_ops acpi_pm_ops = {
    .name = "acpi_pm",
    .size = sizeof(struct acpi_pm),
    .state_version = 1,
    .max_access = 4,
    .read = pm_read,
    .write = pm_write,
    .save = pm_save,
    .load = pm_load,
};

struct pyhv_device *pyhv_acpi_pm_create(uint16_t port, uint32_t gsi, struct pyhv_error *error)
{
    struct pyhv_device *device = pyhv_device_create(&acpi_pm_ops, port, PORTS, error);
    if (!device)
        return NULL;
    device->gsi = gsi;
    pm_of(device)->timer_offset = -host_count();
    return device;
}

void pyhv_acpi_pm_event(struct pyhv_device *device, uint32_t event)
{
    struct acpi_pm *pm = pm_of(device);
    pthread_mutex_lock(&device->lock);
    pm->gpe_status |= (uint8_t)(1u << event);
    update_sci(pm);
    pthread_mutex_unlock(&device->lock);
}

void pyhv_acpi_pm_advance(struct pyhv_device *device, uint64_t ns)
{
    pthread_mutex_lock(&device->lock);
    pm_of(device)->timer_offset += ticks(ns / NS_A_SECOND, ns % NS_A_SECOND);
    pthread_mutex_unlock(&device->lock);
}

/* SPDX-License-Identifier: MIT
 *
 * The interrupt controllers and the timer of a PC, for one processor. No locks, no system calls: the time is an
 * argument.
 *
 * Sources: Intel's data sheets of 8259A, 8254 and 82093AA (I/O APIC); SDM Vol. 3, "Advanced Programmable Interrupt
 * Controller". The saved states are those of KVM's own (api.rst, KVM_GET_IRQCHIP, KVM_GET_LAPIC, KVM_GET_PIT2), so that
 * a VM can go from one to the other.
 */
#include <string.h>

#include "emulator/irqchip.h"

/* ------------------------------------------------------------------------------------------- the 8259A pair -- */

enum { MASTER, SLAVE, CASCADE_LINE = 2, SPURIOUS_LINE = 7, NO_PRIORITY = 8 };
enum { PIC_READY, PIC_WANTS_BASE, PIC_WANTS_CASCADE, PIC_WANTS_MODE };

static void pic_drive(struct pyhv_pic *pic, unsigned line, bool level)
{
    uint8_t mask = (uint8_t)(1u << line);
    if (pic->elcr & mask) /* level-triggered */
        pic->irr = level ? pic->irr | mask : pic->irr & (uint8_t)~mask;
    else if (level && !(pic->last_irr & mask))
        pic->irr |= mask;
    pic->last_irr = level ? pic->last_irr | mask : pic->last_irr & (uint8_t)~mask;
}

/* The place of the first set line, counted from the one that now has the highest priority. */
static unsigned pic_priority(const struct pyhv_pic *pic, uint8_t lines)
{
    unsigned priority = 0;
    if (!lines)
        return NO_PRIORITY;
    while (!(lines & 1u << ((priority + pic->priority_add) & 7)))
        priority++;
    return priority;
}

/* The line that asks for service and is above all that are being served; -1: none. */
static int pic_request(const struct pyhv_pic *pic, bool is_master)
{
    unsigned wants = pic_priority(pic, pic->irr & (uint8_t)~pic->imr);
    uint8_t served = pic->isr;
    if (pic->special_mask)
        served &= (uint8_t)~pic->imr;
    if (pic->special_fully_nested_mode && is_master)
        served &= (uint8_t) ~(1u << CASCADE_LINE);
    return wants < pic_priority(pic, served) ? (int)((wants + pic->priority_add) & 7) : -1;
}

/* The slave's output is the master's line 2. */
static void pic_cascade(struct irqchip *chips)
{
    bool asks = pic_request(&chips->pic[SLAVE], false) >= 0;
    if (asks) /* an edge for each request */
        pic_drive(&chips->pic[MASTER], CASCADE_LINE, false);
    pic_drive(&chips->pic[MASTER], CASCADE_LINE, asks);
}

static void pic_serve(struct pyhv_pic *pic, unsigned line)
{
    uint8_t mask = (uint8_t)(1u << line);
    if (!(pic->elcr & mask))
        pic->irr &= (uint8_t)~mask;
    if (!pic->auto_eoi)
        pic->isr |= mask;
    else if (pic->rotate_on_auto_eoi)
        pic->priority_add = (uint8_t)((line + 1) & 7);
}

static bool pic_pending(const struct irqchip *chips)
{
    return pic_request(&chips->pic[MASTER], true) >= 0;
}

static int pic_acknowledge(struct irqchip *chips)
{
    struct pyhv_pic *master = &chips->pic[MASTER], *slave = &chips->pic[SLAVE];
    int line = pic_request(master, true);
    if (line < 0)
        return master->irq_base + SPURIOUS_LINE;
    pic_serve(master, (unsigned)line);
    if (line != CASCADE_LINE)
        return master->irq_base + line;
    line = pic_request(slave, false);
    if (line < 0)
        return slave->irq_base + SPURIOUS_LINE;
    pic_serve(slave, (unsigned)line);
    pic_cascade(chips);
    return slave->irq_base + line;
}

/* OCW2: ends of interrupt and priorities. */
static void pic_end(struct pyhv_pic *pic, uint8_t value)
{
    unsigned command = value >> 5, line = value & 7u;
    bool specific = command & 2;
    if (command == 0 || command == 4) {
        pic->rotate_on_auto_eoi = command == 4;
        return;
    }
    if (command == 2)
        return;
    if (command != 6) {
        if (!specific) {
            unsigned priority = pic_priority(pic, pic->isr);
            if (priority == NO_PRIORITY)
                return;
            line = (priority + pic->priority_add) & 7;
        }
        pic->isr &= (uint8_t) ~(1u << line);
    }
    if (command & 4)
        pic->priority_add = (uint8_t)((line + 1) & 7);
}

static void pic_write(struct irqchip *chips, unsigned which, bool data, uint8_t value)
{
    struct pyhv_pic *pic = &chips->pic[which];
    if (!data) {
        if (value & 0x10) { /* ICW1 */
            pic->init4 = value & 1;
            pic->last_irr = pic->imr = pic->isr = pic->priority_add = pic->special_mask = pic->read_reg_select = 0;
            pic->special_fully_nested_mode = pic->auto_eoi = pic->rotate_on_auto_eoi = pic->poll = 0;
            pic->irr &= pic->elcr;
            pic->init_state = PIC_WANTS_BASE;
        } else if (value & 8) { /* OCW3 */
            pic->poll = value >> 2 & 1;
            if (value & 2)
                pic->read_reg_select = value & 1;
            if (value & 0x40)
                pic->special_mask = value >> 5 & 1;
        } else {
            pic_end(pic, value);
        }
    } else {
        switch (pic->init_state) {
        case PIC_READY:
            pic->imr = value;
            break;
        case PIC_WANTS_BASE:
            pic->irq_base = value & 0xf8;
            pic->init_state = PIC_WANTS_CASCADE;
            break;
        case PIC_WANTS_CASCADE:
            pic->init_state = pic->init4 ? PIC_WANTS_MODE : PIC_READY;
            break;
        default:
            pic->special_fully_nested_mode = value >> 4 & 1;
            pic->auto_eoi = value >> 1 & 1;
            pic->init_state = PIC_READY;
        }
    }
    pic_cascade(chips);
}

static uint8_t pic_read(struct irqchip *chips, unsigned which, bool data)
{
    struct pyhv_pic *pic = &chips->pic[which];
    if (pic->poll) { /* reading is acknowledging then */
        int line = pic_request(pic, which == MASTER);
        pic->poll = 0;
        if (line < 0)
            return SPURIOUS_LINE;
        pic_serve(pic, (unsigned)line);
        pic_cascade(chips);
        return (uint8_t)(0x80 | line);
    }
    if (data)
        return pic->imr;
    return pic->read_reg_select ? pic->isr : pic->irr;
}

/* ---------------------------------------------------------------------------------------------- local APIC -- */

enum {
    LAPIC_ID = 0x20,
    LAPIC_VERSION = 0x30,
    LAPIC_TPR = 0x80,
    LAPIC_PPR = 0xa0,
    LAPIC_EOI = 0xb0,
    LAPIC_LDR = 0xd0,
    LAPIC_DFR = 0xe0,
    LAPIC_SVR = 0xf0,
    LAPIC_ISR = 0x100,
    LAPIC_TMR = 0x180,
    LAPIC_IRR = 0x200,
    LAPIC_ESR = 0x280,
    LAPIC_ICR = 0x300,
    LAPIC_ICR_HIGH = 0x310,
    LAPIC_LVT_TIMER = 0x320,
    LAPIC_LVT_THERMAL = 0x330,
    LAPIC_LVT_COUNTER = 0x340,
    LAPIC_LVT_LINT0 = 0x350,
    LAPIC_LVT_LINT1 = 0x360,
    LAPIC_LVT_ERROR = 0x370,
    LAPIC_INITIAL_COUNT = 0x380,
    LAPIC_CURRENT_COUNT = 0x390,
    LAPIC_DIVIDE = 0x3e0,
};
enum { LVT_MASKED = 1 << 16, LVT_PERIODIC = 1 << 17, SVR_ENABLED = 1 << 8, MODE_NMI = 4, MODE_EXTINT = 7 };

static uint32_t lapic_get(const struct lapic *lapic, unsigned reg)
{
    uint32_t value;
    memcpy(&value, lapic->page + reg, sizeof value);
    return value;
}

static void lapic_set(struct lapic *lapic, unsigned reg, uint32_t value)
{
    memcpy(lapic->page + reg, &value, sizeof value);
}

/* A vector's bit in ISR, TMR or IRR: 32 to a register, which are 16 bytes apart. */
static void lapic_set_bit(struct lapic *lapic, unsigned bank, unsigned vector, bool on)
{
    unsigned reg = bank + vector / 32 * 16;
    uint32_t bits = lapic_get(lapic, reg);
    lapic_set(lapic, reg, on ? bits | 1u << vector % 32 : bits & ~(1u << vector % 32));
}

static bool lapic_bit(const struct lapic *lapic, unsigned bank, unsigned vector)
{
    return lapic_get(lapic, bank + vector / 32 * 16) >> vector % 32 & 1;
}

static int lapic_highest(const struct lapic *lapic, unsigned bank)
{
    for (int word = 7; word >= 0; word--) {
        uint32_t bits = lapic_get(lapic, bank + (unsigned)word * 16);
        if (bits)
            return word * 32 + 31 - __builtin_clz(bits);
    }
    return -1;
}

static unsigned lapic_priority(const struct lapic *lapic)
{
    unsigned task = lapic_get(lapic, LAPIC_TPR) & 0xff;
    int served = lapic_highest(lapic, LAPIC_ISR);
    if (served >= 0 && (unsigned)served >> 4 > task >> 4)
        return (unsigned)served & 0xf0;
    return task;
}

static bool lapic_enabled(const struct lapic *lapic)
{
    return lapic_get(lapic, LAPIC_SVR) & SVR_ENABLED;
}

static int lapic_request(const struct lapic *lapic)
{
    int vector = lapic_highest(lapic, LAPIC_IRR);
    return vector >= 0 && lapic_enabled(lapic) && (unsigned)vector >> 4 > lapic_priority(lapic) >> 4 ? vector : -1;
}

static void lapic_accept(struct irqchip *chips, unsigned mode, unsigned vector, bool level)
{
    struct lapic *lapic = &chips->lapic;
    if (mode == MODE_NMI) {
        chips->nmi_pending = true;
    } else if (mode <= 1 && vector >= 16 && lapic_enabled(lapic)) {
        lapic_set_bit(lapic, LAPIC_IRR, vector, true);
        lapic_set_bit(lapic, LAPIC_TMR, vector, level);
    }
}

static bool lapic_is_destination(const struct lapic *lapic, bool logical, uint8_t destination)
{
    if (!logical)
        return destination == 0xff || destination == lapic_get(lapic, LAPIC_ID) >> 24;
    uint8_t own = (uint8_t)(lapic_get(lapic, LAPIC_LDR) >> 24);
    if (lapic_get(lapic, LAPIC_DFR) >> 28 == 0xf) /* flat model */
        return own & destination;
    return (destination >> 4 == 0xf || own >> 4 == destination >> 4) && (own & destination & 0xf);
}

static bool lapic_takes_extint(const struct lapic *lapic)
{
    uint32_t lint0 = lapic_get(lapic, LAPIC_LVT_LINT0);
    return !(lint0 & LVT_MASKED) && (lint0 >> 8 & 7) == MODE_EXTINT;
}

/* Linux's NMI watchdog was made of it. */
static bool lapic_lint0_is_nmi(const struct lapic *lapic)
{
    uint32_t lint0 = lapic_get(lapic, LAPIC_LVT_LINT0);
    return !(lint0 & LVT_MASKED) && (lint0 >> 8 & 7) == MODE_NMI;
}

/* Nanoseconds a tick: KVM's APIC counts 1 GHz of bus cycles, which guests may have measured. */
static int64_t lapic_tick(const struct lapic *lapic)
{
    uint32_t divide = lapic_get(lapic, LAPIC_DIVIDE);
    return INT64_C(1) << ((((divide & 3) | (divide & 8) >> 1) + 1) & 7);
}

static void lapic_start_timer(struct lapic *lapic, uint32_t from, int64_t now)
{
    lapic->timer_runs = from > 0;
    lapic->timer_from = from;
    lapic->timer_start = now;
}

/* A guest that asks for more interrupts than it can take would do nothing else. Timers interrupt it once in so many of
 * their periods that there is this much time between, in ns: as KVM has it (its parameter min_timer_period_us). */
#define TIMER_LEAST INT64_C(200000)

static int64_t periods_apart(int64_t period, int64_t least)
{
    return period > 0 && period < least ? (least + period - 1) / period : 1;
}

static int64_t lapic_deadline(const struct lapic *lapic)
{
    if (!lapic->timer_runs)
        return NO_DEADLINE;
    int64_t deadline = lapic->timer_start + lapic->timer_from * lapic_tick(lapic);
    if (lapic_get(lapic, LAPIC_LVT_TIMER) & LVT_PERIODIC) {
        int64_t period = lapic_get(lapic, LAPIC_INITIAL_COUNT) * lapic_tick(lapic);
        deadline += (periods_apart(period, TIMER_LEAST) - 1) * period;
    }
    return deadline;
}

static void lapic_update_timer(struct irqchip *chips, int64_t now)
{
    struct lapic *lapic = &chips->lapic;
    int64_t deadline = lapic_deadline(lapic);
    if (now < deadline)
        return;
    uint32_t lvt = lapic_get(lapic, LAPIC_LVT_TIMER);
    if (lvt & LVT_PERIODIC) { /* periods that went by unseen are one */
        int64_t period = lapic_get(lapic, LAPIC_INITIAL_COUNT) * lapic_tick(lapic);
        lapic_start_timer(lapic, lapic_get(lapic, LAPIC_INITIAL_COUNT), now);
        if (period > 0)
            lapic->timer_start = now - (now - deadline) % period;
    } else {
        lapic->timer_runs = false;
    }
    if (!(lvt & LVT_MASKED))
        lapic_accept(chips, 0, lvt & 0xff, false);
}

static uint32_t lapic_current_count(const struct lapic *lapic, int64_t now)
{
    if (!lapic->timer_runs)
        return 0;
    int64_t left = lapic->timer_from - (now - lapic->timer_start) / lapic_tick(lapic);
    int64_t initial = lapic_get(lapic, LAPIC_INITIAL_COUNT);
    if (left <= 0 && initial > 0 && (lapic_get(lapic, LAPIC_LVT_TIMER) & LVT_PERIODIC))
        left = initial - -left % initial;
    return left > 0 ? (uint32_t)left : 0;
}

static void ioapic_end(struct irqchip *chips, unsigned vector);

static void lapic_end(struct irqchip *chips)
{
    struct lapic *lapic = &chips->lapic;
    int vector = lapic_highest(lapic, LAPIC_ISR);
    if (vector < 0)
        return;
    lapic_set_bit(lapic, LAPIC_ISR, (unsigned)vector, false);
    if (lapic_bit(lapic, LAPIC_TMR, (unsigned)vector))
        ioapic_end(chips, (unsigned)vector);
}

/* An interrupt to somebody: there is nobody but this processor. */
static void lapic_send(struct irqchip *chips, uint32_t command)
{
    const struct lapic *lapic = &chips->lapic;
    unsigned shorthand = command >> 18 & 3;
    uint8_t destination = (uint8_t)(lapic_get(lapic, LAPIC_ICR_HIGH) >> 24);
    if (shorthand == 1 || shorthand == 2 ||
        (shorthand == 0 && lapic_is_destination(lapic, command >> 11 & 1, destination)))
        lapic_accept(chips, command >> 8 & 7, command & 0xff, false);
}

static void lapic_reset(struct lapic *lapic)
{
    *lapic = (struct lapic){0};
    lapic_set(lapic, LAPIC_VERSION, 0x50014);
    lapic_set(lapic, LAPIC_DFR, 0xffffffff);
    lapic_set(lapic, LAPIC_SVR, 0xff);
    for (unsigned lvt = LAPIC_LVT_TIMER; lvt <= LAPIC_LVT_ERROR; lvt += 0x10)
        lapic_set(lapic, lvt, LVT_MASKED);
    /* Virtual wire, as firmware would leave it: the 8259As' interrupts reach the boot processor. */
    lapic_set(lapic, LAPIC_LVT_LINT0, MODE_EXTINT << 8);
}

static uint32_t lapic_read(struct irqchip *chips, unsigned reg, int64_t now)
{
    struct lapic *lapic = &chips->lapic;
    if (reg == LAPIC_CURRENT_COUNT) {
        lapic_update_timer(chips, now);
        return lapic_current_count(lapic, now);
    }
    if (reg == LAPIC_PPR)
        return lapic_priority(lapic);
    return reg < PYHV_LAPIC_SIZE ? lapic_get(lapic, reg) : 0;
}

static void lapic_write(struct irqchip *chips, unsigned reg, uint32_t value, int64_t now)
{
    struct lapic *lapic = &chips->lapic;
    switch (reg) {
    case LAPIC_ID:
        lapic_set(lapic, reg, value & 0xff000000);
        break;
    case LAPIC_TPR:
        lapic_set(lapic, reg, value & 0xff);
        break;
    case LAPIC_EOI:
        lapic_end(chips);
        break;
    case LAPIC_LDR:
        lapic_set(lapic, reg, value & 0xff000000);
        break;
    case LAPIC_DFR:
        lapic_set(lapic, reg, value | 0x0fffffff);
        break;
    case LAPIC_SVR:
        lapic_set(lapic, reg, value & 0x3ff);
        if (!(value & SVR_ENABLED)) /* it masks its own sources then */
            for (unsigned lvt = LAPIC_LVT_TIMER; lvt <= LAPIC_LVT_ERROR; lvt += 0x10)
                lapic_set(lapic, lvt, lapic_get(lapic, lvt) | LVT_MASKED);
        break;
    case LAPIC_ESR:
        lapic_set(lapic, reg, 0);
        break;
    case LAPIC_ICR:
        lapic_set(lapic, reg, value & ~(1u << 12)); /* sent at once */
        lapic_send(chips, value);
        break;
    case LAPIC_ICR_HIGH:
        lapic_set(lapic, reg, value & 0xff000000);
        break;
    case LAPIC_LVT_TIMER:
    case LAPIC_LVT_THERMAL:
    case LAPIC_LVT_COUNTER:
    case LAPIC_LVT_LINT0:
    case LAPIC_LVT_LINT1:
    case LAPIC_LVT_ERROR:
        lapic_set(lapic, reg, lapic_enabled(lapic) ? value : value | LVT_MASKED);
        break;
    case LAPIC_INITIAL_COUNT:
        lapic_set(lapic, reg, value);
        lapic_start_timer(lapic, value, now);
        break;
    case LAPIC_DIVIDE: {
        uint32_t left = lapic_current_count(lapic, now);
        lapic_set(lapic, reg, value & 0xb);
        lapic_start_timer(lapic, left, now);
        break;
    }
    default: /* reserved, or read-only */
        break;
    }
}

void irqchip_save_lapic(struct irqchip *chips, uint8_t *page, int64_t now)
{
    lapic_update_timer(chips, now);
    memcpy(page, chips->lapic.page, PYHV_LAPIC_SIZE);
    uint32_t values[2] = {lapic_priority(&chips->lapic), lapic_current_count(&chips->lapic, now)};
    memcpy(page + LAPIC_PPR, &values[0], sizeof values[0]);
    memcpy(page + LAPIC_CURRENT_COUNT, &values[1], sizeof values[1]);
}

void irqchip_load_lapic(struct irqchip *chips, const uint8_t *page, int64_t now)
{
    struct lapic *lapic = &chips->lapic;
    memcpy(lapic->page, page, PYHV_LAPIC_SIZE);
    uint32_t initial = lapic_get(lapic, LAPIC_INITIAL_COUNT), left = lapic_get(lapic, LAPIC_CURRENT_COUNT);
    /* A count that ran out just before KVM was asked looks like one whose interrupt was delivered. Like KVM it is
     * delivered then, for a guest gets over one too many, but not over one that is lost. */
    if (left == 0 && initial > 0)
        left = lapic_get(lapic, LAPIC_LVT_TIMER) & LVT_PERIODIC ? initial : 1;
    lapic_start_timer(lapic, left, now);
}

void irqchip_set_cr8(struct irqchip *chips, uint8_t cr8)
{
    lapic_set(&chips->lapic, LAPIC_TPR, (uint32_t)(cr8 & 0xf) << 4);
}

uint8_t irqchip_cr8(const struct irqchip *chips)
{
    return (uint8_t)(lapic_get(&chips->lapic, LAPIC_TPR) >> 4 & 0xf);
}

/* ------------------------------------------------------------------------------------------------ I/O APIC -- */

enum { IOAPIC_SELECT = 0x00, IOAPIC_WINDOW = 0x10, IOAPIC_REDIRECTION = 0x10, IOAPIC_MAXIMUM = 0x170011 };
#define ENTRY_LOGICAL    (1u << 11)
#define ENTRY_REMOTE_IRR (UINT64_C(1) << 14)
#define ENTRY_LEVEL      (1u << 15)
#define ENTRY_MASKED     (1u << 16)

/* Sends what waits at a pin. */
static void ioapic_service(struct irqchip *chips, unsigned pin)
{
    struct pyhv_ioapic *ioapic = &chips->ioapic;
    uint64_t *entry = &ioapic->redirection[pin];
    bool level = *entry & ENTRY_LEVEL;
    if (!(ioapic->irr >> pin & 1) || (*entry & ENTRY_MASKED) || (level && (*entry & ENTRY_REMOTE_IRR)))
        return;
    if (level)
        *entry |= ENTRY_REMOTE_IRR;
    else
        ioapic->irr &= ~(1u << pin);
    if (lapic_is_destination(&chips->lapic, *entry & ENTRY_LOGICAL, (uint8_t)(*entry >> 56)))
        lapic_accept(chips, *entry >> 8 & 7, *entry & 0xff, level);
}

static void ioapic_drive(struct irqchip *chips, unsigned pin, bool level)
{
    if (level)
        chips->ioapic.irr |= 1u << pin;
    else if (chips->ioapic.redirection[pin] & ENTRY_LEVEL)
        chips->ioapic.irr &= ~(1u << pin);
    ioapic_service(chips, pin);
}

static void ioapic_end(struct irqchip *chips, unsigned vector)
{
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++) {
        uint64_t *entry = &chips->ioapic.redirection[pin];
        if ((*entry & ENTRY_LEVEL) && (*entry & 0xff) == vector) {
            *entry &= ~ENTRY_REMOTE_IRR;
            ioapic_service(chips, pin);
        }
    }
}

static uint32_t ioapic_read(const struct irqchip *chips, unsigned offset)
{
    const struct pyhv_ioapic *ioapic = &chips->ioapic;
    if (offset == IOAPIC_SELECT)
        return ioapic->ioregsel;
    if (offset != IOAPIC_WINDOW)
        return 0;
    if (ioapic->ioregsel == 0 || ioapic->ioregsel == 2)
        return (ioapic->id & 0xf) << 24;
    if (ioapic->ioregsel == 1)
        return IOAPIC_MAXIMUM;
    unsigned pin = (ioapic->ioregsel - IOAPIC_REDIRECTION) / 2;
    if (ioapic->ioregsel < IOAPIC_REDIRECTION || pin >= IOAPIC_PINS)
        return 0;
    return (uint32_t)(ioapic->redirection[pin] >> (ioapic->ioregsel & 1 ? 32 : 0));
}

static void ioapic_write(struct irqchip *chips, unsigned offset, uint32_t value)
{
    struct pyhv_ioapic *ioapic = &chips->ioapic;
    if (offset == IOAPIC_SELECT)
        ioapic->ioregsel = value & 0xff;
    if (offset != IOAPIC_WINDOW)
        return;
    if (ioapic->ioregsel == 0)
        ioapic->id = value >> 24 & 0xf;
    unsigned pin = (ioapic->ioregsel - IOAPIC_REDIRECTION) / 2;
    if (ioapic->ioregsel < IOAPIC_REDIRECTION || pin >= IOAPIC_PINS)
        return;
    uint64_t *entry = &ioapic->redirection[pin];
    if (ioapic->ioregsel & 1) {
        *entry = (*entry & UINT32_MAX) | (uint64_t)value << 32;
    } else {
        const uint64_t fixed = ENTRY_REMOTE_IRR | 1u << 12; /* read-only: remote IRR, delivery status */
        *entry = (*entry & (fixed | ~(uint64_t)UINT32_MAX)) | (value & ~fixed);
        if (!(*entry & ENTRY_LEVEL))
            *entry &= ~ENTRY_REMOTE_IRR;
    }
    ioapic_service(chips, pin);
}

/* -------------------------------------------------------------------------------------------------- 8254 -- */

#define PIT_HZ INT64_C(1193182)
enum { ACCESS_LOW = 1, ACCESS_HIGH = 2, ACCESS_BOTH = 3, ACCESS_SECOND = 4 };

static int64_t pit_ticks(const struct pyhv_pit_channel *channel, int64_t now)
{
    return (int64_t)((__int128)(now - channel->count_load_time) * PIT_HZ / 1000000000);
}

static int64_t pit_time(const struct pyhv_pit_channel *channel, int64_t ticks)
{
    return channel->count_load_time + (int64_t)(((__int128)ticks * 1000000000 + PIT_HZ - 1) / PIT_HZ);
}

static bool pit_is_periodic(const struct pyhv_pit_channel *channel)
{
    return channel->mode == 2 || channel->mode == 3;
}

static uint16_t pit_count(const struct pyhv_pit_channel *channel, int64_t now)
{
    int64_t ticks = pit_ticks(channel, now), initial = channel->initial_count;
    if (initial == 0)
        return 0;
    if (channel->mode == 3) /* counts down by two */
        return (uint16_t)(initial - 2 * ticks % initial);
    if (channel->mode == 2)
        return (uint16_t)(initial - ticks % initial);
    return (uint16_t)(initial - ticks);
}

static bool pit_output(const struct pyhv_pit_channel *channel, int64_t now)
{
    int64_t ticks = pit_ticks(channel, now), initial = channel->initial_count;
    if (initial == 0)
        return false;
    switch (channel->mode) {
    case 0:
        return ticks >= initial;
    case 1:
        return ticks < initial;
    case 2:
        return ticks % initial == 0 && ticks != 0;
    case 3:
        return ticks % initial < (initial + 1) / 2;
    default:
        return ticks == initial;
    }
}

/* When channel 0 raises its interrupt next, after `after`. */
static int64_t pit_deadline(const struct irqchip *chips, int64_t after)
{
    const struct pyhv_pit_channel *channel = &chips->pit[0];
    if (!chips->has_pit || channel->initial_count == 0)
        return NO_DEADLINE;
    int64_t periods = 1, apart = 1;
    if (pit_is_periodic(channel))
        apart = periods_apart(channel->initial_count, TIMER_LEAST * PIT_HZ / 1000000000);
    if (pit_is_periodic(channel) && after >= channel->count_load_time)
        periods = pit_ticks(channel, after) / (apart * channel->initial_count) + 1;
    int64_t deadline = pit_time(channel, periods * apart * channel->initial_count);
    return deadline > after ? deadline : NO_DEADLINE;
}

static void pit_update(struct irqchip *chips, int64_t now)
{
    if (pit_deadline(chips, chips->pit_counted) <= now) { /* periods that went by unseen are one */
        irqchip_set_line(chips, 0, true);
        irqchip_set_line(chips, 0, false);
        if (lapic_lint0_is_nmi(&chips->lapic)) /* as KVM does, whatever the 8259A makes of the line */
            chips->nmi_pending = true;
    }
    chips->pit_counted = now;
}

static void pit_load(struct irqchip *chips, unsigned which, uint32_t value, int64_t now)
{
    chips->pit[which].initial_count = value ? value : 0x10000;
    chips->pit[which].count_load_time = now;
    if (which == 0)
        chips->pit_counted = now;
}

static void pit_latch(struct pyhv_pit_channel *channel, int64_t now)
{
    if (!channel->count_latched) {
        channel->latched_count = pit_count(channel, now);
        channel->count_latched = channel->rw_mode;
    }
}

static void pit_control(struct irqchip *chips, uint8_t value, int64_t now)
{
    unsigned which = value >> 6, access = value >> 4 & 3;
    if (which == 3) { /* read back */
        for (unsigned i = 0; i < 3; i++) {
            struct pyhv_pit_channel *channel = &chips->pit[i];
            if (!(value & 2u << i))
                continue;
            if (!(value & 0x20))
                pit_latch(channel, now);
            if (!(value & 0x10) && !channel->status_latched) {
                channel->status = (uint8_t)(pit_output(channel, now) << 7 | channel->rw_mode << 4 | channel->mode << 1 |
                                            channel->bcd);
                channel->status_latched = 1;
            }
        }
        return;
    }
    struct pyhv_pit_channel *channel = &chips->pit[which];
    if (access == 0) {
        pit_latch(channel, now);
        return;
    }
    channel->rw_mode = channel->read_state = channel->write_state = (uint8_t)access;
    channel->mode = value >> 1 & 7;
    if (channel->mode > 5)
        channel->mode -= 4;
    channel->bcd = value & 1;
}

static void pit_write(struct irqchip *chips, unsigned which, uint8_t value, int64_t now)
{
    struct pyhv_pit_channel *channel = &chips->pit[which];
    switch (channel->write_state) {
    case ACCESS_HIGH:
        pit_load(chips, which, (uint32_t)value << 8, now);
        break;
    case ACCESS_BOTH:
        channel->write_latch = value;
        channel->write_state = ACCESS_SECOND;
        break;
    case ACCESS_SECOND:
        pit_load(chips, which, channel->write_latch | (uint32_t)value << 8, now);
        channel->write_state = ACCESS_BOTH;
        break;
    default:
        pit_load(chips, which, value, now);
    }
}

static uint8_t pit_read(struct pyhv_pit_channel *channel, int64_t now)
{
    if (channel->status_latched) {
        channel->status_latched = 0;
        return channel->status;
    }
    if (channel->count_latched) {
        uint8_t how = channel->count_latched;
        channel->count_latched = how == ACCESS_BOTH ? ACCESS_HIGH : 0;
        return (uint8_t)(how == ACCESS_HIGH ? channel->latched_count >> 8 : channel->latched_count);
    }
    uint16_t count = pit_count(channel, now);
    switch (channel->read_state) {
    case ACCESS_HIGH:
        return (uint8_t)(count >> 8);
    case ACCESS_BOTH:
        channel->read_state = ACCESS_SECOND;
        return (uint8_t)count;
    case ACCESS_SECOND:
        channel->read_state = ACCESS_BOTH;
        return (uint8_t)(count >> 8);
    default:
        return (uint8_t)count;
    }
}

static void pit_write_gate(struct irqchip *chips, uint8_t value, int64_t now)
{
    struct pyhv_pit_channel *channel = &chips->pit[2];
    bool gate = value & 1;
    if (gate && !channel->gate && channel->mode != 0 && channel->mode != 4) /* its rise begins the count anew */
        channel->count_load_time = now;
    channel->gate = gate;
    chips->speaker = value & 2;
}

/* Bit 4 toggles with each refresh of memory, every 15 microseconds; some old code counts by it. */
static uint8_t pit_read_gate(const struct irqchip *chips, int64_t now)
{
    const struct pyhv_pit_channel *channel = &chips->pit[2];
    return (uint8_t)((channel->gate & 1) | chips->speaker << 1 | (now / 15000 & 1) << 4 |
                     pit_output(channel, now) << 5);
}

/* ------------------------------------------------------------------------------------------------ together -- */

void irqchip_reset(struct irqchip *chips, bool has_pit, int64_t now)
{
    *chips = (struct irqchip){.has_pit = has_pit, .pit_counted = now};
    chips->pic[MASTER].elcr_mask = 0xf8; /* timer, keyboard and cascade are edges */
    chips->pic[SLAVE].elcr_mask = 0xde;  /* so are the clock and the coprocessor */
    lapic_reset(&chips->lapic);
    chips->ioapic.base_address = IOAPIC_BASE;
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++)
        chips->ioapic.redirection[pin] = ENTRY_MASKED;
    for (unsigned i = 0; has_pit && i < 3; i++) {
        chips->pit[i].mode = 3;
        chips->pit[i].gate = i != 2;
    }
}

void irqchip_set_line(struct irqchip *chips, uint32_t gsi, bool level)
{
    if (gsi < 16) {
        pic_drive(&chips->pic[gsi >> 3], gsi & 7, level);
        pic_cascade(chips);
    }
    if (gsi < IOAPIC_PINS)
        ioapic_drive(chips, gsi, level);
}

int64_t irqchip_update(struct irqchip *chips, int64_t now)
{
    lapic_update_timer(chips, now);
    pit_update(chips, now);
    int64_t timer = lapic_deadline(&chips->lapic), pit = pit_deadline(chips, now);
    if (chips->lapic.timer_runs && (lapic_get(&chips->lapic, LAPIC_LVT_TIMER) & LVT_MASKED))
        timer = NO_DEADLINE; /* nobody will notice */
    return timer < pit ? timer : pit;
}

bool irqchip_waiting(const struct irqchip *chips)
{
    return lapic_highest(&chips->lapic, LAPIC_IRR) >= 0 || chips->nmi_pending ||
           (pic_pending(chips) && lapic_takes_extint(&chips->lapic));
}

bool irqchip_may_send_nmi(const struct irqchip *chips, bool masked)
{
    if (masked)
        return false;
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++)
        if (!(chips->ioapic.redirection[pin] & ENTRY_MASKED) && (chips->ioapic.redirection[pin] >> 8 & 7) == MODE_NMI)
            return true;
    return chips->nmi_pending || (chips->has_pit && lapic_lint0_is_nmi(&chips->lapic));
}

bool irqchip_pending(const struct irqchip *chips)
{
    return lapic_request(&chips->lapic) >= 0 || (pic_pending(chips) && lapic_takes_extint(&chips->lapic));
}

int irqchip_acknowledge(struct irqchip *chips)
{
    if (pic_pending(chips) && lapic_takes_extint(&chips->lapic))
        return pic_acknowledge(chips);
    int vector = lapic_request(&chips->lapic);
    if (vector < 0)
        return NO_INTERRUPT;
    lapic_set_bit(&chips->lapic, LAPIC_IRR, (unsigned)vector, false);
    lapic_set_bit(&chips->lapic, LAPIC_ISR, (unsigned)vector, true);
    return vector;
}

bool irqchip_owns_port(const struct irqchip *chips, uint32_t port)
{
    switch (port) {
    case 0x20:
    case 0x21:
    case 0xa0:
    case 0xa1:
    case 0x4d0:
    case 0x4d1:
        return true;
    case 0x40:
    case 0x41:
    case 0x42:
    case 0x43:
    case 0x61:
        return chips->has_pit;
    default:
        return false;
    }
}

uint8_t irqchip_read_port(struct irqchip *chips, uint32_t port, int64_t now)
{
    switch (port) {
    case 0x20:
    case 0x21:
    case 0xa0:
    case 0xa1:
        return pic_read(chips, port >> 7, port & 1);
    case 0x4d0:
    case 0x4d1:
        return chips->pic[port & 1].elcr;
    case 0x61:
        return pit_read_gate(chips, now);
    case 0x43:
        return 0; /* write-only */
    default:
        return pit_read(&chips->pit[port & 3], now);
    }
}

void irqchip_write_port(struct irqchip *chips, uint32_t port, uint8_t value, int64_t now)
{
    switch (port) {
    case 0x20:
    case 0x21:
    case 0xa0:
    case 0xa1:
        pic_write(chips, port >> 7, port & 1, value);
        break;
    case 0x4d0:
    case 0x4d1:
        chips->pic[port & 1].elcr = value & chips->pic[port & 1].elcr_mask;
        break;
    case 0x61:
        pit_write_gate(chips, value, now);
        break;
    case 0x43:
        pit_control(chips, value, now);
        break;
    default:
        pit_write(chips, port & 3, value, now);
    }
}

bool irqchip_owns_memory(uint64_t gpa)
{
    return gpa - LAPIC_BASE < PYHV_PAGE_SIZE || gpa - IOAPIC_BASE < PYHV_PAGE_SIZE;
}

uint32_t irqchip_read_memory(struct irqchip *chips, uint64_t gpa, int64_t now)
{
    if (gpa - LAPIC_BASE < PYHV_PAGE_SIZE)
        return lapic_read(chips, (unsigned)(gpa - LAPIC_BASE), now);
    return ioapic_read(chips, (unsigned)(gpa - IOAPIC_BASE));
}

void irqchip_write_memory(struct irqchip *chips, uint64_t gpa, uint32_t value, int64_t now)
{
    if (gpa - LAPIC_BASE < PYHV_PAGE_SIZE)
        lapic_write(chips, (unsigned)(gpa - LAPIC_BASE), value, now);
    else
        ioapic_write(chips, (unsigned)(gpa - IOAPIC_BASE), value);
}

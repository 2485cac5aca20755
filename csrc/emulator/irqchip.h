/* SPDX-License-Identifier: MIT
 *
 * The interrupt controllers and the timer of a PC, for one processor: two 8259A, an I/O APIC, a local APIC, an 8254.
 */
#ifndef PYHV_EMULATOR_IRQCHIP_H
#define PYHV_EMULATOR_IRQCHIP_H

#include <stdbool.h>
#include <stdint.h>

#include "pyhv.h"

#define LAPIC_BASE   UINT64_C(0xfee00000)
#define IOAPIC_BASE  UINT64_C(0xfec00000)
#define IOAPIC_PINS  24
#define NO_INTERRUPT (-1)
#define NO_DEADLINE  INT64_MAX

struct lapic {
    uint8_t page[PYHV_LAPIC_SIZE]; /* its registers as the guest sees them */
    int64_t timer_start;           /* CLOCK_MONOTONIC ns when the count began; meaningful while it runs */
    uint32_t timer_from;           /* the count that it began with */
    bool timer_runs;
};

struct irqchip {
    struct pyhv_pic pic[2];
    struct pyhv_ioapic ioapic;
    struct lapic lapic;
    struct pyhv_pit_channel pit[3]; /* count_load_time: CLOCK_MONOTONIC in ns */
    bool has_pit;
    bool speaker;        /* bit 1 of port 0x61, whose bit 0 is the gate of channel 2 */
    int64_t pit_counted; /* CLOCK_MONOTONIC ns up to which channel 0's output has been looked at */
    bool nmi_pending;
};

/* As after power-on. */
void irqchip_reset(struct irqchip *chips, bool has_pit, int64_t now);

/* A line of the ISA bus, or with gsi 16 to 23 one of the I/O APIC's own. */
void irqchip_set_line(struct irqchip *chips, uint32_t gsi, bool level);

/* Brings what depends on time up to `now`: timers that have run out raise their interrupts. Returns when something will
 * happen next, NO_DEADLINE if nothing will. */
int64_t irqchip_update(struct irqchip *chips, int64_t now);

/* Whether an interrupt waits, be it held back by the task's priority. */
bool irqchip_waiting(const struct irqchip *chips);

/* Whether the processor may get an NMI: one waits that is not masked, or a line or the PIT makes them. Nothing else wakes a
 * processor that has switched interrupts off. */
bool irqchip_may_send_nmi(const struct irqchip *chips, bool masked);

/* Whether the processor would get one, at its task priority. */
bool irqchip_pending(const struct irqchip *chips);

/* Takes it: its vector, or NO_INTERRUPT. */
int irqchip_acknowledge(struct irqchip *chips);

/* Ports: 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1; with a PIT 0x40 to 0x43 and 0x61. */
bool irqchip_owns_port(const struct irqchip *chips, uint32_t port);
uint8_t irqchip_read_port(struct irqchip *chips, uint32_t port, int64_t now);
void irqchip_write_port(struct irqchip *chips, uint32_t port, uint8_t value, int64_t now);

/* Registers in memory: true if the address is one of the controllers'. */
bool irqchip_owns_memory(uint64_t gpa);
uint32_t irqchip_read_memory(struct irqchip *chips, uint64_t gpa, int64_t now);
void irqchip_write_memory(struct irqchip *chips, uint64_t gpa, uint32_t value, int64_t now);

/* CR8 is bits 7:4 of the local APIC's task priority. */
void irqchip_set_cr8(struct irqchip *chips, uint8_t cr8);
uint8_t irqchip_cr8(const struct irqchip *chips);

/* The registers for a saved state, and back. */
void irqchip_save_lapic(struct irqchip *chips, uint8_t *page, int64_t now);
void irqchip_load_lapic(struct irqchip *chips, const uint8_t *page, int64_t now);

#endif

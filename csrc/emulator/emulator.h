/* SPDX-License-Identifier: MIT
 *
 * What the files of csrc/emulator share: the VM and vCPU objects.
 *
 * The library executes instructions and walks page tables. All else that a processor does is here: exceptions,
 * interrupts and system calls through the guest's own tables (events.c), the interrupt controllers (irqchip.c), and
 * devices, which are called while the instruction executes (vcpu.c).
 */
#ifndef PYHV_EMULATOR_EMULATOR_H
#define PYHV_EMULATOR_EMULATOR_H

#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "accel.h"
#include "emulator/irqchip.h"
#include "emulator/library.h"
#include "kick.h"

/* Which pages were written; see dirty.c. */
struct emulator_dirty {
    enum { DIRTY_OFF, DIRTY_BY_SCAN, DIRTY_BY_FAULT } how;
    int userfault;     /* DIRTY_BY_SCAN: its descriptor */
    int pagemap;       /* /proc/self/pagemap */
    uint64_t *written; /* DIRTY_BY_FAULT: a bit a page, in the order of the slots; kept from its first time on */
};

struct pyhv_emulator_vcpu;

struct pyhv_emulator_vm {
    struct pyhv_vm base;
    uint32_t tsc_khz;
    struct pyhv_emulator_vcpu *vcpu; /* the only one, once it is there */
    struct emulator_dirty dirty;

    /* `lock` covers what follows: devices raise interrupts from any thread. */
    pthread_mutex_t lock;
    pthread_cond_t wake; /* of the vCPU in HLT; CLOCK_MONOTONIC */
    struct irqchip chips;
    bool asleep;        /* the vCPU's thread waits for `wake`, so its state stays as it is */
    int64_t clock_zero; /* CLOCK_MONOTONIC ns when the guest's own clock stood at 0 */
};

/* A piece of the guest's address space without RAM: the library tells offsets in it. */
struct emulator_hole {
    struct pyhv_emulator_vcpu *vcpu;
    uint64_t gpa;
};

struct pyhv_emulator_vcpu {
    struct pyhv_vcpu base;
    struct emulator_hole holes[PYHV_VM_MAX_SLOTS + 1];
    uc_engine *engine;
    struct cpu_context *context; /* to look at the state, and to change it, between two runs of the engine */

    struct pyhv_cpuid_table table;
    struct pyhv_cpuid_entry cpuid[PYHV_CPUID_MAX_ENTRIES]; /* as it was set */
    uint32_t cpuid_count;

    /* The guest's time-stamp counter: tsc_base at the moment tsc_since (CLOCK_MONOTONIC, ns), at tsc_khz. */
    uint64_t tsc_base;
    int64_t tsc_since;
    uint32_t tsc_khz;

    bool halted;           /* in HLT */
    bool priority_written; /* the local APIC's task priority, of which CR8 is a copy, was written */
    uint64_t plain_out;    /* RIP of the last OUT that is no REP OUTSB: a loop of them is not looked at again */

    /* What waits and the guest has not taken, as the run loop saw it last; any change of it comes with `attention`. */
    struct {
        bool nmi, interrupt;
        bool deliverable; /* an interrupt, at the task priority below */
        uint8_t priority; /* CR8 */
    } waiting;

    /* Control registers as they were before the block that executes: the library takes whatever is written to them. And
     * where the code is, as far as its upper half tells. */
    struct {
        uint64_t cr0, cr2, cr3, cr4, efer, rip;
    } control;
    uint32_t one_by_one;  /* so many instructions more are blocks of their own: fetched_ahead() */
    uint64_t cr4_allowed; /* by the CPUID table */
    uint64_t cr3_reserved;

    /* TS, EM and SMAP of hflags, which the library has to do without for one instruction: lend_flags(), lend_user_stack(). */
    uint32_t lent;
    bool lent_used; /* that instruction's block has begun */

    /* What hooks leave for the run loop. */
    enum {
        HAPPENED_NOTHING,
        HAPPENED_EXCEPTION,
        HAPPENED_SYSCALL,
        HAPPENED_SYSENTER,
        HAPPENED_ACTION,
        HAPPENED_RESERVED,
        HAPPENED_LOST_MEMORY
    } happened;
    uint32_t vector;    /* HAPPENED_EXCEPTION */
    int action;         /* HAPPENED_ACTION: enum pyhv_action */
    bool log_full;      /* the log of CPUIDs */
    const char *cannot; /* what the guest did that nobody can carry out here, or NULL */

    struct pyhv_kick kick;
    atomic_int kicked;
    atomic_bool attention;  /* the run loop must look at kick and interrupts before it goes on */
    bool executing;         /* the engine */
    sigjmp_buf lost_memory; /* where to when guest memory is gone while it does not execute: lost.c */
    bool stepping;          /* one instruction only, which nothing from outside ends */
    struct library_stop stop;

    /* The alarm of the vCPU's thread, while it runs: a timer, or where the queue of signals has no room for one a thread
     * that waits for a timer's descriptor. */
    timer_t timer;
    int alarm_fd; /* -1: there is a timer */
    pthread_t alarm_thread;
    atomic_bool alarm_over;
    _Atomic(int64_t) alarm; /* when it rings, CLOCK_MONOTONIC ns; NO_DEADLINE: it has rung, or was not set */
};

static inline struct pyhv_emulator_vm *emulator_vm_of(struct pyhv_vm *vm)
{
    return (struct pyhv_emulator_vm *)vm;
}

static inline struct pyhv_emulator_vcpu *emulator_of(struct pyhv_vcpu *vcpu)
{
    return (struct pyhv_emulator_vcpu *)vcpu;
}

static inline struct pyhv_emulator_vm *emulator_vm(const struct pyhv_emulator_vcpu *vcpu)
{
    return emulator_vm_of(vcpu->base.vm);
}

struct pyhv_vcpu *emulator_vcpu_create(struct pyhv_vm *vm, uint32_t index, struct pyhv_error *error);

/* The guest's time-stamp counter now. */
uint64_t emulator_tsc(const struct pyhv_emulator_vcpu *vcpu);

/* Makes the vCPU look at its interrupts soon. Any thread; with vm->lock held. */
void emulator_attention(struct pyhv_emulator_vcpu *vcpu);

/* ------------------------------------------------------------------------------------------------- memory -- */

/* Where `size` bytes of guest memory are in this process, which must not cross a page; NULL where there is no RAM. */
uint8_t *emulator_host(const struct pyhv_emulator_vm *vm, uint64_t gpa, uint64_t size);

/* How code that the processor itself executes touches memory. SMAP keeps the supervisor's accesses off the user's pages:
 * those to a handler's stack unless EFLAGS.AC is set, those to tables always. */
enum emulator_access {
    ACCESS_READ = 0,
    ACCESS_WRITE = 1,
    ACCESS_USER = 2,
    ACCESS_PEEK = 4, /* changes nothing, and SMAP does not bar it */
    ACCESS_STACK = 8,
};

struct emulator_fault {
    uint32_t vector;
    uint32_t error_code;
    uint64_t address; /* #PF */
};

/* Copies between linear memory as `state` maps it and `buffer`. Returns 0, or -1 with the fault that it causes; a write
 * that faults has written nothing before the faulting page's turn. */
int emulator_copy(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, uint64_t linear, void *buffer,
                  size_t size, unsigned access, struct emulator_fault *fault);

/* Reads guest memory as the vCPU sees it; returns how many bytes could be read from the start on. */
size_t emulator_peek(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, uint64_t linear, void *buffer,
                     size_t size);

/* From here on this thread runs the vCPU, or with NULL none: if memory of the guest's is gone the engine leaves with
 * HAPPENED_LOST_MEMORY, and other code goes on at vcpu->lost_memory. */
void emulator_watch_memory(struct pyhv_emulator_vcpu *vcpu);

/* ------------------------------------------------------------------------------------------------- events -- */

enum emulator_event {
    EVENT_FAULT,     /* an exception of the processor's */
    EVENT_SOFTWARE,  /* INT n, INT3, INTO: RIP stands behind it */
    EVENT_INTERRUPT, /* from outside, NMI too */
};

enum emulator_delivery {
    DELIVERED = 0,
    DELIVERY_TRIPLE_FAULT = -1,
    DELIVERY_UNSUPPORTED = -2, /* vcpu->cannot says what */
};

/* Lets the processor enter the handler of `vector`; what goes wrong on the way becomes an exception in turn. */
enum emulator_delivery emulator_deliver(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state,
                                        enum emulator_event event, uint32_t vector, uint32_t error_code);

/* What SYSCALL and SYSENTER do; RIP stands behind them. */
enum emulator_delivery emulator_syscall(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state);
enum emulator_delivery emulator_sysenter(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state);

/* ------------------------------------------------------------------------------------------------- state -- */

/* RFLAGS is one number in a state that these have handled. */
int emulator_save(struct pyhv_emulator_vcpu *vcpu, struct cpu_context *context, struct pyhv_error *error);
/* flush: translations of addresses depend on what was changed. */
int emulator_load(struct pyhv_emulator_vcpu *vcpu, struct cpu_context *context, bool flush, struct pyhv_error *error);

/* The bits of hflags that follow from other registers. */
void emulator_update_hflags(struct cpu_state *state);

/* The state of a processor after reset, but for RDX: emulator_set_cpuid(). */
void emulator_reset(struct cpu_state *state);

/* What the CPUID table says of control registers. */
void emulator_set_control_limits(struct pyhv_emulator_vcpu *vcpu);

/* CPL. */
static inline unsigned emulator_cpl(const struct cpu_state *state)
{
    return state->hflags & HF_CPL;
}

int emulator_set_cpuid(struct pyhv_vcpu *vcpu, const struct pyhv_cpuid_entry *entries, size_t count,
                       struct pyhv_error *error);
int emulator_get_cpuid(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_entry *entries, size_t capacity,
                       struct pyhv_error *error);
int emulator_get_regs(struct pyhv_vcpu *vcpu, struct pyhv_regs *regs, struct pyhv_error *error);
int emulator_set_regs(struct pyhv_vcpu *vcpu, const struct pyhv_regs *regs, struct pyhv_error *error);
int emulator_get_sregs(struct pyhv_vcpu *vcpu, struct pyhv_sregs *sregs, struct pyhv_error *error);
int emulator_set_sregs(struct pyhv_vcpu *vcpu, const struct pyhv_sregs *sregs, struct pyhv_error *error);
int emulator_get_events(struct pyhv_vcpu *vcpu, struct pyhv_events *events, struct pyhv_error *error);
/* After all other state: what is on its way is delivered at once. */
int emulator_set_events(struct pyhv_vcpu *vcpu, const struct pyhv_events *events, struct pyhv_error *error);
int emulator_get_debugregs(struct pyhv_vcpu *vcpu, struct pyhv_debugregs *regs, struct pyhv_error *error);
int emulator_set_debugregs(struct pyhv_vcpu *vcpu, const struct pyhv_debugregs *regs, struct pyhv_error *error);
int64_t emulator_get_xsave(struct pyhv_vcpu *vcpu, uint8_t *area, size_t capacity, struct pyhv_error *error);
int emulator_set_xsave(struct pyhv_vcpu *vcpu, const uint8_t *area, size_t size, struct pyhv_error *error);
int emulator_get_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, uint64_t *values, size_t count,
                      struct pyhv_error *error);
int emulator_set_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, const uint64_t *values, size_t count,
                      struct pyhv_error *error);
bool emulator_has_msr(uint32_t index);
int emulator_get_mp_state(struct pyhv_vcpu *vcpu);
int emulator_set_mp_state(struct pyhv_vcpu *vcpu, uint32_t state, struct pyhv_error *error);
int emulator_get_tsc_khz(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
/* Any rate. */
void emulator_set_tsc_khz(struct pyhv_vcpu *vcpu, uint32_t khz);

void emulator_get_irqchip(struct pyhv_vm *vm, struct pyhv_irqchip *irqchip);
int emulator_set_irqchip(struct pyhv_vm *vm, const struct pyhv_irqchip *irqchip, struct pyhv_error *error);
/* PYHV_LAPIC_SIZE bytes: the vCPU's. */
void emulator_get_lapic(struct pyhv_vm *vm, uint8_t *page);
void emulator_set_lapic(struct pyhv_vm *vm, const uint8_t *page);

int emulator_save_state(struct pyhv_vm *vm, struct pyhv_state *state, struct pyhv_error *error);
int emulator_load_state(struct pyhv_vm *vm, const struct pyhv_state *state, uint64_t elapsed_ns,
                        struct pyhv_error *error);

/* ------------------------------------------------------------------------------------------- dirty pages -- */

int emulator_log_dirty(struct pyhv_vm *vm, bool on, struct pyhv_error *error);
int emulator_take_dirty(struct pyhv_vm *vm, uint64_t *bitmap, struct pyhv_error *error);
void emulator_dirty_close(struct pyhv_emulator_vm *vm);

#endif

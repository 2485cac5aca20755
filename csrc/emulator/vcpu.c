/* SPDX-License-Identifier: MIT
 *
 * A vCPU of the emulator: its creation, what it asks for while it executes, its run loop, and the kick.
 *
 * How a run of the engine ends. Several parties want it to: callbacks (an exception, a system call, a full log), other
 * threads (a kick, an interrupt of a device), the timer's signal handler, an interrupt that the guest begins to take. None
 * of them ends it. They write down what they want (`happened`, `attention`, `waiting`) and call pyhv_library_look();
 * must_leave() alone decides, on the vCPU's thread, between two blocks of the guest's code. The invariant:
 *
 *     A note is written before pyhv_library_look() is called, and taken back by nobody but the run loop, while the
 *     engine does not execute. Between a note and the next block of the guest's code must_leave() has seen it.
 *
 * So it does not matter how many ask at once, in which order, or how often; nothing is lost, and no code of the guest's
 * runs behind a SYSCALL or a fault before the guest's kernel does. All parties touch nothing else of the library's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "cancel.h"
#include "devices/device.h"
#include "emulator/emulator.h"

#define CR0_PE    UINT64_C(1)
#define CR0_NW    (UINT64_C(1) << 29)
#define CR0_CD    (UINT64_C(1) << 30)
#define CR0_PG    (UINT64_C(1) << 31)
#define CR4_PAE   (UINT64_C(1) << 5)
#define EFER_LMA  (UINT64_C(1) << 10)
#define DR6_BS    (UINT64_C(1) << 14)
#define RFLAGS_TF (UINT64_C(1) << 8)
#define RFLAGS_IF (UINT64_C(1) << 9)
#define RFLAGS_VM (UINT64_C(1) << 17)
#define SEG_L     (1u << 21)

/* Of a task-state segment: its flags' bit that tells it from a 16-bit one, and where the permission bitmap's place is. */
#define TSS_32      (1u << 11)
#define TSS_IO_BASE 0x66

enum { DEBUG = 1, NMI = 2, INVALID_OPCODE = 6, NO_COPROCESSOR = 7, PROTECTION = 13, PAGE_FAULT = 14 };
enum { FAULT_PRESENT = 1, FAULT_USER = 4 };

/* Bytes on both sides of the stack's pointer that IRET, far RET and far CALL touch, and some. */
#define STACK_REACH UINT64_C(64)

/* A block of the engine's is at most so many instructions. */
enum { BLOCK_MAX = 512 };
_Static_assert(PYHV_CPUID_LOG_SPARE >= BLOCK_MAX, "it runs on after the log is full, to the end of the block");

/* ------------------------------------------------------------------------------------------- attention, kick -- */

/* The alarm rings at `deadline` (CLOCK_MONOTONIC, ns). */
static void set_alarm(struct pyhv_emulator_vcpu *vcpu, int64_t deadline)
{
    if (deadline == NO_DEADLINE || deadline == atomic_load(&vcpu->alarm))
        return; /* one too many does no harm */
    struct itimerspec when = {.it_value = {.tv_sec = deadline / 1000000000, .tv_nsec = deadline % 1000000000}};
    atomic_store(&vcpu->alarm, deadline);
    if (vcpu->alarm_fd >= 0)
        timerfd_settime(vcpu->alarm_fd, TFD_TIMER_ABSTIME, &when, NULL);
    else
        timer_settime(vcpu->timer, TIMER_ABSTIME, &when, NULL);
}

/* Makes the run loop look at kick and interrupts before the guest goes on. From any thread and any handler. */
static void ask_for_attention(struct pyhv_emulator_vcpu *vcpu)
{
    atomic_store(&vcpu->attention, true);
    pyhv_library_look(vcpu->engine);
}

/* Of the signal: the timer's, or a kick's, which needs it only to get a device out of a system call such as a write to a
 * pipe that is full. Two that come at once are one, so each may be the timer's. */
static void on_attention(void *opaque)
{
    struct pyhv_emulator_vcpu *vcpu = opaque;
    atomic_store(&vcpu->alarm, NO_DEADLINE);
    ask_for_attention(vcpu);
}

/* Returns 0 or an errno; see pyhv_kick_send(). */
static int signal_thread(struct pyhv_emulator_vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->kick.lock);
    bool own = pthread_equal(vcpu->kick.thread, pthread_self());
    int errnum = own ? 0 : pyhv_kick_send(&vcpu->kick);
    pthread_mutex_unlock(&vcpu->kick.lock);
    return errnum;
}

void emulator_attention(struct pyhv_emulator_vcpu *vcpu)
{
    ask_for_attention(vcpu);
    pthread_cond_broadcast(&emulator_vm(vcpu)->wake);
}

static int kick(struct pyhv_vcpu *base, struct pyhv_error *error)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    atomic_store(&vcpu->kicked, 1);
    pthread_mutex_lock(&emulator_vm(vcpu)->lock);
    emulator_attention(vcpu);
    pthread_mutex_unlock(&emulator_vm(vcpu)->lock);
    int errnum = signal_thread(vcpu);
    return errnum ? pyhv_fail(error, errnum, "pthread_kill", "SIGURG to the thread of the vCPU") : 0;
}

/* Whether an event that waits, as the run loop has left it, can be delivered in this state; or the task priority has
 * changed, on which that depends. */
static bool takes_event(const struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state)
{
    if (state->hflags & HF_INHIBIT_IRQ)
        return false;
    if (vcpu->waiting.nmi && !(state->hflags2 & HF2_NMI))
        return true;
    if (!vcpu->waiting.interrupt)
        return false;
    return (vcpu->waiting.deliverable && (state->rflags & RFLAGS_IF)) || state->task_priority != vcpu->waiting.priority;
}

static void take_flags_back(struct pyhv_emulator_vcpu *vcpu)
{
    pyhv_library_state(vcpu->engine)->hflags |= vcpu->lent;
    vcpu->lent = 0;
}

static void remember_control(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state)
{
    vcpu->control.cr0 = state->cr[0];
    vcpu->control.cr3 = state->cr[3];
    vcpu->control.cr4 = state->cr[4];
    vcpu->control.efer = state->efer;
    vcpu->control.rip = state->rip;
}

/* MOV to a control register ends its block. Whether it has written what a processor refuses. */
static bool wrote_reserved(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state)
{
    const uint64_t cr0 = state->cr[0];
    if (cr0 == vcpu->control.cr0 && state->cr[3] == vcpu->control.cr3 && state->cr[4] == vcpu->control.cr4)
        return false;
    /* Paging ends in 32-bit code only, and of long mode PAE is a part. */
    const bool lost_paging =
        ~cr0 & vcpu->control.cr0 & CR0_PG && vcpu->control.efer & EFER_LMA && state->segs[CS].flags & SEG_L;
    const bool lost_pae = ~state->cr[4] & vcpu->control.cr4 & CR4_PAE && state->efer & EFER_LMA;
    if ((cr0 != vcpu->control.cr0 && (((cr0 & CR0_PG) && !(cr0 & CR0_PE)) || ((cr0 & CR0_NW) && !(cr0 & CR0_CD)))) ||
        lost_paging || lost_pae ||
        (state->cr[3] != vcpu->control.cr3 && (state->efer & EFER_LMA) && (state->cr[3] & vcpu->cr3_reserved)) ||
        (state->cr[4] & ~vcpu->control.cr4 & ~vcpu->cr4_allowed))
        return true;
    remember_control(vcpu, state);
    return false;
}

/* struct library_stop: ends the run of the engine, for whoever wants it. See above. */
static bool must_leave(void *opaque)
{
    struct pyhv_emulator_vcpu *vcpu = opaque;
    if (vcpu->lent && vcpu->lent_used)
        take_flags_back(vcpu);
    vcpu->lent_used = true;
    if (vcpu->one_by_one && --vcpu->one_by_one)
        pyhv_library_one_instruction(vcpu->engine);
    if (vcpu->happened != HAPPENED_NOTHING)
        return true;
    vcpu->control.cr2 = pyhv_library_state(vcpu->engine)->cr[2];
    if (wrote_reserved(vcpu, pyhv_library_state(vcpu->engine))) {
        vcpu->happened = HAPPENED_RESERVED;
        return true;
    }
    if (vcpu->stepping)
        return false;
    return atomic_load(&vcpu->attention) || takes_event(vcpu, pyhv_library_state(vcpu->engine));
}

/* ------------------------------------------------------------------------- what the guest does: time and CPUID -- */

static int on_rdtsc(uc_engine *engine, void *opaque)
{
    uint64_t tsc = emulator_tsc(opaque), low = (uint32_t)tsc, high = tsc >> 32;
    uc.reg_write(engine, UC_X86_REG_RAX, &low);
    uc.reg_write(engine, UC_X86_REG_RDX, &high);
    return 1; /* the instruction is done */
}

static int on_rdtscp(uc_engine *engine, void *opaque)
{
    struct uc_x86_msr aux = {.rid = 0xc0000103};
    uc.reg_read(engine, UC_X86_REG_MSR, &aux);
    aux.value = (uint32_t)aux.value;
    uc.reg_write(engine, UC_X86_REG_RCX, &aux.value);
    return on_rdtsc(engine, opaque);
}

static void record_cpuid(struct pyhv_emulator_vcpu *vcpu, uint32_t leaf, uint32_t subleaf, const uint32_t answer[4])
{
    struct pyhv_cpuid_log *log = &vcpu->base.log;
    if (log->count == log->capacity + PYHV_CPUID_LOG_SPARE)
        return;
    struct pyhv_cpuid_record *record = &log->records[log->count++];
    const struct cpu_state *state = pyhv_library_state(vcpu->engine);
    *record = (struct pyhv_cpuid_record){
        .rip = state->segs[CS].base + state->rip,
        .leaf = leaf,
        .subleaf = subleaf,
        .cpl = emulator_cpl(state),
    };
    memcpy(record->guest, answer, sizeof record->guest);
    pyhv_cpuid_host(leaf, subleaf, record->hardware);
    if (log->count >= log->capacity) {
        vcpu->log_full = true;
        ask_for_attention(vcpu);
    }
}

static int on_cpuid(uc_engine *engine, void *opaque)
{
    struct pyhv_emulator_vcpu *vcpu = opaque;
    uint64_t rax = 0, rcx = 0, value;
    uint32_t answer[4];
    struct pyhv_cpuid_dynamic dynamic = {.apic_base = LAPIC_BASE | 0x900, .xcr0 = 1};
    uc.reg_read(engine, UC_X86_REG_RAX, &rax);
    uc.reg_read(engine, UC_X86_REG_RCX, &rcx);
    uc.reg_read(engine, UC_X86_REG_CR4, &dynamic.cr4);
    pyhv_cpuid_answer(&vcpu->table, &dynamic, (uint32_t)rax, (uint32_t)rcx, answer);
    uc.reg_write(engine, UC_X86_REG_RAX, (value = answer[0], &value));
    uc.reg_write(engine, UC_X86_REG_RBX, (value = answer[1], &value));
    uc.reg_write(engine, UC_X86_REG_RCX, (value = answer[2], &value));
    uc.reg_write(engine, UC_X86_REG_RDX, (value = answer[3], &value));
    vcpu->base.counters.cpuid_answered++;
    if (vcpu->base.log.records)
        record_cpuid(vcpu, (uint32_t)rax, (uint32_t)rcx, answer);
    return 1;
}

/* ------------------------------------------------------------------------------------ what it does: ports -- */

/* IN and OUT fault where neither IOPL nor the task's permission bitmap lets the guest's user at the ports (SDM Vol. 1,
 * "I/O Port Addressing: Protected-Mode I/O"): the library does not look. */
static void check_port(struct pyhv_emulator_vcpu *vcpu, uint32_t port, int size)
{
    const struct cpu_state *state = pyhv_library_state(vcpu->engine);
    const unsigned cpl = emulator_cpl(state);
    if (cpl == 0 || (cpl <= (state->rflags >> 12 & 3) && !(state->rflags & RFLAGS_VM)))
        return;
    uint16_t base = 0, bits = 0;
    if ((state->tr.flags & TSS_32) && state->tr.limit >= TSS_IO_BASE + 1 &&
        emulator_peek(vcpu, state, state->tr.base + TSS_IO_BASE, &base, sizeof base) == sizeof base &&
        base + port / 8 + 1 <= state->tr.limit && /* two bytes are read */
        emulator_peek(vcpu, state, state->tr.base + base + port / 8, &bits, sizeof bits) == sizeof bits &&
        !(bits >> port % 8 & ((1u << size) - 1)))
        return;
    pyhv_library_fault(vcpu->engine, PROTECTION, 0);
}

static uint32_t on_in(uc_engine *engine, uint32_t port, int size, void *opaque)
{
    (void)engine;
    struct pyhv_emulator_vcpu *vcpu = opaque;
    struct pyhv_emulator_vm *vm = emulator_vm(vcpu);
    uint32_t value = UINT32_MAX;
    check_port(vcpu, port, size);
    vcpu->base.counters.port_io++;
    if (vm->base.irqchip && irqchip_owns_port(&vm->chips, port)) {
        int64_t now = pyhv_now();
        pthread_mutex_lock(&vm->lock);
        for (int i = 0; i < size; i++) {
            uint32_t byte = 0xff;
            if (irqchip_owns_port(&vm->chips, port + (uint32_t)i))
                byte = irqchip_read_port(&vm->chips, port + (uint32_t)i, now);
            value = (value & ~(0xffu << 8 * i)) | byte << 8 * i;
        }
        pthread_mutex_unlock(&vm->lock);
    } else if (vm->base.bus) {
        pyhv_bus_port_io(vm->base.bus, (uint16_t)port, 0, (uint32_t)size, 1, &value);
    }
    return value;
}

/* Whether the instruction at RIP is REP OUTSB of 64-bit code without a segment of its own. */
static bool is_string_output(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state)
{
    uint8_t bytes[3];
    size_t count = emulator_peek(vcpu, state, state->rip, bytes, sizeof bytes);
    if (!(state->hflags & HF_CS64) || count < 2 || (bytes[0] != 0xf3 && bytes[0] != 0xf2))
        return false;
    return bytes[1] == 0x6e || (count == 3 && (bytes[1] & 0xf0) == 0x40 && bytes[2] == 0x6e);
}

/* Writes the rest of a REP OUTSB's page at once: the engine makes one call for each byte, which a device that sends
 * strings would have to send on one by one. Returns how many bytes that was; the engine goes on behind them. */
static uint32_t take_string(struct pyhv_emulator_vcpu *vcpu, uint16_t port, int *action)
{
    const struct cpu_state *state = pyhv_library_state(vcpu->engine);
    if (state->rip == vcpu->plain_out)
        return 0;
    if (!is_string_output(vcpu, state)) {
        vcpu->plain_out = state->rip;
        return 0;
    }
    uint64_t left = state->regs[RCX], from = state->regs[RSI];
    uint64_t room = PYHV_PAGE_SIZE - (from & (PYHV_PAGE_SIZE - 1));
    uint32_t count = (uint32_t)(left < room ? left : room);
    uint8_t bytes[PYHV_PAGE_SIZE];
    if (state->df != 1 || count < 2 || emulator_peek(vcpu, state, from, bytes, count) != count)
        return 0;
    *action = pyhv_bus_port_io(emulator_vm(vcpu)->base.bus, port, 1, 1, count, bytes);
    left -= count - 1; /* the engine counts the last one itself */
    from += count - 1;
    uc.reg_write(vcpu->engine, UC_X86_REG_RCX, &left);
    uc.reg_write(vcpu->engine, UC_X86_REG_RSI, &from);
    return count;
}

static void on_out(uc_engine *engine, uint32_t port, int size, uint32_t value, void *opaque)
{
    struct pyhv_emulator_vcpu *vcpu = opaque;
    struct pyhv_emulator_vm *vm = emulator_vm(vcpu);
    int action = PYHV_ACTION_NONE;
    check_port(vcpu, port, size);
    vcpu->base.counters.port_io++;
    if (vm->base.irqchip && irqchip_owns_port(&vm->chips, port)) {
        int64_t now = pyhv_now();
        pthread_mutex_lock(&vm->lock);
        for (int i = 0; i < size; i++)
            if (irqchip_owns_port(&vm->chips, port + (uint32_t)i))
                irqchip_write_port(&vm->chips, port + (uint32_t)i, (uint8_t)(value >> 8 * i), now);
        ask_for_attention(vcpu); /* an interrupt may wait now, and the timers be other ones */
        pthread_mutex_unlock(&vm->lock);
        return;
    }
    if (!vm->base.bus)
        return;
    if (size != 1 || take_string(vcpu, (uint16_t)port, &action) == 0)
        action = pyhv_bus_port_io(vm->base.bus, (uint16_t)port, 1, (uint32_t)size, 1, &value);
    if (action != PYHV_ACTION_NONE) {
        vcpu->happened = HAPPENED_ACTION;
        vcpu->action = action;
        pyhv_library_leave(engine);
    }
}

/* ----------------------------------------------------------------------------------- what it does: memory -- */

static uint64_t on_mmio_read(uc_engine *engine, uint64_t offset, unsigned size, void *opaque)
{
    (void)engine;
    const struct emulator_hole *hole = opaque;
    struct pyhv_emulator_vm *vm = emulator_vm(hole->vcpu);
    uint64_t gpa = hole->gpa + offset, value = UINT64_MAX;
    hole->vcpu->base.counters.mmio++;
    if (vm->base.irqchip && irqchip_owns_memory(gpa) && gpa % 4 + size <= 4) {
        pthread_mutex_lock(&vm->lock);
        value = irqchip_read_memory(&vm->chips, gpa & ~UINT64_C(3), pyhv_now()) >> 8 * (gpa % 4);
        pthread_mutex_unlock(&vm->lock);
    }
    return size < 8 ? value & ((UINT64_C(1) << 8 * size) - 1) : value;
}

static void on_mmio_write(uc_engine *engine, uint64_t offset, unsigned size, uint64_t value, void *opaque)
{
    (void)engine;
    const struct emulator_hole *hole = opaque;
    struct pyhv_emulator_vm *vm = emulator_vm(hole->vcpu);
    uint64_t gpa = hole->gpa + offset;
    hole->vcpu->base.counters.mmio++;
    /* The controllers' registers are 32 bits wide (SDM Vol. 3, "Local APIC"), but that which selects one of the I/O APIC's:
     * 8 bits of it are, and it takes them alone too. */
    if (!vm->base.irqchip || !irqchip_owns_memory(gpa) || gpa % 4 || (size != 4 && (gpa != IOAPIC_BASE || size > 4)))
        return;
    pthread_mutex_lock(&vm->lock);
    uint8_t priority = irqchip_cr8(&vm->chips);
    irqchip_write_memory(&vm->chips, gpa, (uint32_t)value, pyhv_now());
    if (irqchip_cr8(&vm->chips) != priority)
        hole->vcpu->priority_written = true;
    ask_for_attention(hole->vcpu);
    pthread_mutex_unlock(&vm->lock);
}

/* The engine's address space ends here; processors have up to 52 bits. */
#define ADDRESS_END (UINT64_C(1) << 52)

static int map_hole(struct pyhv_emulator_vcpu *vcpu, struct emulator_hole *hole, uint64_t begin, uint64_t end)
{
    *hole = (struct emulator_hole){.vcpu = vcpu, .gpa = begin};
    if (begin == end)
        return UC_ERR_OK;
    return uc.mmio_map(vcpu->engine, begin, end - begin, on_mmio_read, hole, on_mmio_write, hole);
}

/* Maps RAM, and what is between, as memory that reads all-ones. */
static int map_memory(struct pyhv_emulator_vcpu *vcpu, struct pyhv_error *error)
{
    uint64_t end = 0;
    const struct pyhv_emulator_vm *vm = emulator_vm(vcpu);
    for (uint32_t i = 0; i < vm->base.slot_count; i++) {
        const struct pyhv_slot *slot = &vm->base.slots[i];
        int code = map_hole(vcpu, &vcpu->holes[i], end, slot->gpa);
        if (code == UC_ERR_OK)
            code = uc.mem_map_ptr(vcpu->engine, slot->gpa, slot->size, UC_PROT_ALL, slot->host);
        if (code != UC_ERR_OK)
            return pyhv_library_fail(error, "uc_mem_map_ptr", code);
        end = slot->gpa + slot->size;
    }
    int code = map_hole(vcpu, &vcpu->holes[vm->base.slot_count], end, ADDRESS_END);
    return code == UC_ERR_OK ? 0 : pyhv_library_fail(error, "uc_mmio_map", code);
}

/* ---------------------------------------------------------------------------------- what it does: exceptions -- */

/* `happened` is looked at when the callback has returned and its instruction is over, before the guest's next one. */
static void on_exception(uc_engine *engine, uint32_t vector, void *opaque)
{
    (void)engine;
    struct pyhv_emulator_vcpu *vcpu = opaque;
    if (vcpu->happened !=
        HAPPENED_NOTHING) /* #DB behind SYSCALL or SYSENTER, which have not happened yet: enter_kernel() */
        return;
    vcpu->happened = HAPPENED_EXCEPTION;
    vcpu->vector = vector;
}

static void on_syscall(uc_engine *engine, void *opaque)
{
    (void)engine;
    ((struct pyhv_emulator_vcpu *)opaque)->happened = HAPPENED_SYSCALL;
}

static void on_sysenter(uc_engine *engine, void *opaque)
{
    (void)engine;
    ((struct pyhv_emulator_vcpu *)opaque)->happened = HAPPENED_SYSENTER;
}

/* ---------------------------------------------------------------------------------------- creation and end -- */

static int add_hooks(struct pyhv_emulator_vcpu *vcpu, struct pyhv_error *error)
{
    const struct {
        int instruction; /* 0: all exceptions */
        void *callback;
    } hooks[] = {
        {0, (void *)(uintptr_t)on_exception},
        {UC_X86_INS_CPUID, (void *)(uintptr_t)on_cpuid},
        {UC_X86_INS_IN, (void *)(uintptr_t)on_in},
        {UC_X86_INS_OUT, (void *)(uintptr_t)on_out},
        {UC_X86_INS_RDTSC, (void *)(uintptr_t)on_rdtsc},
        {UC_X86_INS_RDTSCP, (void *)(uintptr_t)on_rdtscp},
        {UC_X86_INS_SYSCALL, (void *)(uintptr_t)on_syscall},
        {UC_X86_INS_SYSENTER, (void *)(uintptr_t)on_sysenter},
    };
    for (size_t i = 0; i < sizeof hooks / sizeof *hooks; i++) {
        uc_hook hook;
        int type = hooks[i].instruction ? UC_HOOK_INSN : UC_HOOK_INTR;
        int code = uc.hook_add(vcpu->engine, &hook, type, hooks[i].callback, vcpu, 1, 0, hooks[i].instruction);
        if (code != UC_ERR_OK)
            return pyhv_library_fail(error, "uc_hook_add", code);
    }
    return 0;
}

static void destroy(struct pyhv_vcpu *base)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    struct pyhv_emulator_vm *vm = emulator_vm(vcpu);
    pthread_mutex_lock(&vm->lock);
    if (vm->vcpu == vcpu)
        vm->vcpu = NULL;
    pthread_mutex_unlock(&vm->lock);
    if (vcpu->engine)
        uc.close(vcpu->engine);
    pyhv_kick_destroy(&vcpu->kick);
    free(vcpu->context);
    free(vcpu);
}

static const struct pyhv_vcpu_ops operations;

struct pyhv_vcpu *emulator_vcpu_create(struct pyhv_vm *base, uint32_t index, struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    if (index != 0 || vm->vcpu) {
        pyhv_fail(error, ENOTSUP, "pyhv_vcpu_create", "vCPU %u: the emulator runs one", index);
        return NULL;
    }
    struct pyhv_emulator_vcpu *vcpu = calloc(1, sizeof *vcpu);
    if (!vcpu) {
        pyhv_fail(error, ENOMEM, "pyhv_vcpu_create", NULL);
        return NULL;
    }
    pyhv_vcpu_init(&vcpu->base, &operations, base, index);
    vcpu->tsc_khz = vm->tsc_khz;
    vcpu->tsc_since = pyhv_now();
    vcpu->alarm_fd = -1;
    pyhv_kick_init(&vcpu->kick);
    if (pyhv_library_engine(&vcpu->engine, &vcpu->context, error) < 0 || map_memory(vcpu, error) < 0 ||
        add_hooks(vcpu, error) < 0 || emulator_save(vcpu, vcpu->context, error) < 0)
        goto fail;
    emulator_reset(&vcpu->context->state);
    if (emulator_load(vcpu, vcpu->context, true, error) < 0)
        goto fail;
    vcpu->stop = (struct library_stop){.leave = must_leave, .opaque = vcpu};
    pyhv_library_decide(vcpu->engine, &vcpu->stop);
    pthread_mutex_lock(&vm->lock);
    vm->vcpu = vcpu;
    pthread_mutex_unlock(&vm->lock);
    return &vcpu->base;

fail:
    destroy(&vcpu->base);
    return NULL;
}

/* Every CPUID is answered by us anyway, at every address and privilege level; what remains is the log. */
static int trap(struct pyhv_vcpu *vcpu, const struct pyhv_trap_config *config, struct pyhv_error *error)
{
    (void)vcpu;
    (void)config;
    (void)error;
    return 0;
}

/* ------------------------------------------------------------------------------------------------ the run loop -- */

static bool stop(struct pyhv_exit *exit, enum pyhv_stop why)
{
    exit->stop = why;
    return true;
}

static bool stop_for_code(struct pyhv_exit *exit, const char *what, int code)
{
    exit->exit_reason = (uint32_t)code;
    pyhv_library_fail(&exit->error, what, code);
    return stop(exit, PYHV_STOP_FAILED);
}

static bool save_state(struct pyhv_emulator_vcpu *vcpu, struct pyhv_exit *exit)
{
    return emulator_save(vcpu, vcpu->context, &exit->error) == 0 || !stop(exit, PYHV_STOP_FAILED);
}

static bool stop_for_action(struct pyhv_emulator_vcpu *vcpu, struct pyhv_exit *exit)
{
    struct cpu_state *state = &vcpu->context->state;
    if (!save_state(vcpu, exit))
        return true;
    uint8_t bytes[15];
    size_t count = emulator_peek(vcpu, state, state->segs[CS].base + state->rip, bytes, sizeof bytes), length = 0;
    while (length < count && bytes[length] == 0x66)
        length++;
    if (length < count && (bytes[length] & 0xfe) == 0xe6) /* OUT to a port in the instruction */
        state->rip += length + 2;
    else if (length < count && (bytes[length] & 0xfe) == 0xee)
        state->rip += length + 1;
    if (emulator_load(vcpu, vcpu->context, false, &exit->error) < 0)
        return stop(exit, PYHV_STOP_FAILED);
    switch (vcpu->action) {
    case PYHV_ACTION_GUEST_EXIT:
        exit->status = pyhv_bus_exit_status(emulator_vm(vcpu)->base.bus);
        return stop(exit, PYHV_STOP_GUEST_EXIT);
    case PYHV_ACTION_RESET:
        return stop(exit, PYHV_STOP_RESET);
    case PYHV_ACTION_PANIC:
        return stop(exit, PYHV_STOP_PANIC);
    default:
        return stop(exit, PYHV_STOP_POWER_OFF);
    }
}

/* The guest's doing, and no failure of ours. */
static bool stop_for_want(struct pyhv_emulator_vcpu *vcpu, struct pyhv_exit *exit)
{
    pyhv_fail(&exit->error, 0, "the emulator", "cannot do %s", vcpu->cannot);
    exit->suberror = PYHV_SUBERROR_NO_EVENT;
    return stop(exit, PYHV_STOP_INTERNAL_ERROR);
}

static bool stop_for_lost_memory(struct pyhv_exit *exit)
{
    exit->suberror = PYHV_SUBERROR_LOST_MEMORY;
    return stop(exit, PYHV_STOP_INTERNAL_ERROR);
}

/* Takes over what emulator_deliver() and its like have done. */
static bool finish_event(struct pyhv_emulator_vcpu *vcpu, enum emulator_delivery done, struct pyhv_exit *exit)
{
    if (done == DELIVERY_UNSUPPORTED)
        return stop_for_want(vcpu, exit);
    if (emulator_load(vcpu, vcpu->context, false, &exit->error) < 0)
        return stop(exit, PYHV_STOP_FAILED);
    return done == DELIVERY_TRIPLE_FAULT ? stop(exit, PYHV_STOP_TRIPLE_FAULT) : false;
}

/* Whether an instruction works on general registers although its opcode is among those of SSE: 0F 38 F0 to F7 (MOVBE,
 * CRC32, ADCX, ADOX, ANDN, BLSR, SHLX and their like) and 0F 3A F0 with VEX (RORX). */
static bool is_general(const struct cpu_state *state, const uint8_t *bytes, size_t count)
{
    static const uint8_t prefixes[] = {0x66, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x67};
    const bool is_64 = state->hflags & HF_CS64;
    size_t at = 0;
    while (at < count && memchr(prefixes, bytes[at], sizeof prefixes))
        at++;
    bool has_vex = (state->cr[0] & CR0_PE) && !(state->rflags & RFLAGS_VM) && at + 3 < count && bytes[at] == 0xc4 &&
                   (is_64 || bytes[at + 1] >= 0xc0);
    if (has_vex && (bytes[at + 1] & 0x1f) == 3)
        return bytes[at + 3] == 0xf0;
    if (has_vex)
        return (bytes[at + 1] & 0x1f) == 2 && (bytes[at + 3] & 0xf8) == 0xf0;
    if (is_64 && at < count && (bytes[at] & 0xf0) == 0x40)
        at++;
    return at + 2 < count && bytes[at] == 0x0f && bytes[at + 1] == 0x38 && (bytes[at + 2] & 0xf8) == 0xf0;
}

/* The library looks at CR0.TS, CR0.EM and CR4.OSFXSR before such an instruction as if it needed SSE. Then this is why it
 * has faulted, and it is executed with other flags: of TS and EM for itself alone, since #NM must come again for those that
 * follow; of OSFXSR until the flags are next made of the registers, for Linux's decompressor has millions. */
static bool lend_flags(struct pyhv_emulator_vcpu *vcpu)
{
    struct cpu_state *state = pyhv_library_state(vcpu->engine);
    uint8_t bytes[15];
    uint32_t lent = state->hflags & (HF_TS | HF_EM);
    if (!lent && (state->hflags & HF_OSFXSR))
        return false;
    size_t count = emulator_peek(vcpu, state, state->segs[CS].base + state->rip, bytes, sizeof bytes);
    if (!is_general(state, bytes, count))
        return false;
    state->hflags = (state->hflags & ~lent) | HF_OSFXSR;
    vcpu->lent = lent;
    vcpu->lent_used = false;
    if (lent)
        pyhv_library_one_instruction(vcpu->engine);
    return true;
}

/* A page fault that is not raised: the instruction is executed once more, and what comes then is no fault within it. */
static void forget_fault(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state)
{
    state->cr[2] = vcpu->control.cr2;
    state->error_code = 0;
    state->old_exception = -1;
}

/* IRET, far RET and far CALL of the guest's user: the library touches their stack as the supervisor. That is wrong for the
 * error code of a page fault, and with CR4.SMAP it is one. Then the instruction is executed once more, without SMAP. */
static bool lend_user_stack(struct pyhv_emulator_vcpu *vcpu, uint32_t lent)
{
    struct cpu_state *state = pyhv_library_state(vcpu->engine);
    const struct cpu_segment *ss = &state->segs[SS];
    uint64_t sp = state->regs[RSP];
    if (!(state->hflags & HF_CS64)) /* a 16-bit stack's pointer has 16 bits */
        sp = (uint32_t)(ss->base + (state->hflags & HF_SS32 ? (uint32_t)sp : (uint16_t)sp));
    if (emulator_cpl(state) != 3 || state->cr[2] - sp + STACK_REACH >= 2 * STACK_REACH)
        return false;
    if ((state->hflags & HF_SMAP) && (state->error_code & FAULT_PRESENT) && !lent) {
        forget_fault(vcpu, state);
        state->hflags &= ~(uint32_t)HF_SMAP;
        vcpu->lent = HF_SMAP;
        vcpu->lent_used = false;
        pyhv_library_one_instruction(vcpu->engine);
        return true;
    }
    state->error_code |= FAULT_USER;
    return false;
}

/* The library fetches a whole block before it executes the first instruction of it. A fault of the page behind comes too
 * early then, with RIP at the beginning of the block, and perhaps in vain. So the block is executed one instruction at a
 * time: that which needs the page faults again, unless the guest goes elsewhere before. */
static bool fetched_ahead(struct pyhv_emulator_vcpu *vcpu)
{
    struct cpu_state *state = pyhv_library_state(vcpu->engine);
    const uint64_t rip = state->segs[CS].base + state->rip, behind = (rip | (PYHV_PAGE_SIZE - 1)) + 1;
    if (vcpu->stepping || vcpu->one_by_one || state->cr[2] != behind)
        return false;
    forget_fault(vcpu, state);
    vcpu->one_by_one = BLOCK_MAX;
    return true;
}

static bool raise_fault(struct pyhv_emulator_vcpu *vcpu, uint32_t vector, uint32_t lent, struct pyhv_exit *exit)
{
    if (vector == PAGE_FAULT && fetched_ahead(vcpu))
        return false;
    vcpu->one_by_one = 0;
    if (vector == NO_COPROCESSOR && lend_flags(vcpu))
        return false;
    if (vector == PAGE_FAULT && !(pyhv_library_state(vcpu->engine)->error_code & FAULT_USER) &&
        lend_user_stack(vcpu, lent))
        return false;
    if (!save_state(vcpu, exit))
        return true;
    struct cpu_state *state = &vcpu->context->state;
    enum emulator_event event = state->exception_is_int && vector != INVALID_OPCODE ? EVENT_SOFTWARE : EVENT_FAULT;
    enum emulator_delivery done =
        emulator_deliver(vcpu, state, event, vector, event == EVENT_FAULT ? (uint32_t)state->error_code : 0);
    state->exception_is_int = 0;
    state->error_code = 0;
    return finish_event(vcpu, done, exit);
}

/* SYSCALL and SYSENTER. Where TF is still set behind them (SYSCALL clears what FMASK says) they are a step like others. */
static bool enter_kernel(struct pyhv_emulator_vcpu *vcpu,
                         enum emulator_delivery (*enter)(struct pyhv_emulator_vcpu *, struct cpu_state *),
                         struct pyhv_exit *exit)
{
    if (!save_state(vcpu, exit))
        return true;
    struct cpu_state *state = &vcpu->context->state;
    enum emulator_delivery done = enter(vcpu, state);
    if (done == DELIVERED && (state->rflags & RFLAGS_TF)) {
        state->dr[6] |= DR6_BS;
        done = emulator_deliver(vcpu, state, EVENT_FAULT, DEBUG, 0);
    }
    return finish_event(vcpu, done, exit);
}

/* Takes back what MOV has written to a control register: it faults instead. RIP stands behind it: 0F 22 and the registers'
 * byte, and before them REX if that is a prefix that names another register or a width. */
static bool refuse_control(struct pyhv_emulator_vcpu *vcpu, struct pyhv_exit *exit)
{
    if (!save_state(vcpu, exit))
        return true;
    struct cpu_state *state = &vcpu->context->state;
    const uint64_t written[] = {state->cr[0], 0, 0, state->cr[3], state->cr[4], 0, 0, 0};
    if (~state->efer & vcpu->control.efer & EFER_LMA) /* the library has left long mode, and cut RIP */
        state->rip |= vcpu->control.rip & ~UINT64_C(0xffffffff);
    state->cr[0] = vcpu->control.cr0;
    state->cr[3] = vcpu->control.cr3;
    state->cr[4] = vcpu->control.cr4;
    state->efer = vcpu->control.efer;
    emulator_update_hflags(state);
    uint8_t bytes[4] = {0};
    emulator_peek(vcpu, state, state->segs[CS].base + state->rip - sizeof bytes, bytes, sizeof bytes);
    bool has_rex = (state->hflags & HF_CS64) && (bytes[0] & 0xf0) == 0x40;
    if (has_rex && (bytes[0] & 1) && (uint32_t)state->regs[8 + (bytes[3] & 7)] != (uint32_t)written[bytes[3] >> 3 & 7])
        has_rex = false; /* it is the end of the instruction before */
    state->rip -= has_rex ? 4 : 3;
    enum emulator_delivery done = emulator_deliver(vcpu, state, EVENT_FAULT, PROTECTION, 0);
    if (emulator_load(vcpu, vcpu->context, true, &exit->error) < 0)
        return stop(exit, PYHV_STOP_FAILED);
    return finish_event(vcpu, done, exit);
}

/* An instruction that the engine does not know, or no memory where one should be. Two that processors have are among them:
 * RDPMC, which without counters is #GP, and INT1, which is #DB behind itself and leaves DR6 alone. */
static bool raise_invalid_opcode(struct pyhv_emulator_vcpu *vcpu, uint32_t lent, struct pyhv_exit *exit)
{
    static const uint8_t rdpmc[] = {0x0f, 0x33}, int1 = 0xf1;
    if (!lent && lend_flags(vcpu))
        return false;
    if (!save_state(vcpu, exit))
        return true;
    struct cpu_state *state = &vcpu->context->state;
    uint8_t bytes[sizeof rdpmc] = {0};
    if (emulator_peek(vcpu, state, state->segs[CS].base + state->rip, bytes, sizeof bytes) == 0) {
        exit->suberror = PYHV_SUBERROR_NO_CODE;
        return stop(exit, PYHV_STOP_INTERNAL_ERROR);
    }
    uint32_t vector = INVALID_OPCODE;
    if (memcmp(bytes, rdpmc, sizeof rdpmc) == 0) {
        vector = PROTECTION;
    } else if (bytes[0] == int1) {
        vector = DEBUG;
        state->rip++;
    }
    return finish_event(vcpu, emulator_deliver(vcpu, state, EVENT_FAULT, vector, 0), exit);
}

/* CR8 and the local APIC's task priority are one: gives both what was written last. Returns true if `state` was changed.
 * With vm->lock held. */
static bool join_priority(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state)
{
    struct irqchip *chips = &emulator_vm(vcpu)->chips;
    bool differ = (state->task_priority & 0xf) != irqchip_cr8(chips), changed = differ && vcpu->priority_written;
    if (changed)
        state->task_priority = irqchip_cr8(chips);
    else if (differ)
        irqchip_set_cr8(chips, state->task_priority);
    vcpu->priority_written = false;
    return changed;
}

/* Takes the event that comes first, an NMI before an interrupt, out of the controllers if the guest takes one now: its
 * vector, or NO_INTERRUPT, and then must_leave() knows what to watch for. `changed`: the state was. */
static int next_event(struct pyhv_emulator_vcpu *vcpu, struct cpu_state *state, bool *changed)
{
    struct irqchip *chips = &emulator_vm(vcpu)->chips;
    int vector = NO_INTERRUPT;
    pthread_mutex_lock(&emulator_vm(vcpu)->lock);
    *changed |= join_priority(vcpu, state);
    vcpu->waiting.nmi = chips->nmi_pending;
    vcpu->waiting.interrupt = irqchip_waiting(chips);
    vcpu->waiting.deliverable = irqchip_pending(chips);
    vcpu->waiting.priority = state->task_priority;
    if (takes_event(vcpu, state)) {
        if (chips->nmi_pending && !(state->hflags2 & HF2_NMI)) {
            vector = NMI;
            chips->nmi_pending = false;
            state->hflags2 |= HF2_NMI; /* until IRET */
        } else {
            vector = irqchip_acknowledge(chips);
        }
    }
    pthread_mutex_unlock(&emulator_vm(vcpu)->lock);
    return vector;
}

/* Delivers what waits and the guest takes: more than one where a handler takes the next at once. True if the run ends. */
static bool take_events(struct pyhv_emulator_vcpu *vcpu, struct pyhv_exit *exit)
{
    struct cpu_state *state = &vcpu->context->state;
    bool changed = false;
    if (!save_state(vcpu, exit))
        return true;
    for (int vector; (vector = next_event(vcpu, state, &changed)) != NO_INTERRUPT; changed = true) {
        vcpu->halted = false;
        enum emulator_delivery done = emulator_deliver(vcpu, state, EVENT_INTERRUPT, (uint32_t)vector, 0);
        if (done != DELIVERED)
            return finish_event(vcpu, done, exit);
    }
    if (changed && emulator_load(vcpu, vcpu->context, false, &exit->error) < 0)
        return stop(exit, PYHV_STOP_FAILED);
    return false;
}

/* Waits in HLT for something to look at. */
static void sleep_in_hlt(struct pyhv_emulator_vcpu *vcpu, int64_t deadline)
{
    struct pyhv_emulator_vm *vm = emulator_vm(vcpu);
    struct timespec until = {.tv_sec = deadline / 1000000000, .tv_nsec = deadline % 1000000000};
    pthread_mutex_lock(&vm->lock);
    vm->asleep = true;
    while (!atomic_load(&vcpu->attention)) {
        if (deadline == NO_DEADLINE)
            pthread_cond_wait(&vm->wake, &vm->lock);
        else if (pthread_cond_timedwait(&vm->wake, &vm->lock, &until) == ETIMEDOUT)
            break;
    }
    vm->asleep = false;
    pthread_mutex_unlock(&vm->lock);
}

static int waits_for_ever(struct pyhv_vcpu *base, struct pyhv_error *error)
{
    (void)error;
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    struct pyhv_emulator_vm *vm = emulator_vm(vcpu);
    pthread_mutex_lock(&vm->lock);
    bool waits = vm->asleep;
    if (!waits) { /* or nobody runs it */
        pthread_mutex_lock(&vcpu->kick.lock);
        waits = !vcpu->kick.running && vcpu->halted;
        pthread_mutex_unlock(&vcpu->kick.lock);
    }
    if (waits) {
        const struct cpu_state *state = pyhv_library_state(vcpu->engine);
        waits = !(state->rflags & RFLAGS_IF) && !irqchip_may_send_nmi(&vm->chips, state->hflags2 & HF2_NMI);
    }
    pthread_mutex_unlock(&vm->lock);
    return waits;
}

/* Lets the engine execute, `count` instructions if that is not 0, and acts on why it came back. True if the run ends. */
static bool run_engine(struct pyhv_emulator_vcpu *vcpu, size_t count, struct pyhv_exit *exit)
{
    uint64_t rip = pyhv_library_state(vcpu->engine)->rip;
    vcpu->happened = HAPPENED_NOTHING;
    vcpu->stepping = count != 0;
    remember_control(vcpu, pyhv_library_state(vcpu->engine));
    vcpu->executing = true;
    int code = uc.emu_start(vcpu->engine, rip, 0, 0, count);
    vcpu->executing = false;
    const uint32_t lent = vcpu->lent;
    take_flags_back(vcpu);
    exit->exit_reason = (uint32_t)code;

    switch (vcpu->happened) {
    case HAPPENED_ACTION:
        return stop_for_action(vcpu, exit);
    case HAPPENED_EXCEPTION:
        return raise_fault(vcpu, vcpu->vector, lent, exit);
    case HAPPENED_SYSCALL:
        return enter_kernel(vcpu, emulator_syscall, exit);
    case HAPPENED_SYSENTER:
        return enter_kernel(vcpu, emulator_sysenter, exit);
    case HAPPENED_RESERVED:
        return refuse_control(vcpu, exit);
    case HAPPENED_LOST_MEMORY:
        return stop_for_lost_memory(exit);
    case HAPPENED_NOTHING:
        break;
    }
    if (code == UC_ERR_INSN_INVALID)
        return raise_invalid_opcode(vcpu, lent, exit);
    if (code == UC_ERR_FETCH_UNMAPPED || code == UC_ERR_FETCH_PROT || code == UC_ERR_READ_UNMAPPED ||
        code == UC_ERR_WRITE_UNMAPPED) {
        exit->suberror = PYHV_SUBERROR_NO_CODE;
        return stop(exit, PYHV_STOP_INTERNAL_ERROR);
    }
    if (code != UC_ERR_OK)
        return stop_for_code(exit, "uc_emu_start", code);
    vcpu->halted = pyhv_library_halted(vcpu->engine);
    return false;
}

/* One turn: what wants attention, then the engine. True if the run ends. */
static bool turn(struct pyhv_emulator_vcpu *vcpu, struct pyhv_exit *exit)
{
    struct pyhv_emulator_vm *vm = emulator_vm(vcpu);
    int64_t deadline = NO_DEADLINE;
    bool waiting = false;
    atomic_store(&vcpu->attention, false);
    if (atomic_exchange(&vcpu->kicked, 0))
        return stop(exit, PYHV_STOP_KICKED);
    if (vcpu->log_full) {
        vcpu->log_full = false;
        return stop(exit, PYHV_STOP_TRAP_LOG_FULL);
    }
    if (vm->base.irqchip) {
        pthread_mutex_lock(&vm->lock);
        deadline = irqchip_update(&vm->chips, pyhv_now());
        waiting = irqchip_waiting(&vm->chips);
        pthread_mutex_unlock(&vm->lock);
    }
    vcpu->waiting.nmi = vcpu->waiting.interrupt = false;
    if ((waiting || vcpu->priority_written) && take_events(vcpu, exit))
        return true;
    if (vcpu->halted) {
        if (!vm->base.irqchip) { /* to wait is the caller's business, who lets it run on */
            vcpu->halted = false;
            return stop(exit, PYHV_STOP_HALTED);
        }
        sleep_in_hlt(vcpu, deadline);
        return false;
    }
    set_alarm(vcpu, deadline);
    return run_engine(vcpu, 0, exit);
}

/* Adds where the vCPU stands, for whoever reads the exit, and leaves its state as it is to be saved. Without the bytes there
 * if they, or the page tables, are gone. */
static void describe(struct pyhv_emulator_vcpu *vcpu, struct pyhv_exit *exit)
{
    if (emulator_save(vcpu, vcpu->context, NULL) < 0)
        return;
    struct cpu_state *state = &vcpu->context->state;
    pthread_mutex_lock(&emulator_vm(vcpu)->lock);
    bool changed = join_priority(vcpu, state);
    pthread_mutex_unlock(&emulator_vm(vcpu)->lock);
    if (changed)
        (void)emulator_load(vcpu, vcpu->context, false, NULL);
    exit->rip = state->segs[CS].base + state->rip;
    if (sigsetjmp(vcpu->lost_memory, 0))
        return;
    exit->bytes_count = (uint32_t)emulator_peek(vcpu, state, exit->rip, exit->bytes, sizeof exit->bytes);
}

static void *ring(void *opaque)
{
    struct pyhv_emulator_vcpu *vcpu = opaque;
    uint64_t times;
    while (read(vcpu->alarm_fd, &times, sizeof times) == sizeof times && !atomic_load(&vcpu->alarm_over)) {
        atomic_store(&vcpu->alarm, NO_DEADLINE);
        ask_for_attention(vcpu);
    }
    return NULL;
}

static int create_alarm(struct pyhv_emulator_vcpu *vcpu, struct pyhv_error *error)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = PYHV_KICK_SIGNAL};
    event._sigev_un._tid = gettid();
    if (timer_create(CLOCK_MONOTONIC, &event, &vcpu->timer) == 0)
        return 0;
    if (errno != EAGAIN) /* RLIMIT_SIGPENDING: a timer takes a place in the queue of signals */
        return pyhv_fail_errno(error, "timer_create");
    vcpu->alarm_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    if (vcpu->alarm_fd < 0)
        return pyhv_fail_errno(error, "timerfd_create");
    atomic_store(&vcpu->alarm_over, false);
    int errnum = pthread_create(&vcpu->alarm_thread, NULL, ring, vcpu);
    if (errnum == 0)
        return 0;
    close(vcpu->alarm_fd);
    vcpu->alarm_fd = -1;
    return pyhv_fail(error, errnum, "pthread_create", "for the guest's timers");
}

static void destroy_alarm(struct pyhv_emulator_vcpu *vcpu)
{
    if (vcpu->alarm_fd < 0) {
        timer_delete(vcpu->timer);
        return;
    }
    atomic_store(&vcpu->alarm_over, true);
    set_alarm(vcpu, 1);
    pthread_join(vcpu->alarm_thread, NULL);
    close(vcpu->alarm_fd);
    vcpu->alarm_fd = -1;
}

static int enter_thread(struct pyhv_emulator_vcpu *vcpu, struct pyhv_error *error)
{
    atomic_store(&vcpu->alarm, NO_DEADLINE);
    emulator_watch_memory(vcpu);
    pyhv_kick_enter(&vcpu->kick, on_attention, vcpu);
    if (create_alarm(vcpu, error) < 0) {
        pyhv_kick_leave(&vcpu->kick);
        emulator_watch_memory(NULL);
        return -1;
    }
    pyhv_cancel = &vcpu->kicked;
    return 0;
}

static void leave_thread(struct pyhv_emulator_vcpu *vcpu)
{
    pyhv_cancel = NULL;
    destroy_alarm(vcpu);
    pyhv_kick_leave(&vcpu->kick);
    emulator_watch_memory(NULL);
}

static void run(struct pyhv_vcpu *base, struct pyhv_exit *exit)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    vcpu->cannot = NULL;
    if (enter_thread(vcpu, &exit->error) < 0) {
        stop(exit, PYHV_STOP_FAILED);
        return;
    }
    if (emulator_vm(vcpu)->base.bus) /* console bytes that the last pause kept from getting out */
        pyhv_bus_flush(emulator_vm(vcpu)->base.bus);
    if (sigsetjmp(vcpu->lost_memory, 0))
        stop_for_lost_memory(exit);
    else
        while (!turn(vcpu, exit))
            ;
    describe(vcpu, exit);
    leave_thread(vcpu);
}

static void step(struct pyhv_vcpu *base, struct pyhv_exit *exit)
{
    struct pyhv_emulator_vcpu *vcpu = emulator_of(base);
    vcpu->cannot = NULL;
    if (enter_thread(vcpu, &exit->error) < 0) {
        stop(exit, PYHV_STOP_FAILED);
        return;
    }
    if (sigsetjmp(vcpu->lost_memory, 0)) {
        stop_for_lost_memory(exit);
    } else if (vcpu->halted) {
        stop(exit, PYHV_STOP_HALTED);
    } else {
        pyhv_library_stop_between_blocks(vcpu->engine, 0);
        if (!run_engine(vcpu, 1, exit))
            stop(exit, PYHV_STOP_DEBUG);
        pyhv_library_stop_between_blocks(vcpu->engine, 1);
    }
    describe(vcpu, exit);
    leave_thread(vcpu);
}

static const struct pyhv_vcpu_ops operations = {
    .destroy = destroy,
    .set_cpuid = emulator_set_cpuid,
    .get_cpuid = emulator_get_cpuid,
    .get_regs = emulator_get_regs,
    .set_regs = emulator_set_regs,
    .get_sregs = emulator_get_sregs,
    .set_sregs = emulator_set_sregs,
    .get_msrs = emulator_get_msrs,
    .set_msrs = emulator_set_msrs,
    .get_tsc_khz = emulator_get_tsc_khz,
    .trap = trap,
    .run = run,
    .step = step,
    .kick = kick,
    .waits_for_ever = waits_for_ever,
};

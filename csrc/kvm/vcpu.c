/* SPDX-License-Identifier: MIT
 *
 * A vCPU: its creation, its run loop, and the kick that ends a run from outside.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cancel.h"
#include "devices/device.h"
#include "kvm/kvm.h"

/* Before the CPUID table is set: from then on a paravirtual MSR whose feature the table hides is a #GP for the guest, and
 * a hypercall whose feature it hides fails. Without it KVM answers them all. */
static int enforce_pv_cpuid(struct pyhv_kvm_vcpu *vcpu, struct pyhv_error *error)
{
    struct kvm_enable_cap enforce = {.cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args[0] = 1};
    if (ioctl(vcpu->fd, KVM_ENABLE_CAP, &enforce) < 0)
        return pyhv_fail_errno(error, "KVM_ENABLE_CAP(KVM_CAP_ENFORCE_PV_FEATURE_CPUID)");
    return 0;
}

static void init_condition(pthread_cond_t *condition)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void destroy(struct pyhv_vcpu *base)
{
    struct pyhv_kvm_vcpu *vcpu = kvm_of(base);
    munmap(vcpu->run, vcpu->run_size);
    close(vcpu->fd);
    pthread_cond_destroy(&vcpu->looked);
    pyhv_kick_destroy(&vcpu->kick);
    free(vcpu);
}

static const struct pyhv_vcpu_ops operations;

struct pyhv_vcpu *kvm_vcpu_create(struct pyhv_vm *base, uint32_t index, struct pyhv_error *error)
{
    struct pyhv_kvm_vm *vm = kvm_vm_of(base);
    int run_size = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (run_size < 0) {
        pyhv_fail_errno(error, "KVM_GET_VCPU_MMAP_SIZE");
        return NULL;
    }
    struct pyhv_kvm_vcpu *vcpu = calloc(1, sizeof *vcpu);
    if (!vcpu) {
        pyhv_fail(error, ENOMEM, "pyhv_vcpu_create", NULL);
        return NULL;
    }
    pyhv_vcpu_init(&vcpu->base, &operations, base, index);
    vcpu->run_size = (size_t)run_size;
    pyhv_kick_init(&vcpu->kick);
    init_condition(&vcpu->looked);
    vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, index);
    if (vcpu->fd < 0) {
        pyhv_fail(error, errno, "KVM_CREATE_VCPU", "vCPU %u", index);
        goto fail;
    }
    vcpu->run = mmap(NULL, vcpu->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED) {
        pyhv_fail(error, errno, "mmap", "struct kvm_run of vCPU %u", index);
        close(vcpu->fd);
        goto fail;
    }
    if (enforce_pv_cpuid(vcpu, error) < 0) {
        destroy(&vcpu->base);
        return NULL;
    }
    return &vcpu->base;

fail:
    pthread_cond_destroy(&vcpu->looked);
    pyhv_kick_destroy(&vcpu->kick);
    free(vcpu);
    return NULL;
}

static int kick(struct pyhv_vcpu *base, struct pyhv_error *error)
{
    struct pyhv_kvm_vcpu *vcpu = kvm_of(base);
    pthread_mutex_lock(&vcpu->kick.lock);
    atomic_store(&vcpu->kicked, 1);
    /* Covers the time before KVM_RUN, when a signal would be lost; the signal covers the time inside it. */
    vcpu->run->immediate_exit = 1;
    int errnum = pyhv_kick_send(&vcpu->kick);
    pthread_mutex_unlock(&vcpu->kick.lock);
    return errnum ? pyhv_fail(error, errnum, "pthread_kill", "SIGURG to the thread of vCPU %u", base->index) : 0;
}

/* Does what the vCPU was interrupted for, outside of KVM_RUN and with no I/O pending. Takes a kick back: true if there
 * was one. */
static bool attend(struct pyhv_kvm_vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->kick.lock);
    bool kicked = atomic_exchange(&vcpu->kicked, 0) != 0;
    bool look = vcpu->look == LOOK_WANTED;
    vcpu->run->immediate_exit = 0;
    pthread_mutex_unlock(&vcpu->kick.lock);
    if (look)
        kvm_look(vcpu);
    return kicked;
}

static int linear_rip(struct pyhv_kvm_vcpu *vcpu, uint64_t *linear, struct pyhv_error *error)
{
    struct pyhv_regs regs;
    struct pyhv_sregs sregs;
    if (kvm_get_regs(&vcpu->base, &regs, error) < 0 || kvm_get_sregs(&vcpu->base, &sregs, error) < 0)
        return -1;
    /* In 64-bit mode the base of CS is zero whatever its descriptor says, and KVM reports it as zero. */
    *linear = sregs.cs.base + regs.rip;
    return 0;
}

static void stop(struct pyhv_exit *exit, enum pyhv_stop why)
{
    exit->stop = why;
}

static bool stop_for_action(struct pyhv_kvm_vcpu *vcpu, int action, struct pyhv_exit *exit)
{
    switch (action) {
    case PYHV_ACTION_NONE:
        return false;
    case PYHV_ACTION_GUEST_EXIT:
        exit->status = pyhv_bus_exit_status(vcpu->base.vm->bus);
        stop(exit, PYHV_STOP_GUEST_EXIT);
        return true;
    case PYHV_ACTION_RESET:
        stop(exit, PYHV_STOP_RESET);
        return true;
    case PYHV_ACTION_PANIC:
        stop(exit, PYHV_STOP_PANIC);
        return true;
    default:
        stop(exit, PYHV_STOP_POWER_OFF);
        return true;
    }
}

static bool handle_port_io(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    struct kvm_run *run = vcpu->run;
    void *data = (char *)run + run->io.data_offset;
    bool is_write = run->io.direction == KVM_EXIT_IO_OUT;
    vcpu->base.counters.port_io++;
    vcpu->io_pending = true;
    if (!vcpu->base.vm->bus) {
        if (!is_write)
            memset(data, 0xff, (size_t)run->io.size * run->io.count);
        return false;
    }
    int action = pyhv_bus_port_io(vcpu->base.vm->bus, run->io.port, is_write, run->io.size, run->io.count, data);
    return stop_for_action(vcpu, action, exit);
}

static bool handle_mmio(struct pyhv_kvm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    vcpu->base.counters.mmio++;
    vcpu->io_pending = true;
    if (!run->mmio.is_write) /* nothing is mapped outside RAM: a bus without a listener reads all-ones */
        memset(run->mmio.data, 0xff, sizeof run->mmio.data);
    return false;
}

static bool handle_system_event(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    switch (vcpu->run->system_event.type) {
    case KVM_SYSTEM_EVENT_SHUTDOWN:
        stop(exit, PYHV_STOP_POWER_OFF);
        break;
    case KVM_SYSTEM_EVENT_RESET:
        stop(exit, PYHV_STOP_RESET);
        break;
    default:
        exit->suberror = vcpu->run->system_event.type;
        stop(exit, PYHV_STOP_SYSTEM_EVENT);
    }
    return true;
}

static bool handle_internal_error(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    const struct kvm_run *run = vcpu->run;
    const uint32_t most = sizeof exit->data / sizeof exit->data[0];
    exit->suberror = run->internal.suberror;
    exit->data_count = run->internal.ndata < most ? run->internal.ndata : most;
    memcpy(exit->data, run->internal.data, exit->data_count * sizeof exit->data[0]);
    stop(exit, PYHV_STOP_INTERNAL_ERROR);
    return true;
}

/* A debug exit that is none of the run loop's own steps: with traps on declared addresses, one of them. */
static bool handle_debug(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    if (!vcpu->trap.table || vcpu->trap.site_count == 0) {
        stop(exit, PYHV_STOP_DEBUG);
        return true;
    }
    vcpu->base.counters.traps++;
    switch (kvm_trap_answer(vcpu, vcpu->run->debug.arch.pc, &exit->error)) {
    case TRAP_ANSWERED:
        return false;
    case TRAP_NOT_CPUID:
        stop(exit, PYHV_STOP_TRAP_LOST);
        return true;
    case TRAP_LOG_FULL:
        stop(exit, PYHV_STOP_TRAP_LOG_FULL);
        return true;
    case TRAP_FAILED:
        break;
    }
    stop(exit, PYHV_STOP_FAILED);
    return true;
}

/* Acts on the exit in vcpu->run. Returns true if it ends the run, with `exit` saying why. */
static bool dispatch(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    const struct kvm_run *run = vcpu->run;
    exit->exit_reason = run->exit_reason;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        return handle_port_io(vcpu, exit);
    case KVM_EXIT_MMIO:
        return handle_mmio(vcpu);
    case KVM_EXIT_DEBUG:
        return handle_debug(vcpu, exit);
    case KVM_EXIT_HLT: /* only where no irqchip in the kernel waits for the interrupt */
        stop(exit, PYHV_STOP_HALTED);
        return true;
    case KVM_EXIT_SHUTDOWN:
        stop(exit, PYHV_STOP_TRIPLE_FAULT);
        return true;
    case KVM_EXIT_SYSTEM_EVENT:
        return handle_system_event(vcpu, exit);
    case KVM_EXIT_INTERNAL_ERROR:
        return handle_internal_error(vcpu, exit);
    case KVM_EXIT_FAIL_ENTRY:
        exit->hardware_reason = run->fail_entry.hardware_entry_failure_reason;
        stop(exit, PYHV_STOP_FAIL_ENTRY);
        return true;
    case KVM_EXIT_UNKNOWN:
        exit->hardware_reason = run->hw.hardware_exit_reason;
        stop(exit, PYHV_STOP_UNHANDLED);
        return true;
    case KVM_EXIT_INTR:            /* a signal: the kick is looked at before the next entry */
    case KVM_EXIT_IRQ_WINDOW_OPEN: /* only useful to an irqchip in user space */
    case KVM_EXIT_SET_TPR:
        return false;
    default:
        stop(exit, PYHV_STOP_UNHANDLED);
        return true;
    }
}

/* One KVM_RUN and what follows from it. Returns true if the run ends. */
static bool enter(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    vcpu->io_pending = false; /* this entry finishes it */
    if (ioctl(vcpu->fd, KVM_RUN, 0) == 0)
        return dispatch(vcpu, exit);
    if (errno == EAGAIN) /* an application processor has left INIT and can be entered now */
        return false;
    if (errno != EINTR) {
        pyhv_fail_errno(&exit->error, "KVM_RUN");
        stop(exit, PYHV_STOP_FAILED);
        return true;
    }
    vcpu->base.counters.interrupted++;
    if (!attend(vcpu))
        return false;
    stop(exit, PYHV_STOP_KICKED);
    return true;
}

/* Finishes the last port or memory access without executing another instruction. Returns true if the run
 * ends. */
static bool finish_io(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    while (vcpu->io_pending) { /* a repeated string instruction may exit again */
        vcpu->io_pending = false;
        vcpu->run->immediate_exit = 1;
        int result = ioctl(vcpu->fd, KVM_RUN, 0);
        int errnum = errno;
        pthread_mutex_lock(&vcpu->kick.lock); /* who interrupts it now keeps the immediate_exit */
        vcpu->run->immediate_exit = atomic_load(&vcpu->kicked) != 0 || vcpu->look == LOOK_WANTED;
        pthread_mutex_unlock(&vcpu->kick.lock);
        if (result == 0) {
            /* Single-stepping reports the finished instruction as a step of its own. */
            if (vcpu->run->exit_reason != KVM_EXIT_DEBUG && dispatch(vcpu, exit))
                return true;
        } else if (errnum != EINTR && errnum != EAGAIN) {
            pyhv_fail(&exit->error, errnum, "KVM_RUN", "finishing an I/O instruction");
            stop(exit, PYHV_STOP_FAILED);
            return true;
        }
    }
    return false;
}

/* A guest with interrupts on is looked at before each step, whether one waits; one with interrupts off, whom an NMI would
 * interrupt, before so many. */
enum { LOOK_FOR_EVENTS = 16 };

/* Executes one instruction; CPUID from the trap's table if there is one. Returns true if the run ends. */
static bool step_once(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    uint64_t before;
    if (finish_io(vcpu, exit))
        return true;
    if (linear_rip(vcpu, &before, &exit->error) < 0)
        goto failed;
    if (vcpu->trap.table && (vcpu->run->if_flag || vcpu->trap.steps++ % LOOK_FOR_EVENTS == 0)) {
        int waits = kvm_trap_event_waits(vcpu, &exit->error);
        if (waits < 0)
            goto failed;
        if (waits) {
            stop(exit, PYHV_STOP_TRAP_EVENT);
            return true;
        }
    }
    if (vcpu->trap.table) {
        switch (kvm_trap_answer(vcpu, before, &exit->error)) {
        case TRAP_ANSWERED:
            return false;
        case TRAP_NOT_CPUID:
            break;
        case TRAP_LOG_FULL:
            stop(exit, PYHV_STOP_TRAP_LOG_FULL);
            return true;
        case TRAP_FAILED:
            goto failed;
        }
    }
    if (kvm_trap_arm_step(vcpu, &exit->error) < 0)
        goto failed;
    for (;;) {
        vcpu->io_pending = false;
        if (ioctl(vcpu->fd, KVM_RUN, 0) == 0) {
            if (vcpu->run->exit_reason == KVM_EXIT_DEBUG) {
                vcpu->base.counters.traps++;
                return false;
            }
            if (dispatch(vcpu, exit))
                return true;
            if (vcpu->io_pending)
                return finish_io(vcpu, exit);
        } else if (errno == EINTR) {
            vcpu->base.counters.interrupted++;
            if (attend(vcpu)) {
                stop(exit, PYHV_STOP_KICKED);
                return true;
            }
        } else if (errno == EAGAIN) {
            return false; /* an AP has left INIT, which cleared TF: look at where it stands now and arm again
                           */
        } else {
            pyhv_fail_errno(&exit->error, "KVM_RUN");
            goto failed;
        }
    }
failed:
    stop(exit, PYHV_STOP_FAILED);
    return true;
}

/* Adds where the vCPU stands, for whoever reads the exit. */
static void describe(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    if (linear_rip(vcpu, &exit->rip, NULL) == 0)
        exit->bytes_count = (uint32_t)kvm_read_linear(vcpu, exit->rip, exit->bytes, sizeof exit->bytes);
}

static void enter_thread(struct pyhv_kvm_vcpu *vcpu)
{
    pyhv_kick_enter(&vcpu->kick, NULL, NULL);
    pyhv_cancel = &vcpu->kicked;
}

static void leave_thread(struct pyhv_kvm_vcpu *vcpu)
{
    pyhv_cancel = NULL;
    pyhv_kick_leave(&vcpu->kick);
    pthread_cond_broadcast(&vcpu->looked); /* who wants a look need not wait for this run any more */
}

/* Steps, until the run ends. An instruction that is answered instead of executed enters no KVM_RUN, which would notice
 * a kick. */
static void step_on(struct pyhv_kvm_vcpu *vcpu, struct pyhv_exit *exit)
{
    do {
        if (!atomic_load(&vcpu->kicked))
            continue;
        if (finish_io(vcpu, exit))
            return;
        if (attend(vcpu)) {
            stop(exit, PYHV_STOP_KICKED);
            return;
        }
    } while (!step_once(vcpu, exit));
}

static void run(struct pyhv_vcpu *base, struct pyhv_exit *exit)
{
    struct pyhv_kvm_vcpu *vcpu = kvm_of(base);
    enter_thread(vcpu);
    if (vcpu->base.vm->bus) /* console bytes that the last pause kept from getting out */
        pyhv_bus_flush(vcpu->base.vm->bus);
    if (vcpu->trap.table && vcpu->trap.site_count == 0) {
        step_on(vcpu, exit);
    } else if (kvm_trap_arm(vcpu, &exit->error) < 0) {
        stop(exit, PYHV_STOP_FAILED);
    } else {
        while (!enter(vcpu, exit))
            ;
    }
    describe(vcpu, exit);
    leave_thread(vcpu);
}

static void step(struct pyhv_vcpu *base, struct pyhv_exit *exit)
{
    struct pyhv_kvm_vcpu *vcpu = kvm_of(base);
    enter_thread(vcpu);
    if (!step_once(vcpu, exit) && !finish_io(vcpu, exit))
        stop(exit, PYHV_STOP_DEBUG);
    describe(vcpu, exit);
    leave_thread(vcpu);
}

static const struct pyhv_vcpu_ops operations = {
    .destroy = destroy,
    .set_cpuid = kvm_set_cpuid,
    .get_cpuid = kvm_get_cpuid,
    .get_regs = kvm_get_regs,
    .set_regs = kvm_set_regs,
    .get_sregs = kvm_get_sregs,
    .set_sregs = kvm_set_sregs,
    .get_msrs = kvm_get_msrs,
    .set_msrs = kvm_set_msrs,
    .get_tsc_khz = kvm_get_tsc_khz,
    .trap = kvm_trap,
    .run = run,
    .step = step,
    .kick = kick,
    .waits_for_ever = kvm_waits_for_ever,
};

/* SPDX-License-Identifier: MIT
 *
 * A VM of the emulator: its memory, its interrupt controllers and its clock.
 */
#include <errno.h>
#include <linux/perf_event.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "emulator/emulator.h"

uint32_t pyhv_emulator_host_tsc_khz(void)
{
    /* The kernel tells every owner of a perf event how TSC cycles become nanoseconds (perf_event_open(2), time_mult):
     * ns = cycles * time_mult >> time_shift. */
    struct perf_event_attr attr = {.size = sizeof attr, .type = PERF_TYPE_SOFTWARE, .config = PERF_COUNT_SW_DUMMY};
    attr.exclude_kernel = attr.exclude_hv = 1;
    uint32_t khz = 0;
    int fd = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
    if (fd < 0)
        return 0;
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    const struct perf_event_mmap_page *page = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED) {
        if (page->cap_user_time && page->time_mult)
            khz = (uint32_t)((UINT64_C(1000000) << page->time_shift) / page->time_mult);
        munmap((void *)(uintptr_t)page, size);
    }
    close(fd);
    return khz;
}

static void raise_irq(void *opaque, uint32_t gsi, int32_t level)
{
    struct pyhv_emulator_vm *vm = opaque;
    pthread_mutex_lock(&vm->lock);
    irqchip_set_line(&vm->chips, gsi, level != 0);
    if (vm->vcpu && irqchip_waiting(&vm->chips))
        emulator_attention(vm->vcpu);
    pthread_mutex_unlock(&vm->lock);
}

static const struct pyhv_vm_ops operations;

struct pyhv_vm *pyhv_emulator_vm_create(const struct pyhv_vm_config *config, struct pyhv_bus *bus,
                                        struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = calloc(1, sizeof *vm);
    if (!vm) {
        pyhv_fail(error, ENOMEM, "pyhv_emulator_vm_create", NULL);
        return NULL;
    }
    vm->base.ops = &operations;
    vm->base.irqchip = config->irqchip != 0;
    vm->base.pit = vm->base.irqchip && config->pit;
    vm->tsc_khz = config->tsc_khz;
    pthread_mutex_init(&vm->lock, NULL);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&vm->wake, &clock);
    pthread_condattr_destroy(&clock);
    vm->clock_zero = pyhv_now();
    irqchip_reset(&vm->chips, vm->base.pit, vm->clock_zero);
    vm->base.bus = bus;
    if (bus && vm->base.irqchip)
        pyhv_bus_set_irq_sink(bus, (struct pyhv_irq_sink){.raise = raise_irq, .opaque = vm});
    return &vm->base;
}

static void destroy(struct pyhv_vm *base)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    emulator_dirty_close(vm);
    pthread_cond_destroy(&vm->wake);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}

static int map(struct pyhv_vm *base, const struct pyhv_slot *slot, struct pyhv_error *error)
{
    const struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    if (vm->vcpu || vm->dirty.how != DIRTY_OFF || vm->dirty.written)
        return pyhv_fail(error, EBUSY, "pyhv_vm_map", "memory comes before the vCPU");
    /* What is no memory is mapped too, in between: see map_memory() in vcpu.c. */
    if (slot->size == 0 || slot->gpa % PYHV_PAGE_SIZE || slot->size % PYHV_PAGE_SIZE ||
        (uintptr_t)slot->host % PYHV_PAGE_SIZE)
        return pyhv_fail(error, EINVAL, "pyhv_vm_map", "0x%llx bytes at gpa 0x%llx are no pages",
                         (unsigned long long)slot->size, (unsigned long long)slot->gpa);
    if (base->slot_count > 0) {
        const struct pyhv_slot *last = &base->slots[base->slot_count - 1];
        if (slot->gpa < last->gpa + last->size)
            return pyhv_fail(error, EINVAL, "pyhv_vm_map", "gpa 0x%llx is not behind the last piece",
                             (unsigned long long)slot->gpa);
    }
    return 0;
}

/* Nothing is owed: its timers count what they miss as one tick anyway, and it has no clock that could tell the guest. */
static int resume(struct pyhv_vm *vm, struct pyhv_error *error)
{
    (void)vm;
    (void)error;
    return 0;
}

static const struct pyhv_vm_ops operations = {
    .destroy = destroy,
    .map = map,
    .log_dirty = emulator_log_dirty,
    .take_dirty = emulator_take_dirty,
    .resume = resume,
    .save_state = emulator_save_state,
    .load_state = emulator_load_state,
    .create_vcpu = emulator_vcpu_create,
};

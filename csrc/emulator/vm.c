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

enum { PIT_FLAGS_SPEAKER = 2 }; /* KVM_PIT_FLAGS_SPEAKER_DATA_ON, which old headers lack */

int64_t emulator_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

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

struct pyhv_emulator_vm *pyhv_emulator_vm_create(const struct pyhv_vm_config *config, struct pyhv_bus *bus,
                                                 struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = calloc(1, sizeof *vm);
    if (!vm) {
        pyhv_fail(error, ENOMEM, "pyhv_emulator_vm_create", NULL);
        return NULL;
    }
    vm->irqchip = config->irqchip != 0;
    vm->pit = vm->irqchip && config->pit;
    pthread_mutex_init(&vm->lock, NULL);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&vm->wake, &clock);
    pthread_condattr_destroy(&clock);
    vm->clock_zero = emulator_now();
    irqchip_reset(&vm->chips, vm->pit, vm->clock_zero);
    vm->bus = bus;
    if (bus && vm->irqchip)
        pyhv_bus_set_irq_sink(bus, (struct pyhv_irq_sink){.raise = raise_irq, .opaque = vm});
    return vm;
}

void pyhv_emulator_vm_destroy(struct pyhv_emulator_vm *vm)
{
    if (!vm)
        return;
    if (vm->bus) /* console input may still come, on its own thread, and must not raise an interrupt in here any more */
        pyhv_bus_set_irq_sink(vm->bus, (struct pyhv_irq_sink){0});
    emulator_dirty_close(vm);
    pthread_cond_destroy(&vm->wake);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}

int pyhv_emulator_vm_map(struct pyhv_emulator_vm *vm, uint64_t gpa, uint64_t size, void *host, struct pyhv_error *error)
{
    if (vm->slot_count == PYHV_VM_MAX_SLOTS)
        return pyhv_fail(error, ENOSPC, "pyhv_emulator_vm_map", "more than %d pieces of memory", PYHV_VM_MAX_SLOTS);
    if (vm->vcpu || vm->dirty.how != DIRTY_OFF || vm->dirty.written)
        return pyhv_fail(error, EBUSY, "pyhv_emulator_vm_map", "memory comes before the vCPU");
    /* What is no memory is mapped too, in between: see map_memory() in vcpu.c. */
    if (size == 0 || gpa % PYHV_PAGE_SIZE || size % PYHV_PAGE_SIZE || (uintptr_t)host % PYHV_PAGE_SIZE)
        return pyhv_fail(error, EINVAL, "pyhv_emulator_vm_map", "0x%llx bytes at gpa 0x%llx are no pages",
                         (unsigned long long)size, (unsigned long long)gpa);
    if (vm->slot_count > 0) {
        const struct emulator_slot *last = &vm->slots[vm->slot_count - 1];
        if (gpa < last->gpa + last->size)
            return pyhv_fail(error, EINVAL, "pyhv_emulator_vm_map", "gpa 0x%llx is not behind the last piece",
                             (unsigned long long)gpa);
    }
    vm->slots[vm->slot_count++] = (struct emulator_slot){.gpa = gpa, .size = size, .host = host};
    return 0;
}

/* ------------------------------------------------------------------------------------------------- state -- */

void pyhv_emulator_vm_get_irqchip(struct pyhv_emulator_vm *vm, struct pyhv_irqchip *irqchip)
{
    pthread_mutex_lock(&vm->lock);
    (void)irqchip_update(&vm->chips, emulator_now());
    *irqchip = (struct pyhv_irqchip){.ioapic = vm->chips.ioapic};
    memcpy(irqchip->pic, vm->chips.pic, sizeof irqchip->pic);
    if (vm->pit) {
        memcpy(irqchip->pit, vm->chips.pit, sizeof irqchip->pit);
        irqchip->pit_flags = vm->chips.speaker ? PIT_FLAGS_SPEAKER : 0;
        for (int i = 0; i < 3; i++)
            irqchip->pit[i].count_load_time = 0; /* of this process's clock: see struct pyhv_pit_channel */
    }
    pthread_mutex_unlock(&vm->lock);
}

int pyhv_emulator_vm_set_irqchip(struct pyhv_emulator_vm *vm, const struct pyhv_irqchip *irqchip,
                                 struct pyhv_error *error)
{
    if (irqchip->ioapic.base_address != IOAPIC_BASE)
        return pyhv_fail(error, EINVAL, "I/O APIC", "at 0x%llx; the emulator has it at 0x%llx",
                         (unsigned long long)irqchip->ioapic.base_address, (unsigned long long)IOAPIC_BASE);
    for (int i = 0; i < 3; i++)
        if (irqchip->pit[i].initial_count > 0x10000 || irqchip->pit[i].mode > 5)
            return pyhv_fail(error, EINVAL, "PIT", "channel %d: count %u, mode %u", i, irqchip->pit[i].initial_count,
                             irqchip->pit[i].mode);
    int64_t now = emulator_now();
    pthread_mutex_lock(&vm->lock);
    memcpy(vm->chips.pic, irqchip->pic, sizeof vm->chips.pic);
    vm->chips.ioapic = irqchip->ioapic;
    if (vm->pit) {
        memcpy(vm->chips.pit, irqchip->pit, sizeof vm->chips.pit);
        vm->chips.speaker = irqchip->pit_flags & PIT_FLAGS_SPEAKER;
        for (int i = 0; i < 3; i++)
            vm->chips.pit[i].count_load_time = now;
        vm->chips.pit_counted = now;
    }
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

void pyhv_emulator_vm_get_lapic(struct pyhv_emulator_vm *vm, uint8_t *page)
{
    pthread_mutex_lock(&vm->lock);
    irqchip_save_lapic(&vm->chips, page, emulator_now());
    pthread_mutex_unlock(&vm->lock);
}

void pyhv_emulator_vm_set_lapic(struct pyhv_emulator_vm *vm, const uint8_t *page)
{
    pthread_mutex_lock(&vm->lock);
    irqchip_load_lapic(&vm->chips, page, emulator_now());
    pthread_mutex_unlock(&vm->lock);
}

uint64_t pyhv_emulator_vm_get_clock(const struct pyhv_emulator_vm *vm)
{
    return (uint64_t)(emulator_now() - vm->clock_zero);
}

void pyhv_emulator_vm_set_clock(struct pyhv_emulator_vm *vm, uint64_t ns)
{
    vm->clock_zero = (int64_t)((uint64_t)emulator_now() - ns);
}
